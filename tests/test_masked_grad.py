from __future__ import annotations

import math

import pytest
import torch

import fastcl


@pytest.mark.parametrize("mask", [torch.bool, torch.float32, torch.bfloat16])
def test_protected_is_exactly_zero_whatever_the_gradient(mask: torch.dtype) -> None:
    g = torch.tensor([math.inf, -math.inf, math.nan, 3.0, -3.0])
    fastcl.ops.masked_grad_([g], [torch.ones(5).to(mask)])
    assert g.tolist() == [0.0] * 5


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
    "not tensors": (lambda g: ([1.0], [g]), TypeError, "expected tensors, got .*float"),
    "not a list": (lambda g: (None, [g]), TypeError, "expected tensors, got NoneType"),
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
