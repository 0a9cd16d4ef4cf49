from __future__ import annotations

import math

import pytest
import torch

import fastcl
from fastcl import ops


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


def test_bad_input() -> None:
    e = torch.randn(4)
    for scale in (-1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="scale is"):
            ops.annealed_mask(e, scale)
    with pytest.raises(ValueError, match="embedding must be float32"):
        ops.annealed_mask(e.int(), 1.0)
    with pytest.raises(TypeError):
        ops.annealed_mask("e", 1.0)
    with pytest.raises(TypeError):
        ops.annealed_mask(e, "1")


def test_is_an_op() -> None:
    e = torch.randn(4)
    torch.testing.assert_close(torch.ops.fastcl.annealed_mask(e, 2.0), fastcl.ops.annealed_mask(e, 2.0))
