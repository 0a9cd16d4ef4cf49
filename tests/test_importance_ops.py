"""The quadratic penalty and its gradient; the accumulating ops are in test_importance_accumulate.py."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fastcl import ops

from .samples import FLOATS, LAYOUTS, WIDTHS


def problem(dtype: torch.dtype = torch.float64) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    shapes = [(3, 5), (7,), (), (2, 3, 4)]
    p, a, f = ([torch.randn(s, dtype=dtype) for s in shapes] for _ in range(3))
    return p, a, [t.abs() for t in f]


@pytest.mark.parametrize("importance", [None, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_penalty_and_gradient_of_every_width(dtype: torch.dtype, importance: torch.dtype | None) -> None:
    """One list with all widths; the gradient form and autograd against the formula in float64."""
    p, a = ([torch.randn(n).to(dtype) for n in WIDTHS] for _ in range(2))
    f = [torch.rand(n).to(importance or dtype) for n in WIDTHS]
    grads = [torch.randn(n).to(dtype) for n in WIDTHS]
    slopes = [3.0 * z.double() * (x.double() - y.double()) for x, y, z in zip(p, a, f, strict=True)]
    value = 0.5 * sum((s * (x.double() - y.double())).sum() for s, x, y in zip(slopes, p, a, strict=True))
    start = [g.double().clone() for g in grads]
    leaves = [x.clone().requires_grad_() for x in p]

    differentiable = ops.quadratic_penalty(leaves, a, f, 3.0)
    differentiable.backward()
    returned = ops.quadratic_penalty_grad_(grads, p, a, f, 3.0)

    rounding = {torch.float32: 1e-6, torch.float64: 1e-14, torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype]
    for got in (differentiable.detach(), returned):
        assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        torch.testing.assert_close(got.double(), value, rtol=1e-14 if dtype == torch.float64 else 1e-6, atol=0)
    for leaf, g, s, g0 in zip(leaves, grads, slopes, start, strict=True):
        torch.testing.assert_close(leaf.grad.double(), s, rtol=1.01 * rounding, atol=1e-7 * (rounding > 1e-9))
        torch.testing.assert_close(g.double(), g0 + s, rtol=1.01 * rounding, atol=1e-6 * (rounding > 1e-9))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("other", LAYOUTS)
def test_penalty_of_every_memory_order(layout: str, other: str) -> None:
    """The gradient lies as torch would lay it; values are the contiguous ones'."""
    p, a, f, g = (torch.rand(3, 4, 5, 6, dtype=torch.float64) for _ in range(4))
    want = ops.quadratic_penalty([p], [a], [f], 3.0)
    leaf = LAYOUTS[layout](p).requires_grad_()
    got = ops.quadratic_penalty([leaf], [LAYOUTS[other](a)], [LAYOUTS[layout](f)], 3.0)
    got.backward()
    torch.testing.assert_close(got.detach(), want)
    torch.testing.assert_close(leaf.grad, 3 * f * (p - a))
    mine = LAYOUTS[other](g.clone())
    strides = mine.stride()
    ops.quadratic_penalty_grad_([mine], [leaf.detach()], [a], [LAYOUTS[other](f)], 3.0)
    torch.testing.assert_close(mine, g + 3 * f * (p - a))
    assert mine.stride() == strides


def test_sum_does_not_depend_on_threads() -> None:
    sizes = [(1 + 7919 * k % 40_000,) for k in range(37)]  # pieces begin and end anywhere in a chunk
    p, a, f = ([torch.rand(s) for s in sizes] for _ in range(3))
    bits = []
    for threads in (1, 2, 3, 4):
        torch.set_num_threads(threads)
        grads = [torch.zeros(s) for s in sizes]
        values = ops.quadratic_penalty(p, a, f, 2.0), ops.quadratic_penalty_grad_(grads, p, a, f, 2.0)
        bits.append(torch.cat([*(v.reshape(1) for v in values), *grads]))
    assert all(torch.equal(bits[0], other) for other in bits[1:])
    assert bits[0][0] == bits[0][1]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_penalty_of_a_diverged_parameter_says_so(bad: float) -> None:
    """NaN and Inf in parameters are the training's own: they go through, and nowhere else."""
    p, g = torch.ones(40), torch.zeros(40)
    p[33] = bad
    value = ops.quadratic_penalty_grad_([g], [p], [torch.zeros(40)], [torch.ones(40)], 2.0)
    assert not value.isfinite()
    assert not g[33].isfinite()
    assert g.isfinite().sum() == 39


def test_check_false_leaves_importances_unread_by_the_check() -> None:
    f = torch.tensor([1.0, math.nan])
    assert ops.quadratic_penalty([torch.ones(2)], [torch.zeros(2)], [f], 1.0, check=False).isnan()


def test_penalty_gradcheck() -> None:
    p, a, f = problem()
    p = [t.requires_grad_() for t in p]
    assert torch.autograd.gradcheck(lambda *p: ops.quadratic_penalty(p, a, f, 3.0), p)
    with pytest.raises(RuntimeError, match="not differentiable"):
        torch.autograd.gradgradcheck(lambda *p: ops.quadratic_penalty(p, a, f, 3.0), p)


def test_penalty_upstream_gradient() -> None:
    p, a, f = problem()
    p = [t.requires_grad_() for t in p]
    (5 * ops.quadratic_penalty(p, a, f, 3.0)).backward()
    for x, y, z in zip(p, a, f, strict=True):
        torch.testing.assert_close(x.grad, 15 * z * (x - y).detach())


def test_penalty_constants_must_be_constant() -> None:
    p, a, f = problem()
    with pytest.raises(ValueError, match="anchors and importances are constants"):
        ops.quadratic_penalty([t.requires_grad_() for t in p], [t.requires_grad_() for t in a], f, 1.0)


def test_grad_form_adds_and_returns() -> None:
    p, a, f = problem()
    grads = [torch.randn_like(t) for t in p]
    want = [g + 3 * z * (x - y) for g, x, y, z in zip(grads, p, a, f, strict=True)]
    value = ops.quadratic_penalty_grad_(grads, p, a, f, 3.0)
    torch.testing.assert_close(value, ops.quadratic_penalty(p, a, f, 3.0))
    for g, w in zip(grads, want, strict=True):
        torch.testing.assert_close(g, w)


def test_importances_in_bf16() -> None:
    p, a, f = problem(torch.float32)
    half = [t.bfloat16() for t in f]
    torch.testing.assert_close(
        ops.quadratic_penalty(p, a, half, 3.0), ops.quadratic_penalty(p, a, [t.float() for t in half], 3.0)
    )


def test_large_sum_is_exact_enough() -> None:
    p, a = torch.full((3_000_001,), 1.1), torch.ones(3_000_001)
    got = ops.quadratic_penalty([p], [a], [torch.ones_like(p)], 2.0)
    want = (p.double() - a.double()).square().sum()
    assert abs(got.item() / want.item() - 1) < 1e-6


def test_empty_problem() -> None:
    assert ops.quadratic_penalty([], [], [], 1.0) == 0
    assert ops.quadratic_penalty_grad_([], [], [], [], 1.0) == 0


PENALTY_BAD = {
    "negative strength": (dict(strength=-1.0), "strength is -1"),
    "NaN strength": (dict(strength=math.nan), "strength is nan"),
    "infinite strength": (dict(strength=math.inf), "strength is inf"),
    "NaN importance": (dict(importances=[torch.tensor([1.0, math.nan])]), r"importances\[0\] has NaN or negative"),
    "negative importance": (dict(importances=[torch.tensor([1.0, -1.0])]), r"importances\[0\] has NaN or negative"),
    "importance shape": (dict(importances=[torch.ones(3)]), r"importances\[0\] has shape \[3\]"),
    "importance dtype": (dict(importances=[torch.ones(2).double()]), r"importances\[0\] must have the dtype"),
    "anchor shape": (dict(anchors=[torch.ones(1)]), r"anchors\[0\] has shape \[1\]"),
    "anchor dtype": (dict(anchors=[torch.ones(2).double()]), r"anchors\[0\] must have the dtype of params\[0\]"),
    "too few anchors": (dict(anchors=[]), "anchors has 0 tensors but must have as many as params, 1"),
    "too many importances": (dict(importances=[torch.ones(2)] * 2), "importances has 2 tensors"),
    "integer parameter": (dict(params=[torch.ones(2).int()]), r"params\[0\]"),
    "last importance": (dict(importances=[torch.tensor([1.0, -1e-30])]), r"importances\[0\] has NaN or negative"),
    "integer importance": (dict(importances=[torch.ones(2).int()]), r"importances\[0\] must"),
    "device": (
        dict(anchors=[torch.ones(2, device="meta")]),
        r"anchors\[0\] must be|params\[0\] must be|grads\[0\] must",
    ),
}


@pytest.mark.parametrize("case", PENALTY_BAD)
def test_bad_penalty_raises_before_writing(case: str) -> None:
    change, message = PENALTY_BAD[case]
    good = dict(params=[torch.ones(2)], anchors=[torch.zeros(2)], importances=[torch.ones(2)], strength=1.0)
    with pytest.raises(ValueError, match=message):
        ops.quadratic_penalty(**{**good, **change})
    if "params" in change:
        message = r"grads\[0\]|params\[0\]"
    g = torch.full((2,), 0.5)
    with pytest.raises(ValueError, match=message):
        ops.quadratic_penalty_grad_([g], **{**good, **change})
    assert g.tolist() == [0.5, 0.5]


@pytest.mark.parametrize("name", ["params", "anchors", "importances", "strength"])
@pytest.mark.parametrize("wrong", [None, "x", [1.0]], ids=str)
def test_penalty_of_other_types(name: str, wrong: object) -> None:
    good = dict(params=[torch.ones(2)], anchors=[torch.zeros(2)], importances=[torch.ones(2)], strength=1.0)
    g = torch.full((2,), 0.5)
    for call in (ops.quadratic_penalty, lambda **k: ops.quadratic_penalty_grad_([g], **k)):
        with pytest.raises(TypeError, match=name):
            call(**{**good, name: wrong})
    assert g.tolist() == [0.5, 0.5]


@pytest.mark.parametrize(
    ("grads", "message"),
    [
        ([], "grads has 0 tensors but must have as many as params, 1"),
        ([torch.ones(3)], r"grads\[0\] has shape \[3\] but must have the shape of params\[0\], \[2\]"),
        ([torch.ones(2).double()], r"grads\[0\] must have the dtype of params\[0\]"),
        ([torch.ones(1).expand(2)], r"grads\[0\] overlaps itself"),
    ],
)
def test_bad_gradients(grads: list[Tensor], message: str) -> None:
    before = [g.clone() for g in grads]
    with pytest.raises(ValueError, match=message):
        ops.quadratic_penalty_grad_(grads, [torch.ones(2)], [torch.zeros(2)], [torch.ones(2)], 1.0)
    assert all(torch.equal(a, b) for a, b in zip(grads, before, strict=True))


def test_gradients_must_have_their_own_memory() -> None:
    p, a, f = torch.ones(2), torch.zeros(2), torch.ones(2)
    for grads, message in [
        ([p], r"params\[0\] shares memory"),
        ([a], r"anchors\[0\] shares"),
        ([f], r"importances\[0\]"),
    ]:
        with pytest.raises(ValueError, match=message):
            ops.quadratic_penalty_grad_(grads, [p], [a], [f], 1.0)
    assert (p.tolist(), a.tolist(), f.tolist()) == ([1.0, 1.0], [0.0, 0.0], [1.0, 1.0])
