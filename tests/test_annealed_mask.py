from __future__ import annotations

import math

import pytest
import torch

import fastcl
from fastcl import ops

from .samples import FLOATS, LAYOUTS, WIDTHS

ROUNDING = {torch.float32: 1e-6, torch.float64: 1e-14, torch.bfloat16: 2**-8 * 1.01, torch.float16: 2**-11 * 1.01}


def test_literal_gradient_of_many_is_that_of_each() -> None:
    """The one loop that the catalogue's table has only small samples of: 1 - m rounds, as in the authors' code."""
    g, e = torch.randn(2, 64 * 640)
    op = torch.ops.fastcl.compensated_mask_backward
    pieces = [op(a, b, 3.0, 7.0, True) for a, b in zip(g.split(640), e.split(640), strict=True)]
    assert torch.equal(op(g, e, 3.0, 7.0, True), torch.cat(pieces))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_mask_and_gradient_of_every_width(dtype: torch.dtype) -> None:
    for n in WIDTHS:
        e = torch.randn(n).to(dtype).requires_grad_()
        upstream = torch.randn(n).to(dtype)
        m = ops.annealed_mask(e, 3.0)
        (grad,) = torch.autograd.grad(m, e, upstream)
        assert m.dtype == grad.dtype == dtype
        x = 3.0 * e.detach().double()
        want, slope = torch.sigmoid(x), 3.0 * torch.sigmoid(x) * torch.sigmoid(-x)  # 1 - m would cancel
        tiny = 1e-7 if dtype == torch.float16 else 1e-30  # denormal halves have fewer digits
        torch.testing.assert_close(m.detach().double(), want, rtol=ROUNDING[dtype], atol=tiny)
        torch.testing.assert_close(grad.double(), upstream.double() * slope, rtol=3 * ROUNDING[dtype], atol=tiny)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_mask_lies_in_memory_as_torch_would_lay_it(layout: str) -> None:
    e = LAYOUTS[layout](torch.randn(3, 4, 5, 6)).requires_grad_()
    m = ops.annealed_mask(e, 2.0)
    (grad,) = torch.autograd.grad(m.sum(), e)
    assert m.stride() == grad.stride() == torch.empty_like(e).stride()
    torch.testing.assert_close(m, torch.sigmoid(2.0 * e))


@pytest.mark.parametrize("scale", [0.0, 0.01, 1.0, 7.5])
def test_gradcheck_twice(scale: float) -> None:
    e = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda e: ops.annealed_mask(e, scale), e)
    assert torch.autograd.gradgradcheck(lambda e: ops.annealed_mask(e, scale), e)


def test_accurate_over_the_whole_range() -> None:
    for dtype, tolerance in ((torch.float32, 4e-7), (torch.float64, 1e-15)):
        x = torch.linspace(-85, 85, 200_001, dtype=dtype)
        want = torch.sigmoid(x.double())
        assert ((ops.annealed_mask(x, 1.0).double() - want).abs() / want).max() < tolerance


def test_limits_and_nan() -> None:
    e = torch.tensor([-math.inf, -1e30, 0.0, 1e30, math.inf, math.nan])
    got = ops.annealed_mask(e, 400.0)
    assert got[:2].max() < 1e-37
    assert got[2:5].tolist() == [0.5, 1.0, 1.0]
    assert got[5].isnan()


def test_gradient_survives_where_the_mask_rounds_to_one() -> None:
    """1 - m is 0 in float32 from s e = 17 on; m (1 - m) is not."""
    e = torch.tensor([0.05, 0.1, -0.1], requires_grad=True)
    ops.annealed_mask(e, 400.0).sum().backward()
    x = 400 * e.detach().double()
    want = 400 * torch.exp(-x.abs()) / (1 + torch.exp(-x.abs())) ** 2
    torch.testing.assert_close(e.grad.double(), want, rtol=1e-5, atol=0)
    assert (e.grad > 0).all()


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_slope_is_even_and_right_on_both_saturated_sides(dtype: torch.dtype) -> None:
    """Up to |s e| = 80, far beyond the 17 (float32) or 37 (float64) from which m (1 - m) is 0 in m's own digits."""
    e = torch.linspace(-0.1, 0.1, 41).to(dtype).requires_grad_()
    (slope,) = torch.autograd.grad(ops.annealed_mask(e, 800.0).sum(), e)
    x = 800.0 * e.detach().double()
    want = (800 * torch.exp(-x.abs()) / (1 + torch.exp(-x.abs())) ** 2).to(dtype)
    torch.testing.assert_close(slope, want, rtol=2 * max(ROUNDING[dtype], 5e-6), atol=1e-7 * (dtype == torch.float16))


def test_double_backward_of_the_backward_op() -> None:
    grad, e = (torch.randn(4, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    backward = torch.ops.fastcl.annealed_mask_backward.default
    assert torch.autograd.gradcheck(lambda g, e: backward(g, e, 2.5), (grad, e))
    assert torch.autograd.gradgradcheck(lambda g, e: backward(g, e, 2.5), (grad, e))


def test_third_derivative() -> None:
    e = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    d: torch.Tensor = ops.annealed_mask(e, 2.0)
    for _ in range(3):
        (d,) = torch.autograd.grad(d, e, create_graph=True)
    m = torch.sigmoid(2 * e.detach())
    torch.testing.assert_close(d.detach(), 8 * m * (1 - m) * (1 - 6 * m + 6 * m**2))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rounds_once(dtype: torch.dtype) -> None:
    e = torch.randn(1000).to(dtype)
    assert torch.equal(ops.annealed_mask(e, 3.0), torch.sigmoid(3.0 * e.float()).to(dtype))


def test_vmap() -> None:
    e = torch.randn(4, 6)
    scales_same = torch.vmap(lambda row: ops.annealed_mask(row, 2.0))(e)
    torch.testing.assert_close(scales_same, ops.annealed_mask(e, 2.0))
    by_columns = torch.vmap(lambda column: ops.annealed_mask(column, 2.0), in_dims=1, out_dims=1)(e)
    torch.testing.assert_close(by_columns, ops.annealed_mask(e, 2.0))


def test_vmap_of_the_gradient() -> None:
    e = torch.randn(6, requires_grad=True)
    m = ops.annealed_mask(e, 2.0)
    (rows,) = torch.autograd.grad(m, e, torch.eye(6), is_grads_batched=True)
    torch.testing.assert_close(rows, torch.diag(2 * m * (1 - m)).detach())


@pytest.mark.parametrize("scale", [-1.0, -1e-300, math.nan, math.inf])
def test_bad_scale(scale: float) -> None:
    e = torch.randn(4)
    for call in (ops.annealed_mask, lambda e, s: torch.ops.fastcl.annealed_mask_backward(e, e, s)):
        with pytest.raises((ValueError, RuntimeError), match=r"scale is .* but must be finite and not negative"):
            call(e, scale)
    with pytest.raises(ValueError, match="scale is"):
        ops.annealed_mask(e, scale)


def test_bad_input() -> None:
    e = torch.randn(4)
    for wrong in (torch.int32, torch.bool, torch.complex64, torch.float8_e4m3fn):
        with pytest.raises(ValueError, match="embedding must be float32, float64, bfloat16 or float16"):
            ops.annealed_mask(e.to(wrong), 1.0)
    with pytest.raises(TypeError, match="embedding"):
        ops.annealed_mask("e", 1.0)
    with pytest.raises(TypeError, match="embedding"):
        ops.annealed_mask(None, 1.0)
    with pytest.raises(TypeError, match="scale"):
        ops.annealed_mask(e, "1")


def test_is_an_op() -> None:
    e = torch.randn(4)
    torch.testing.assert_close(torch.ops.fastcl.annealed_mask(e, 2.0), fastcl.ops.annealed_mask(e, 2.0))
