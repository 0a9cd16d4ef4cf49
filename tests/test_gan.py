"""Generators, discriminators and their losses, against formulas written out."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastcl.nn import (
    DCGAN,
    VAE,
    WGAN,
    ConditionalBatchNorm2d,
    ConditionalVAE,
    Discriminator,
    DynamicGenerator,
    FeatureCritic,
    FeatureGenerator,
    critic_loss,
    fixed_statistics,
    frozen,
    mixed,
)
from fastcl.nn.precision import has_fast_bfloat16
from fastcl.optim import MaskedAdam


@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 28, 28), (3, 32, 32), (1, 9, 12)])
def test_every_network_makes_and_takes_images_of_the_shape(shape: tuple[int, int, int]) -> None:
    y = torch.tensor([0, 2, 1])
    memory = DynamicGenerator(shape, 3, width=2, latent=8)
    memory.begin_task([0, 1, 2])
    vae = ConditionalVAE(shape, 3, (16,), 4)
    for made in (DCGAN(shape, 3, 2, 8).sample(y), memory.generate(y), vae.sample(y), WGAN(shape, 2, 2).sample(3)):
        assert made.shape == (3, *shape)
        assert made.min() >= 0
        assert made.max() <= 1
    critic, logits = Discriminator(shape, 3, 2).judge(torch.rand(3, *shape))
    assert critic.shape == (3,)
    assert logits.shape == (3, 3)


@pytest.mark.parametrize("shape", [(28, 28), (1, 4, 4), (0, 28, 28)])
def test_generators_refuse_other_shapes(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="must be \\(channels, height, width\\)"):
        DCGAN(shape)


def test_the_sizes_are_the_paper_s() -> None:
    """MNIST: 80 + 40 + 20 = 140 channels in DGMa, a discriminator of 32, 64, 128 with 2048 features."""
    memory = DynamicGenerator((1, 28, 28), 10, "unit", width=20)
    assert memory.channels == [80, 40, 20]
    assert [tuple(layer.weight.shape) for layer in memory.layers] == [(128, 80, 4, 4), (80, 40, 4, 4), (40, 20, 4, 4)]
    assert DynamicGenerator((1, 28, 28), 10).channels == [24, 12, 6]
    judge = Discriminator((1, 28, 28), 10)
    assert [m.out_channels for m in judge.trunk if isinstance(m, nn.Conv2d)] == [32, 64, 128]
    assert sum(isinstance(m, nn.BatchNorm2d) for m in judge.trunk) == 2
    assert judge.critic.in_features == judge.classes.in_features == 2048


def test_conditional_batch_norm_is_batch_norm_with_the_class_s_own_scale() -> None:
    norm, x, y = ConditionalBatchNorm2d(5, 3), torch.randn(6, 5, 4, 4), torch.tensor([0, 1, 2, 2, 1, 0])
    plain = F.batch_norm(x, None, None, training=True)
    expected = plain * norm.scale.weight[y][:, :, None, None] + norm.shift.weight[y][:, :, None, None]
    torch.testing.assert_close(norm(x, y), expected)


@pytest.mark.parametrize(("unit", "penalty"), [(0.5, 1.0), (1.0, 10.0)])
def test_critic_loss_is_the_formula(unit: float, penalty: float) -> None:
    """Sample by sample in float64; the gradient penalty's gradient against finite differences."""
    torch.manual_seed(0)
    critic = FeatureCritic(6, 3, 8).double()
    real, fake = torch.randn(5, 6, dtype=torch.float64), torch.randn(5, 6, dtype=torch.float64)

    def loss() -> Tensor:
        torch.manual_seed(1)
        return critic_loss(critic, real, fake, penalty, unit)

    torch.manual_seed(1)
    share = torch.rand(5, 1, dtype=torch.float64)
    norms = []
    for i in range(5):
        x = (real[i] + share[i] * (fake[i] - real[i])).requires_grad_()
        (slope,) = torch.autograd.grad(critic.value(x[None])[0], x)
        norms.append((unit * slope).norm())
    expected = critic.value(fake).mean() - critic.value(real).mean()
    expected = expected + penalty * (torch.stack(norms) - 1).square().mean()
    torch.testing.assert_close(loss(), expected)
    weight = critic.trunk[0].weight
    (found,) = torch.autograd.grad(loss(), weight)
    for i, j in ((0, 0), (3, 2), (7, 5)):
        with torch.no_grad():
            ends = []
            for step in (1e-6, -1e-6):
                weight[i, j] += step
                with torch.enable_grad():
                    ends.append(loss().item())
                weight[i, j] -= step
        assert found[i, j].item() == pytest.approx((ends[0] - ends[1]) / 2e-6, rel=1e-4, abs=1e-7)


def test_critic_loss_refuses_what_does_not_fit() -> None:
    critic = FeatureCritic(4, 2, 8)
    with pytest.raises(ValueError, match=r"fake has shape \[2, 4\] but must have real's, \[3, 4\]"):
        critic_loss(critic, torch.zeros(3, 4), torch.zeros(2, 4), 1.0)
    with pytest.raises(ValueError, match="penalty is -1"):
        critic_loss(critic, torch.zeros(3, 4), torch.zeros(3, 4), -1)


def test_mixed_is_what_it_is_asked_to_be() -> None:
    x, cpu = torch.ones(2, 2), torch.device("cpu")
    found = {}
    for precision in ("auto", "float32", "bfloat16"):
        with mixed(cpu, precision):
            found[precision] = (x @ x).dtype
    assert (found["float32"], found["bfloat16"]) == (torch.float32, torch.bfloat16)
    assert found["auto"] == (torch.bfloat16 if has_fast_bfloat16(cpu) else torch.float32)
    with pytest.raises(ValueError, match="precision is 'half' but must be one of auto, float32, bfloat16"):
        mixed(cpu, "half")


def test_networks_give_float32_in_bfloat16() -> None:
    """Losses and their reductions are float32, and near float32's own; gradients arrive in float32."""
    torch.manual_seed(0)
    x, y = torch.rand(64, 1, 8, 8), torch.tensor([0, 1, 1, 2]).repeat(16)
    judge, dcgan = Discriminator((1, 8, 8), 3, 4), DCGAN((1, 8, 8), 3, 4, 8)
    vae = ConditionalVAE((1, 8, 8), 3, (16,), 4)
    memory = DynamicGenerator((1, 8, 8), 3, width=4, latent=8)
    memory.begin_task([0, 1, 2])
    z = torch.randn(64, 8)
    for loss in (
        lambda: critic_loss(judge, x, 1 - x, 1.0),
        lambda: dcgan(z, y).square().mean(),
        lambda: memory(z).square().mean(),
        lambda: vae.loss(x, y),
    ):
        values = []
        for precision in ("float32", "bfloat16"):
            torch.manual_seed(0)
            with mixed(torch.device("cpu"), precision):
                value = loss()
            value.backward()
            values.append(value)
        assert values[0].dtype == values[1].dtype == torch.float32
        assert values[1].item() == pytest.approx(values[0].item(), rel=0.05, abs=0.05)
        assert values[1].item() != values[0].item()
    grads = [p.grad for m in (judge, dcgan, vae, memory) for p in m.parameters() if p.grad is not None]
    assert grads
    assert all(g.dtype == torch.float32 for g in grads)


def test_statistics_and_gradients_are_left_alone() -> None:
    judge, x = Discriminator((1, 8, 8), 2, 4), torch.rand(4, 1, 8, 8)
    before = copy.deepcopy(judge.state_dict())
    with fixed_statistics(judge), frozen(judge):
        value = judge.value(x.requires_grad_())
    value.sum().backward()
    assert x.grad is not None
    assert all(p.grad is None and p.requires_grad for p in judge.parameters())
    assert all(torch.equal(a, b) for a, b in zip(before.values(), judge.state_dict().values(), strict=True))
    judge.value(x)  # outside, they follow
    assert not torch.equal(before["trunk.3.running_mean"], judge.state_dict()["trunk.3.running_mean"])


def test_a_conditional_vae_learns_to_make_what_it_is_asked_for() -> None:
    torch.manual_seed(0)
    vae = ConditionalVAE((1, 4, 4), 2, (32,), 4)
    optimizer = torch.optim.Adam(vae.parameters(), 1e-2)
    y = torch.arange(64) % 2
    x = y.float()[:, None, None, None].expand(64, 1, 4, 4) * 0.8 + 0.1
    for _ in range(100):
        optimizer.zero_grad()
        vae.loss(x, y).backward()
        optimizer.step()
    assert vae.sample(torch.tensor([0] * 20)).mean() < 0.25
    assert vae.sample(torch.tensor([1] * 20)).mean() > 0.75


def test_beta_weighs_the_divergence() -> None:
    torch.manual_seed(0)
    x = torch.rand(3, 1, 4, 4)
    losses = []
    for beta in (0.0, 1.0, 2.0):
        torch.manual_seed(1)
        vae = VAE((1, 4, 4), (8,), 2, beta)
        losses.append(vae.loss(x).item())
    assert losses[2] - losses[1] == pytest.approx(losses[1] - losses[0], rel=1e-4)
    with pytest.raises(ValueError, match="beta is -1"):
        VAE((1, 4, 4), beta=-1)


# ---- DGM's generator ----


def learned(memory: DynamicGenerator, classes: list[int], steps: int = 12) -> list[int]:
    """A task with drawn gradients: half of the masks end up on."""
    memory.begin_task(classes)
    chained = itertools.chain(
        memory.layers.parameters(), memory.norms[-1].parameters(), memory.outputs[-1].parameters()
    )
    optimizer = MaskedAdam(chained, 0.02, weight_decay=1e-3, reserved=memory.reserved())
    y = torch.tensor(classes).repeat(4)
    for s in range(steps):
        memory.set_scale(1.0 + s)
        optimizer.zero_grad()
        goal = (0.1 + 0.8 * (y % 2))[:, None, None, None].expand(-1, *memory.input_shape)
        (F.mse_loss(memory(memory.latents(y)), goal) + 0.1 * memory.sparsity()).backward()
        optimizer.step()
    with torch.no_grad():
        for layer in memory.layers:
            flat = layer.embedding.normal_().view(-1)
            flat[: len(flat) // 2] = 1.0  # with few masks on, images are grey
    return memory.end_task()


@pytest.mark.parametrize("position", ["activation", "pre_norm"])
@pytest.mark.parametrize("mask", ["weight", "unit"])
def test_an_old_task_s_images_stay_to_the_bit(mask: str, position: str) -> None:
    """Through later training with weight decay and stale moments, growth, and a saved and loaded state."""
    torch.manual_seed(0)
    memory = DynamicGenerator((1, 28, 28), 6, mask, width=3, latent=16, mask_position=position)
    y = torch.tensor([0, 1, 1, 0, 0])
    grown = [learned(memory, [0, 1])]
    first = memory.generate(y, torch.Generator().manual_seed(5))
    assert first.unique().numel() > 100
    images = [first]
    for t in (1, 2):
        grown.append(learned(memory, [2 * t, 2 * t + 1]))
        images.append(memory.generate(y, torch.Generator().manual_seed(5)))
    assert all(torch.equal(first, again) for again in images)
    assert any(sum(added) > 0 for added in grown)
    assert not torch.equal(memory.generate(y + 2, torch.Generator().manual_seed(5)), first)
    fresh = DynamicGenerator((1, 28, 28), 6, mask, width=3, latent=16, mask_position=position)
    fresh.load_shape(memory.shape_state())
    fresh.load_state_dict(memory.state_dict())
    assert torch.equal(fresh.generate(y, torch.Generator().manual_seed(5)), first)


def test_the_network_grows_by_what_was_reserved() -> None:
    torch.manual_seed(1)
    weights = DynamicGenerator((1, 28, 28), 4, "weight", width=3, latent=16)
    free = [layer.weight.numel() for layer in weights.layers]
    for t in range(3):
        learned(weights, [t])
        now = [round(layer._free_share()[1]) for layer in weights.layers]
        # never less free than at first, and less than a channel more
        for before, after, layer in zip(free, now, weights.layers, strict=True):
            n_in, _, *kernel = layer.weight.shape
            assert after >= before or layer is weights.layers[0]
            assert after >= before - n_in * kernel[0] * kernel[1]
    units = DynamicGenerator((1, 28, 28), 4, "unit", width=3, latent=16)
    for t in range(3):
        before = [int(layer.reserved().sum()) for layer in units.layers]
        widths = units.channels
        added = learned(units, [t])
        now = [int(layer.reserved().sum()) for layer in units.layers]
        assert added == [b - a for a, b in zip(before, now, strict=True)]
        assert units.channels == [w + a for w, a in zip(widths, added, strict=True)]


def test_latents_carry_the_class() -> None:
    memory = DynamicGenerator((1, 8, 8), 3, width=2, latent=5)
    z = memory.latents(torch.tensor([2, 0]))
    assert z[:, :3].tolist() == [[0, 0, 1], [1, 0, 0]]
    assert (z[:, 3:] != 0).all()


def test_the_dynamic_generator_refuses_bad_input() -> None:
    memory = DynamicGenerator((1, 8, 8), 3, width=2, latent=5)
    memory.begin_task([0])
    with pytest.raises(ValueError, match="classes has 0 but must be new and below 3"):
        memory.begin_task([0])
    with pytest.raises(ValueError, match="y has the class 2, which no task has brought"):
        memory.generate(torch.tensor([0, 2]))
    with pytest.raises(ValueError, match="mask_position is 'late'"):
        DynamicGenerator((1, 8, 8), 3, mask_position="late")
    with pytest.raises(ValueError, match="n_classes is 9 but must be from 1 to latent, 5"):
        DynamicGenerator((1, 8, 8), 9, latent=5)
    with pytest.raises(ValueError, match="must be new"):
        memory.load_shape(memory.shape_state())


def test_feature_networks() -> None:
    z = FeatureGenerator(7, 3, 8, 4).sample(torch.tensor([0, 2]))
    assert z.shape == (2, 7)
    assert (z >= 0).all()
    value, logits = FeatureCritic(7, 3, 8).judge(z)
    assert value.shape == (2,)
    assert logits.shape == (2, 3)
