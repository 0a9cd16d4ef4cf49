from __future__ import annotations

import math

import pytest
import torch

import fastcl

from .samples import FLOATS, LAYOUTS, WIDTHS

UNIT = {torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float32: 2e-7, torch.float64: 1e-15}


@pytest.mark.parametrize("mask", [torch.bool, *FLOATS], ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_is_the_product_for_every_pair_of_dtypes(dtype: torch.dtype, mask: torch.dtype) -> None:
    grads = [torch.randn(n).to(dtype) for n in WIDTHS]
    reserved = [torch.rand(n).mul(0.9).to(mask) if mask.is_floating_point else torch.rand(n) > 0.5 for n in WIDTHS]
    want = [g.double() * (1 - r.double()) for g, r in zip(grads, reserved, strict=True)]
    fastcl.ops.masked_grad_(grads, reserved)
    for g, w in zip(grads, want, strict=True):
        torch.testing.assert_close(g.double(), w, rtol=1.01 * UNIT[dtype], atol=1e-7 * (dtype == torch.float16))


@pytest.mark.parametrize("mask", [torch.bool, *FLOATS], ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_protected_is_exactly_zero_whatever_the_gradient(dtype: torch.dtype, mask: torch.dtype) -> None:
    g = torch.tensor([math.inf, -math.inf, math.nan, 3.0, -3.0] * 7).to(dtype)
    fastcl.ops.masked_grad_([g], [torch.ones(35).to(mask)])
    assert g.tolist() == [0.0] * 35


@pytest.mark.parametrize("mask_layout", LAYOUTS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_mask_may_lie_otherwise_in_memory(layout: str, mask_layout: str) -> None:
    g, r = LAYOUTS[layout](torch.randn(3, 4, 5, 6)), LAYOUTS[mask_layout](torch.rand(3, 4, 5, 6) > 0.5)
    want, strides = g.masked_fill(r, 0), g.stride()
    fastcl.ops.masked_grad_([g], [r])
    assert torch.equal(g, want)
    assert g.stride() == strides


def test_writes_only_its_own_elements() -> None:
    """A gradient with gaps is worked on in a copy: what lies between its elements stays."""
    base = torch.full((4, 6), 7.0)
    fastcl.ops.masked_grad_([base[:, 1:5:2]], [torch.ones(4, 2, dtype=torch.bool)])
    assert base.tolist() == [[7, 0, 7, 0, 7, 7]] * 4


def test_free_keeps_every_bit() -> None:
    g = torch.tensor([math.inf, -0.0, math.nan, 1e-45, -3.0])
    before = g.clone()
    fastcl.ops.masked_grad_([g], [torch.zeros(5, dtype=torch.bool)])
    assert torch.equal(g.view(torch.int32), before.view(torch.int32))


def test_soft_mask_scales() -> None:
    g = torch.tensor([2.0, 2.0, 2.0])
    fastcl.ops.masked_grad_([g], [torch.tensor([0.0, 0.25, 0.5])])
    assert g.tolist() == [2.0, 1.5, 1.0]


def test_empty_list_and_many_tensors() -> None:
    fastcl.ops.masked_grad_([], [])
    grads = [torch.ones(n) for n in range(300)]
    fastcl.ops.masked_grad_(grads, [torch.arange(n) % 2 == 0 for n in range(300)])
    assert all(torch.equal(g, (torch.arange(len(g)) % 2).float()) for g in grads)


BAD = {
    "lengths": (lambda g: ([g], []), ValueError, "reserved has 0 tensors but must have as many as grads, 1"),
    "shape": (lambda g: ([g], [torch.zeros(3)]), ValueError, r"reserved\[0\] has shape \[3\] but must .* \[4\]"),
    "dtype": (lambda g: ([g], [torch.zeros(4, dtype=torch.int32)]), ValueError, r"reserved\[0\] must be bool, float32"),
    "integer gradient": (lambda g: ([g.int()], [torch.zeros(4)]), ValueError, r"grads\[0\] must be float32"),
    "above 1": (lambda g: ([g], [torch.full((4,), 1.5)]), ValueError, r"reserved\[0\] has values outside \[0, 1\]"),
    "below 0": (lambda g: ([g], [torch.full((4,), -0.5)]), ValueError, r"reserved\[0\] has values outside \[0, 1\]"),
    "NaN": (lambda g: ([g], [torch.full((4,), math.nan)]), ValueError, "or NaN"),
    "second": (lambda g: ([g, g.clone()], [torch.zeros(4), torch.full((4,), 2.0)]), ValueError, r"reserved\[1\]"),
    "device": (lambda g: ([g], [torch.zeros(4, device="meta")]), ValueError, r"reserved\[0\] must be a CPU tensor"),
    "aliased": (lambda g: ([g], [g]), ValueError, r"reserved\[0\] shares memory with grads\[0\]"),
    "not tensors": (lambda g: ([1.0], [g]), TypeError, r"masked_grad_: grads\[0\].*float"),
    "not a list": (lambda g: (None, [g]), TypeError, "masked_grad_: grads.*NoneType"),
    "a tensor, not a list": (lambda g: (g, [g]), TypeError, "grads"),
    "mask not a tensor": (lambda g: ([g, g.clone()], [torch.zeros(4), 0.5]), TypeError, r"reserved.*float"),
    "no masks": (lambda g: ([g], None), TypeError, "reserved.*NoneType"),
    "integer mask": (lambda g: ([g], [torch.ones(4).long()]), ValueError, r"reserved\[0\] must be bool, float32"),
    "complex": (lambda g: ([g.to(torch.complex64)], [torch.zeros(4)]), ValueError, r"grads\[0\] must be float32"),
    "broadcast": (lambda g: ([g], [torch.zeros(1)]), ValueError, r"reserved\[0\] has shape \[1\]"),
    "twice": (lambda g: ([g, g], [torch.zeros(4)] * 2), ValueError, r"grads\[1\] shares memory with grads\[0\]"),
    "far above 1, last": (lambda g: ([g], [torch.tensor([0, 0, 0, math.inf])]), ValueError, "outside"),
    "just above 1": (lambda g: ([g], [torch.full((4,), 1 + 2e-16, dtype=torch.float64)]), ValueError, "outside"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_raises_before_writing(case: str) -> None:
    make, error, message = BAD[case]
    g = torch.tensor([0.1, 0.2, 0.3, 0.4])
    args = make(g)
    before = g.clone()
    with pytest.raises(error, match=message):
        fastcl.ops.masked_grad_(*args)
    assert torch.equal(g, before)
    assert g._version == 0
