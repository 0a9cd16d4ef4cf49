"""SimpleNet, the class-conditional VAE with its Gaussians, and new feature learning."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fastcl.nn import GaussianVAE, SimpleNet, learn_features, trace


def small(width: int = 4) -> SimpleNet:
    torch.manual_seed(1)
    return SimpleNet((1, 8, 8), 3, width)


def test_simplenet_is_thirteen_convolutions_that_can_grow() -> None:
    net = SimpleNet((1, 28, 28), 10, 5)
    kinds = [type(m) for m in net]
    assert kinds.count(nn.Conv2d) == kinds.count(nn.BatchNorm2d) == kinds.count(nn.LeakyReLU) == 13
    assert kinds.count(nn.MaxPool2d) == 3
    assert net(torch.zeros(2, 1, 28, 28)).shape == (2, 10)
    plan = trace(net)
    assert plan["conv1"] == ("norm1", "conv2")
    assert plan["conv13"] == ("norm13", "head")
    with pytest.raises(ValueError, match="8 x 8"):
        SimpleNet((1, 4, 4), 2)
    with pytest.raises(ValueError, match="width is"):
        SimpleNet((1, 8, 8), 2, [3, 3])


@pytest.mark.parametrize("pools", [None, 1, 2, 3])
@pytest.mark.parametrize("side", [8, 28])
def test_the_trunk_ends_with_so_many_poolings(pools: int | None, side: int) -> None:
    net = SimpleNet((1, side, side), 3, list(range(2, 15)))
    trunk, x = net.trunk(pools).eval(), torch.rand(2, 1, side, side)
    net.eval()
    assert trunk(x).shape == (2, net.features(pools))
    if pools is None:
        torch.testing.assert_close(net.head(trunk(x)), net(x))
    else:
        assert sum(isinstance(m, nn.MaxPool2d) for m in trunk) == pools
        assert all(m is net.get_submodule(name) for name, m in trunk.named_children())
    with pytest.raises(ValueError, match="pools is 4 but must be from 1 to 3"):
        net.trunk(4)


def test_only_the_encoder_has_batchnorm() -> None:
    vae = GaussianVAE(small().trunk(), small().head.in_features, 5, 2, (1, 8, 8))
    assert any(isinstance(m, nn.BatchNorm2d) for m in vae.encoder.modules())
    assert not any(isinstance(m, nn.BatchNorm2d) for m in vae.decoder.modules())


def test_divergence_is_torch_s() -> None:
    vae = GaussianVAE(small().trunk(), small().head.in_features, 5, 2, (1, 8, 8)).double()
    a = torch.randn(2, 5, 5, dtype=torch.float64)
    covariance = a @ a.mT + torch.eye(5)
    vae.classes.scale_trils.copy_(torch.linalg.cholesky(covariance))
    vae.classes.means.normal_()
    mean, log_var = torch.randn(7, 5, dtype=torch.float64), torch.randn(7, 5, dtype=torch.float64)
    y = torch.arange(7) % 2
    q = torch.distributions.MultivariateNormal(mean, torch.diag_embed(log_var.exp()))
    p = torch.distributions.MultivariateNormal(vae.classes.means[y], covariance[y])
    torch.testing.assert_close(vae.divergence(mean, log_var, y), torch.distributions.kl_divergence(q, p))
    mean.requires_grad_()
    log_var.requires_grad_()
    assert torch.autograd.gradcheck(lambda m, v: vae.divergence(m, v, y), (mean, log_var))


def test_clusters_are_the_classes() -> None:
    vae = GaussianVAE(small().trunk(), small().head.in_features, 3, 2, (1, 8, 8)).eval()
    x, y = torch.rand(60, 1, 8, 8), torch.arange(60) % 2
    vae.cluster(x, y)
    with torch.no_grad():
        mean, _ = vae.encode(x)
    torch.testing.assert_close(vae.classes.means[0], mean[y == 0].mean(0), rtol=0, atol=0.7)  # sampled latents
    assert vae.classes.scale_trils.shape == (2, 3, 3)
    images = vae.sample(torch.tensor([0, 1, 1]))
    assert images.shape == (3, 1, 8, 8)
    assert images.min() >= 0
    assert images.max() <= 1


def test_growing_latents_and_classes_keeps_what_is_decoded() -> None:
    vae = GaussianVAE(small().trunk(), small().head.in_features, 3, 2, (1, 8, 8)).eval()
    z = torch.randn(4, 3)
    want, mean = vae.decode(z).detach(), vae.classes.means.clone()
    vae.grow_latent(2)
    vae.grow_classes(4)
    torch.testing.assert_close(vae.decode(torch.cat([z, torch.randn(4, 2)], 1)), want)
    assert torch.equal(vae.classes.means[:2, :3], mean)
    assert vae.sample(torch.tensor([3])).shape == (1, 1, 8, 8)
    assert vae.loss(torch.rand(5, 1, 8, 8), torch.tensor([0, 1, 2, 3, 0])).isfinite()


def test_new_filters_learn_and_old_ones_stay() -> None:
    net = small().eval()
    x, probe = torch.rand(200, 1, 8, 8), torch.rand(20, 1, 8, 8)
    want = net(probe).detach()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    found = learn_features(net, x, net.convolutions(), filters=2, steps=40)
    assert [f.layer for f in found] == net.convolutions()
    assert all(f.after < f.before for f in found)
    torch.testing.assert_close(net(probe), want)
    for name, old in before.items():
        new = net.state_dict()[name]
        corner = new[tuple(slice(size) for size in old.shape)]
        assert torch.equal(corner, old), name
    assert net.conv7.weight.shape == (6, 6, 3, 3)
    assert (net.norm7.running_mean[4:] != 0).all()
    assert not net.training


def test_outliers_ask_for_more_filters() -> None:
    old, new = torch.rand(100, 1, 8, 8) * 0.1, torch.rand(100, 1, 8, 8).round()
    net = small().eval()
    found = learn_features(net, new, ["conv1", "conv2"], filters=2, old=old, rounds=3, steps=5)
    assert len([f for f in found if f.layer == "conv1"]) == 3  # binary noise stays an outlier among dark images
    assert net.conv1.out_channels == 4 + 6
    same = learn_features(small().eval(), old, ["conv1"], filters=2, old=old, rounds=3, steps=5)
    assert len(same) == 1
    assert same[0].outliers <= 0.1
