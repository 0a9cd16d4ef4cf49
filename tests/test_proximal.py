from __future__ import annotations

import math

import pytest
import torch

import fastcl
from fastcl import ops

from .samples import FLOATS, LAYOUTS, WIDTHS


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_is_the_formula_for_every_width(dtype: torch.dtype) -> None:
    weights = [torch.randn(n).to(dtype) for n in WIDTHS]
    wide = torch.promote_types(dtype, torch.float32)
    want = [(w.to(wide).sign() * (w.to(wide).abs() - 0.5).clamp(min=0)).to(dtype) for w in weights]
    ops.soft_threshold_(weights, 0.5)
    assert all(torch.equal(a, b) for a, b in zip(weights, want, strict=True))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_memory_order_does_not_matter(layout: str) -> None:
    w = LAYOUTS[layout](torch.randn(3, 4, 5, 6))
    want, strides = torch.nn.functional.softshrink(w, 0.5), w.stride()
    ops.soft_threshold_([w], 0.5)
    assert torch.equal(w, want)
    assert w.stride() == strides


def test_is_the_proximal_operator() -> None:
    """argmin_w 1/2 (w - v)^2 + t |w|, against a fine grid."""
    v = torch.linspace(-2, 2, 41, dtype=torch.float64)
    grid = torch.linspace(-3, 3, 60_001, dtype=torch.float64)
    best = grid[(0.5 * (grid[:, None] - v).square() + 0.7 * grid[:, None].abs()).argmin(0)]
    w = v.clone()
    ops.soft_threshold_([w], 0.7)
    torch.testing.assert_close(w, best, rtol=0, atol=1e-4)


def test_special_values() -> None:
    w = torch.tensor([math.nan, math.inf, -math.inf, 0.5, -0.5, 0.0])
    ops.soft_threshold_([w], 0.5)
    assert w[0].isnan()
    assert w[1:].tolist() == [math.inf, -math.inf, 0.0, 0.0, 0.0]
    w = torch.tensor([3.0, -1e30])
    ops.soft_threshold_([w], math.inf)
    assert w.tolist() == [0.0, 0.0]


def test_zero_threshold_keeps_values() -> None:
    w = torch.randn(100)
    before = w.clone()
    ops.soft_threshold_([w], 0.0)
    assert torch.equal(w, before)


@pytest.mark.parametrize("threshold", [-1.0, -math.inf, math.nan])
def test_bad_threshold(threshold: float) -> None:
    w = torch.ones(3)
    with pytest.raises(ValueError, match="threshold is"):
        ops.soft_threshold_([w], threshold)
    assert w.tolist() == [1.0] * 3


def test_bad_tensors() -> None:
    w = torch.ones(6)
    with pytest.raises(ValueError, match=r"tensors\[1\] must be float32"):
        ops.soft_threshold_([w, torch.ones(3, dtype=torch.int64)], 0.5)
    with pytest.raises(TypeError, match=r"tensors\[1\].*NoneType"):
        ops.soft_threshold_([w, None], 0.5)
    with pytest.raises(TypeError, match="tensors"):
        ops.soft_threshold_(w, 0.5)
    with pytest.raises(TypeError, match="threshold"):
        ops.soft_threshold_([w], None)
    with pytest.raises(ValueError, match=r"tensors\[1\] shares memory with tensors\[0\]"):
        ops.soft_threshold_([w[:4], w[3:]], 0.5)
    assert w.tolist() == [1.0] * 6


# ---- groups ----


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dim", [0, 1])
def test_groups_in_any_memory_order(layout: str, dim: int) -> None:
    w = LAYOUTS[layout](torch.randn(6, 4, 5, 3))
    others = [d for d in range(4) if d != dim]
    norm = w.double().square().sum(others, keepdim=True).sqrt()
    t = norm.median().item()
    want = (w.double() * (1 - t / norm).clamp(min=0)).float()
    strides = w.stride()
    ops.group_soft_threshold_([w], t, dim)
    torch.testing.assert_close(w, want)
    assert w.stride() == strides
    assert (w.abs().sum(others) == 0).sum() > 0  # whole groups are gone


def test_group_step_is_the_proximal_operator() -> None:
    """The minimum of 1/2 ||w - v||^2 + t ||w||, by its optimality conditions."""
    v = torch.randn(3, 4, dtype=torch.float64)
    v[0] *= 0.01
    w = v.clone()
    ops.group_soft_threshold_([w], 0.5, 0)
    assert (w[0] == 0).all()
    assert v[0].norm() <= 0.5
    slope = w[1:] - v[1:] + 0.5 * w[1:] / w[1:].norm(dim=1, keepdim=True)
    torch.testing.assert_close(slope, torch.zeros_like(slope), rtol=0, atol=1e-12)


def test_group_special_values() -> None:
    w = torch.tensor([[math.nan, 1.0], [0.0, 0.0], [3.0, 4.0]])
    ops.group_soft_threshold_([w], 0.0, 0)
    assert w[0].isnan().all()
    assert w[1:].tolist() == [[0.0, 0.0], [3.0, 4.0]]
    ops.group_soft_threshold_([w], math.inf, 0)
    assert w[1:].tolist() == [[0.0, 0.0], [0.0, 0.0]]
    with pytest.raises(ValueError, match="dim is 2"):
        ops.group_soft_threshold_([w], 1.0, 2)


def test_drift_norms() -> None:
    a, b = torch.randn(7, 5, 3), torch.randn(7, 5, 3)
    rows, columns = ops.drift_norms([a], [b], 0)[0], ops.drift_norms([a], [b], 1)[0]
    torch.testing.assert_close(rows, torch.linalg.vector_norm(a - b, dim=(1, 2)))
    torch.testing.assert_close(columns, torch.linalg.vector_norm(a - b, dim=(0, 2)))
    assert ops.drift_norms([a], [a], 0)[0].eq(0).all()


# ---- after an optimizer's steps ----


def test_proximal_finds_the_lasso() -> None:
    """min 1/2 |X w - y|^2 + mu |w|: zero where the minimum is zero, by the optimality conditions."""
    torch.manual_seed(3)
    x, y = torch.randn(50, 8, dtype=torch.float64), torch.randn(50, dtype=torch.float64)
    w = torch.nn.Parameter(torch.zeros(8, dtype=torch.float64))
    optimizer = torch.optim.SGD([w], 1e-3)
    fastcl.optim.proximal(optimizer, l1=8.0)
    for _ in range(4000):
        optimizer.zero_grad()
        (0.5 * (x @ w - y).square().sum()).backward()
        optimizer.step()
    slope = (x.T @ (x @ w - y)).detach()
    zero = w.detach() == 0
    assert 0 < zero.sum() < 8
    assert (slope[zero].abs() <= 8.0).all()
    torch.testing.assert_close(slope[~zero], -8.0 * w.detach()[~zero].sign(), rtol=0, atol=1e-6)


def test_proximal_leaves_reserved_weights_alone() -> None:
    w, b = torch.nn.Parameter(torch.randn(6, 4)), torch.nn.Parameter(torch.randn(6))
    r = torch.rand(6, 4) > 0.5
    optimizer = fastcl.optim.MaskedAdam([w, b], 0.1, reserved={w: r})
    term = fastcl.optim.proximal(optimizer, l1={w: 5.0}, group={w: 5.0})
    before, bias = w.detach().clone(), b.detach().clone()
    w.grad, b.grad = torch.zeros_like(w), torch.zeros_like(b)
    optimizer.step()
    assert torch.equal(w.detach()[r], before[r])
    assert (w.detach()[~r].abs() < before[~r].abs()).all()
    assert torch.equal(b.detach(), bias)
    term.remove()
    now = w.detach().clone()
    optimizer.step()
    assert torch.equal(w.detach(), now)


def test_proximal_bad_input() -> None:
    w = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([w], 0.1)
    for arguments, match in (
        ({"l1": -1.0}, "l1 is"),
        ({"l1": {torch.ones(3): 1.0}}, "not one of"),
        ({"group": {w: 1.0}}, "not one of"),
        ({"l1": {w: math.nan}}, "l1 is"),
    ):
        with pytest.raises(ValueError, match=match):
            fastcl.optim.proximal(optimizer, **arguments)
