"""What methods remember by: replay, exemplars, distillation, bridges, projections; each against its formula."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from fastcl.nn import (
    VAE,
    WGAN,
    Bridge,
    ConditionalVAE,
    Exemplars,
    Replay,
    compose,
    distillation,
    herd,
    layer_inputs,
    make_generator,
    project_onto_outputs,
    project_step,
)


def distances(features: Tensor, chosen: list[int]) -> np.ndarray:
    """iCaRL's algorithm 4 literally: how far the mean of the chosen and each sample is from mu; inf for the chosen."""
    phi = F.normalize(features.double(), dim=1)
    mean = phi.mean(0)
    found = [(mean - (phi[i] + phi[chosen].sum(0)) / (len(chosen) + 1)).norm().item() for i in range(len(phi))]
    return np.where(np.isin(np.arange(len(phi)), chosen), np.inf, found)


@settings(max_examples=30, deadline=None)
@given(n=st.integers(1, 25), d=st.integers(1, 6), seed=st.integers(0, 1000))
def test_herding_is_the_paper_s(n: int, d: int, seed: int) -> None:
    features = torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    found = herd(features, n).tolist()
    assert sorted(found) == list(range(n))
    for k in range(n):  # each step takes a nearest sample; of several, as with two samples, any
        apart = distances(features, found[:k])
        # squared, as herd compares: near the mean the root would magnify its rounding
        assert apart[found[k]] ** 2 <= apart.min() ** 2 + 1e-12


def test_herding_prefers_the_mean() -> None:
    torch.manual_seed(0)
    x = torch.randn(200, 8) + 1
    chosen, drawn = x[herd(x, 10)], x[:10]

    def off(part: Tensor) -> Tensor:
        return (F.normalize(part, dim=1).mean(0) - F.normalize(x, dim=1).mean(0)).norm()

    assert off(chosen) < 0.3 * off(drawn)
    with pytest.raises(ValueError, match="n is 201 but must be from 0 to the number of samples, 200"):
        herd(x, 201)


def test_exemplars_share_the_budget() -> None:
    stored = Exemplars(12)
    x, y = torch.arange(40.0).unsqueeze(1), torch.arange(40) % 2
    stored.add(x, y)
    first = stored.x.clone()
    assert [len(s) for s in stored.samples.values()] == [6, 6]
    stored.add(x, y + 2, features=torch.randn(40, 3))
    assert [len(s) for s in stored.samples.values()] == [3, 3, 3, 3]
    assert torch.equal(stored.x[:3], first[:3])  # the first chosen stay
    assert stored.y.tolist() == [0] * 3 + [1] * 3 + [2] * 3 + [3] * 3
    again = Exemplars(12)
    again.load_state_dict(stored.state_dict())
    assert torch.equal(again.x, stored.x)
    assert torch.equal(again.y, stored.y)
    a, b = stored.draw(7)
    assert a.shape == (7, 1)
    assert set(b.tolist()) <= {0, 1, 2, 3}
    with pytest.raises(ValueError, match="budget is -1"):
        Exemplars(-1)


def test_distillation_is_the_formula() -> None:
    torch.manual_seed(0)
    now, before = torch.randn(4, 5, dtype=torch.float64), torch.randn(4, 5, dtype=torch.float64)
    expected = 0.0
    for a, b in zip(now, before, strict=True):
        p = torch.exp(b[[1, 3]] / 2) / torch.exp(b[[1, 3]] / 2).sum()
        q = torch.exp(a[[0, 1, 3]] / 2) / torch.exp(a[[0, 1, 3]] / 2).sum()
        expected -= 4 * (p[0] * torch.log(q[1]) + p[1] * torch.log(q[2])) / 4
    torch.testing.assert_close(distillation(now, before, [1, 3], [0, 1, 3], 2.0), expected)
    x = now.clone().requires_grad_()
    distillation(x, before, [1, 3]).backward()
    assert (x.grad[:, [0, 2, 4]] == 0).all()
    for bad, message in (({"temperature": 0}, "temperature is 0"), ({"competing": [1]}, r"known has \[3\]")):
        with pytest.raises(ValueError, match=message):
            distillation(now, before, [1, 3], **bad)


@pytest.mark.parametrize("kind", ["vae", "cvae", "gan"])
def test_a_replay_s_snapshot_stays_while_the_generator_learns(kind: str) -> None:
    torch.manual_seed(0)
    replay = Replay(make_generator(kind, (1, 8, 8), 4, (16,), 4))
    assert isinstance(replay.generator, {"vae": VAE, "cvae": ConditionalVAE, "gan": WGAN}[kind])
    x, y = torch.rand(16, 1, 8, 8), torch.arange(16) % 2
    replay.begin_task([0, 1])
    with pytest.raises(RuntimeError, match="no earlier task"):
        replay.sample(3)
    replay.learn(x, y)
    replay.begin_task([2, 3])
    torch.manual_seed(3)
    before = replay.sample(6)
    weights = [p.detach().clone() for p in replay.generator.parameters()]
    replay.learn(x, y + 2, before, 0.5)
    torch.manual_seed(3)
    after = replay.sample(6)
    assert torch.equal(before[0], after[0])
    assert set(after[1].tolist()) <= ({0, 1} if kind == "cvae" else {0})
    assert not all(torch.equal(a, b) for a, b in zip(weights, replay.generator.parameters(), strict=True))
    again = Replay(make_generator(kind, (1, 8, 8), 4, (16,), 4))
    again.load_state_dict(replay.state_dict())
    torch.manual_seed(3)
    assert torch.equal(again.sample(6)[0], before[0])


def test_replay_refuses_bad_options() -> None:
    with pytest.raises(ValueError, match="critic_steps is 0"):
        Replay(VAE((1, 8, 8)), critic_steps=0)
    with pytest.raises(ValueError, match="generator is 'rbm' but must be one of vae, cvae, gan"):
        make_generator("rbm", (1, 8, 8), 4)


# ---- bridges ----


def test_an_affine_bridge_is_ridge_regression() -> None:
    rng = np.random.default_rng(0)
    z, target = rng.normal(size=(60, 5)) * [1, 2, 3, 0.1, 1] + 4, rng.normal(size=(60, 3))
    made = Bridge(5, 3).double().fit(torch.from_numpy(z), torch.from_numpy(target), ridge=0.1)
    a, b = z - z.mean(0), target - target.mean(0)
    penalty = 0.1 * (a**2).mean(0).mean() * len(z)
    weight = np.linalg.solve(a.T @ a + penalty * np.eye(5), a.T @ b).T
    np.testing.assert_allclose(made.affine.weight.detach(), weight, rtol=1e-9)
    np.testing.assert_allclose(made.affine.bias.detach(), target.mean(0) - weight @ z.mean(0), rtol=1e-9)


def test_a_chain_of_affine_bridges_is_one() -> None:
    torch.manual_seed(0)
    chain = [Bridge(6, 5).double(), Bridge(5, 4).double(), Bridge(4, 6).double()]
    x = torch.randn(9, 6, dtype=torch.float64)
    y = x
    for g in chain:
        y = g(y)
    torch.testing.assert_close(compose(chain).double()(x), y, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="must be affine"):
        compose([Bridge(3, 3, hidden=4)])


def test_a_bridge_with_a_hidden_layer_learns_what_is_not_affine() -> None:
    torch.manual_seed(0)
    z = torch.randn(400, 3)
    target = z.abs()
    affine, curved = Bridge(3, 3).fit(z, target), Bridge(3, 3, hidden=32).fit(z, target, steps=800, lr=1e-2)
    assert F.mse_loss(curved(z), target) < 0.2 * F.mse_loss(affine(z), target)


def test_bridges_refuse_bad_input() -> None:
    for z, target, ridge, message in (
        (torch.zeros(0, 3), torch.zeros(0, 3), 0.1, "at least 1"),
        (torch.zeros(2, 3), torch.zeros(3, 3), 0.1, "z has 2 samples and target 3"),
        (torch.zeros(2, 3), torch.zeros(2, 3), -1.0, "ridge is -1"),
    ):
        with pytest.raises(ValueError, match=message):
            Bridge(3, 3).fit(z, target, ridge)


# ---- projections ----


@settings(max_examples=40, deadline=None)
@given(n=st.integers(1, 12), width=st.integers(1, 12), outputs=st.integers(1, 5), seed=st.integers(0, 999))
def test_projection_is_the_formula_in_both_forms(n: int, width: int, outputs: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    delta, x = rng.normal(size=(outputs, width)), rng.normal(size=(n, width))
    eps = 0.01 * (x**2).sum() / n
    expected = delta @ (np.eye(width) - x.T @ np.linalg.solve(x @ x.T + eps * np.eye(n), x))
    found = project_onto_outputs(torch.from_numpy(delta), torch.from_numpy(x), eps=0.01)
    np.testing.assert_allclose(found, expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize(("ball", "order"), [("none", "fro"), ("frobenius", "fro"), ("spectral", 2)])
def test_outputs_move_by_the_radius_at_most(ball: str, order: str) -> None:
    torch.manual_seed(0)
    delta, x = torch.randn(6, 20, dtype=torch.float64), torch.randn(8, 20, dtype=torch.float64)
    radius = 0.0 if ball == "none" else 1.5
    kept = project_onto_outputs(delta, x, 1e-10, ball, radius)
    moved = torch.linalg.matrix_norm(kept @ x.T, ord=order).item()
    assert moved == pytest.approx(radius, abs=1e-5)
    # a change within the ball is left as it is
    small = delta * (0.01 / torch.linalg.matrix_norm(delta @ x.T).item())
    within = project_onto_outputs(small, x, 1e-10, ball, radius)
    assert torch.allclose(within, small, atol=1e-9) == (ball != "none")
    # what is orthogonal to the inputs is untouched
    free = delta - delta @ torch.linalg.pinv(x) @ x
    torch.testing.assert_close(project_onto_outputs(free, x, 1e-10, ball, radius), free)


def test_a_projected_step_keeps_the_outputs_of_linear_and_convolution() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 6, 3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 9, 5)).double()
    images = torch.randn(2, 2, 6, 6, dtype=torch.float64)
    said = model(images).detach()
    inputs = layer_inputs(model, images)
    assert inputs["0"].shape == (2 * 9, 2 * 9 + 1)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p))
    assert (model(images) - said).abs().max() > 0.5
    project_step(model, before, inputs, eps=1e-12)
    torch.testing.assert_close(model(images), said, atol=1e-5, rtol=1e-5)
    assert any((p - before[n]).abs().max() > 0.1 for n, p in model.named_parameters())


def test_projections_refuse_bad_input() -> None:
    delta, x = torch.zeros(2, 3), torch.zeros(4, 3)
    for arguments, message in (
        ((delta, torch.zeros(4, 2)), r"inputs has shape \[4, 2\] but must be \[n, 3\]"),
        ((delta, x, 0.0), "eps is 0"),
        ((delta, x, 1e-3, "cube"), "ball is 'cube'"),
        ((delta, x, 1e-3, "spectral", -1.0), "radius -1"),
    ):
        with pytest.raises(ValueError, match=message):
            project_onto_outputs(*arguments)
    assert torch.equal(project_onto_outputs(delta + 1, x), delta + 1)  # inputs of zeros move no output
    with pytest.raises(ValueError, match="1 is a BatchNorm1d but only Linear and Conv2d"):
        layer_inputs(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)), x)
