from __future__ import annotations

import math

import pytest
import torch

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
