"""masked_weight, compensated_mask, mask_sparsity and the schedules."""

from __future__ import annotations

import functools
import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from fastcl import nn, ops

from .samples import WIDTHS

SHAPES = [((3, 5), (3, 5)), ((4, 3, 2), (4, 1, 1)), ((4, 3, 2), (1, 3, 1)), ((2, 3), (1, 1)), ((5,), (5,)), ((), ())]

# units that are columns, kernels, runs and rows: one strip and several, with and without rows or weights left over
UNITS = [
    ((200, 170), (1, 170)),
    ((2, 4099), (1, 4099)),
    ((100, 2051), (1, 2051)),
    ((19, 300, 3, 3), (1, 300, 1, 1)),
    ((3, 70, 63), (1, 70, 1)),
    ((3, 70, 64), (1, 70, 1)),
    ((70, 1031), (70, 1)),
]


def pair(shape: Any, of: Any, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    return torch.randn(shape, dtype=dtype, requires_grad=True), torch.randn(of, dtype=dtype, requires_grad=True)


EDGES = [0.0, -0.0, 1e-30, 16.6, -16.6, 21.75, -21.81, -21.9, 21.9, 40.0, -1e30, 1e30, math.inf, -math.inf, math.nan]


@pytest.mark.parametrize("form", ["none", "bool", "packed", "float"])
@pytest.mark.parametrize("s_max", [None, 5.0])
def test_masked_weight_of_every_width_and_embedding(form: str, s_max: float | None) -> None:
    """By sixteens with AVX-512, where a formula of its own has the edges: 4 e = -87.3 is the exponential's last one."""
    close = functools.partial(torch.testing.assert_close, equal_nan=True)
    for n in [*WIDTHS, *range(20, 36), 128, 144, 300]:
        w, e, up = torch.randn(3, n)
        e[: len(EDGES)] = torch.tensor(EDGES)[:n]
        r = torch.rand(n) < 0.5
        free = (~r).double() if form != "none" else torch.ones(n, dtype=torch.float64)
        given = {"none": None, "bool": r, "packed": ops.pack_mask(r), "float": r.float()}[form]
        w.requires_grad_(), e.requires_grad_()
        out, kept = ops.masked_weight_kept(w, e, 4.0, reserved=given, s_max=s_max)
        got_w, got_e = torch.autograd.grad((out, kept), (w, e), (up, torch.tensor(0.25)))
        close(out, ops.masked_weight(w, e, 4.0), rtol=4e-7, atol=0)  # two ways to a mask, each within 2 ulp
        wide, through = e.detach().double(), up.double() * w.detach().double() + 0.25 * free
        mask, soft = torch.sigmoid(4 * wide), torch.sigmoid(wide) * torch.sigmoid(-wide)
        slope = 4 * mask * torch.sigmoid(-4 * wide) if s_max is None else s_max * soft
        close(out.double(), w.double() * mask, rtol=1e-6, atol=1e-37)
        close(got_w.double(), torch.where(free == 0, 0.0, up.double() * mask), rtol=1e-6, atol=1e-37)
        close(got_e.double(), through * slope, rtol=3e-6, atol=1e-6)
        close(kept.double(), (mask * free).sum(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("form", ["none", "bool", "packed"])
def test_gradients_past_the_caches_are_those_of_parts(form: str) -> None:
    n = 2**23 + 16384 + 21  # from 32 MiB on they are streamed to memory
    w, e, up = torch.randn(3, n)
    r = torch.rand(n) < 0.5

    def gradients(part: slice) -> tuple[Tensor, ...]:
        given = {"none": None, "bool": r[part], "packed": ops.pack_mask(r[part])}[form]
        inputs = w[part].clone().requires_grad_(), e[part].clone().requires_grad_()
        out = ops.masked_weight(*inputs, 4.0, reserved=given, s_max=5.0)
        return torch.autograd.grad(out, inputs, up[part])

    parts = [gradients(slice(first, first + 2**22)) for first in range(0, n, 2**22)]
    for whole, halves in zip(gradients(slice(None)), zip(*parts, strict=True), strict=True):
        assert torch.equal(whole, torch.cat(halves))


@pytest.mark.parametrize(("shape", "of"), SHAPES)
def test_masked_weight_gradcheck_twice(shape: Any, of: Any) -> None:
    inputs = pair(shape, of)
    assert gradcheck(lambda w, e: ops.masked_weight(w, e, 3.0), inputs)
    assert gradgradcheck(lambda w, e: ops.masked_weight(w, e, 3.0), inputs)


def test_masked_weight_kept_gradcheck_twice() -> None:
    inputs, reserved = pair((3, 5), (3, 5)), torch.rand(3, 5).round(decimals=1)
    assert gradcheck(lambda w, e: ops.masked_weight_kept(w, e, 3.0), inputs)
    assert gradgradcheck(lambda w, e: ops.masked_weight_kept(w, e, 3.0), inputs)
    w, e = (t.detach() for t in inputs)
    assert gradcheck(lambda e: ops.masked_weight_kept(w, e, 3.0, reserved=reserved), e.requires_grad_())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("shape", "of"), [*SHAPES[:3], ((200, 170), (200, 170)), *UNITS])
def test_masked_weight_is_eager(shape: Any, of: Any, dtype: torch.dtype) -> None:
    w, e = pair(shape, of, dtype)
    grad = torch.randn(shape).to(dtype)
    y = ops.masked_weight(w, e, 5.0)
    y.backward(grad)
    w64, e64 = (t.detach().double().requires_grad_() for t in (w, e))
    want = w64 * torch.sigmoid(5.0 * e64)
    want.backward(grad.double())
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 1.5e-2, torch.float16: 2e-3}[dtype]
    for got, exact in ((y, want), (w.grad, w64.grad), (e.grad, e64.grad)):
        assert got.dtype == dtype
        torch.testing.assert_close(got.double(), exact, rtol=tolerance, atol=tolerance * exact.abs().max().item())


@pytest.mark.parametrize(("shape", "of"), UNITS)
def test_masks_of_units_are_the_same_for_any_number_of_threads(shape: Any, of: Any) -> None:
    w, e = pair(shape, of, torch.float32)
    grad, threads = torch.randn(shape), torch.get_num_threads()
    results = []
    try:
        for n in (1, 2, 5):
            torch.set_num_threads(n)
            y = ops.masked_weight(w, e, 5.0)
            results.append((y, *torch.autograd.grad(y, (w, e), grad)))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("form", ["bool", "float", "bits"])
@pytest.mark.parametrize(("shape", "of"), [((30, 50), (30, 50)), ((30, 50), (30, 1))])
def test_reserved_masks_the_weights_gradient_only(shape: Any, of: Any, form: str) -> None:
    w, e = pair(shape, of)
    r = torch.rand(shape) > 0.4
    given = {"bool": r, "float": torch.where(r, 1.0, 0.25), "bits": ops.pack_mask(r)}[form]
    grad = torch.randn(shape, dtype=torch.float64)
    plain = torch.autograd.grad(ops.masked_weight(w, e, 2.0), (w, e), grad)
    masked = torch.autograd.grad(ops.masked_weight(w, e, 2.0, reserved=given), (w, e), grad)
    assert (masked[0][r] == 0).all()
    torch.testing.assert_close(masked[0][~r], plain[0][~r] * (0.75 if form == "float" else 1.0))
    assert torch.equal(masked[1], plain[1])
    grad[r] = math.inf  # does not come through as inf * 0
    (masked_grad,) = torch.autograd.grad(ops.masked_weight(w, e, 2.0, reserved=given), w, grad)
    assert (masked_grad[r] == 0).all()


def test_regulariser_falls_out_of_the_same_pass() -> None:
    """Eq. 5's value and gradient, as mask_sparsity gives them."""
    w, e = pair((40, 30), (40, 30))
    r = torch.rand(40, 30) > 0.3
    grad = torch.randn(40, 30, dtype=torch.float64)
    y, kept = ops.masked_weight_kept(w, e, 2.0, reserved=r)
    found = torch.autograd.grad((y * grad).sum() + 0.7 * kept / (~r).sum(), (w, e))
    masks = ops.annealed_mask(e, 2.0)
    loss = (w * masks * grad).sum() + 0.7 * ops.mask_sparsity([masks], [r])
    want = torch.autograd.grad(loss, (w, e))
    torch.testing.assert_close(found[0], want[0] * ~r)
    torch.testing.assert_close(found[1], want[1])


def literal(e: Tensor, s: float, s_max: float, grad: Tensor) -> Tensor:
    """The authors' code: autograd's gradient, then their quotient."""
    e = e.detach().clone().requires_grad_()
    torch.sigmoid(s * e).backward(grad)
    quotient = (torch.cosh(torch.clamp(s * e.detach(), -50, 50)) + 1) / (torch.cosh(e.detach()) + 1)
    return e.grad * s_max / s * quotient


def test_compensation_is_the_papers_in_exact_arithmetic() -> None:
    e = torch.linspace(-6, 6, 101, dtype=torch.float64)
    grad = torch.randn(101, dtype=torch.float64)
    for s in (0.1, 1.0, 3.0):  # |s e| <= 18: 1 - m is exact enough in float64
        found = e.clone().requires_grad_()
        ops.compensated_mask(found, s, 400.0).backward(grad)
        torch.testing.assert_close(found.grad, literal(e, s, 400.0, grad), rtol=1e-7, atol=1e-7)


def test_compensation_lets_a_unit_turn_off() -> None:
    """At s e = 20 the literal product is 0 in float32, the compensated gradient is s_max sigmoid'(e)."""
    e = torch.tensor([0.05, -0.05, 6.0], requires_grad=True)
    (analytic,) = torch.autograd.grad(ops.compensated_mask(e, 400.0, 400.0).sum(), e)
    (parity,) = torch.autograd.grad(ops.compensated_mask(e, 400.0, 400.0, literal=True).sum(), e)
    want = 400 * torch.sigmoid(e.detach().double()) * torch.sigmoid(-e.detach().double())
    torch.testing.assert_close(analytic.double(), want, rtol=1e-5, atol=0)
    assert parity[0] == 0
    torch.testing.assert_close(parity[1].double(), want[1], rtol=1e-4, atol=0)
    assert literal(e, 400.0, 400.0, torch.ones(3))[0] == 0


@pytest.mark.parametrize("s", [0.0025, 1.0, 10.0])
def test_literal_mode_is_the_authors_code(s: float) -> None:
    e, grad = torch.linspace(-6, 1.2, 60), torch.randn(60)
    found = e.clone().requires_grad_()
    ops.compensated_mask(found, s, 400.0, literal=True).backward(grad)
    torch.testing.assert_close(found.grad, literal(e, s, 400.0, grad), rtol=2e-2 if s == 10 else 1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_compensation_in_half_precision(dtype: torch.dtype) -> None:
    e = torch.linspace(-15, 15, 61).to(dtype).requires_grad_()  # cosh(12) overflows float16
    ops.compensated_mask(e, 40.0, 50.0).sum().backward()
    x = e.detach().double()
    want = 50 * torch.sigmoid(x) * torch.sigmoid(-x)
    torch.testing.assert_close(e.grad.double(), want, rtol=1e-2, atol=1e-6)
    w = torch.ones(61, dtype=dtype)
    again = e.detach().clone().requires_grad_()
    ops.masked_weight(w, again, 40.0, s_max=50.0).sum().backward()
    assert torch.equal(again.grad, e.grad)


def test_sparsity() -> None:
    m = [torch.tensor([1.0, 0.5, 0.25], requires_grad=True), torch.tensor([[0.5], [1.0]], requires_grad=True)]
    r = [torch.tensor([True, False, False]), torch.tensor([[0.5], [0.0]])]
    value = ops.mask_sparsity(m, r)
    assert value.item() == pytest.approx((0.5 + 0.25 + 0.25 + 1.0) / 3.5)
    value.backward()
    torch.testing.assert_close(m[0].grad, torch.tensor([0.0, 1.0, 1.0]) / 3.5)
    torch.testing.assert_close(m[1].grad, torch.tensor([[0.5], [1.0]]) / 3.5)
    assert ops.mask_sparsity([t.detach() for t in m]).item() == pytest.approx(3.25 / 5)
    full = torch.ones(3, requires_grad=True)
    nothing_free = ops.mask_sparsity([full], [torch.ones(3, dtype=torch.bool)])
    nothing_free.backward()
    assert nothing_free == 0
    assert torch.equal(full.grad, torch.zeros(3))
    many = [torch.rand(4, 3, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    packed = ops.pack_mask(torch.arange(12) % 3 == 0)
    assert gradcheck(lambda *ms: ops.mask_sparsity(ms, [packed] * 3), many)


def test_layouts_of_weight_and_embedding() -> None:
    w = torch.randn(4, 3, 5, 2).contiguous(memory_format=torch.channels_last).requires_grad_()
    e = torch.randn(4, 3, 5, 2).requires_grad_()
    y = ops.masked_weight(w, e, 2.0)
    assert y.is_contiguous(memory_format=torch.channels_last)
    y.square().sum().backward()
    w2, e2 = (t.detach().clone().requires_grad_() for t in (w, e))
    (w2 * torch.sigmoid(2 * e2)).square().sum().backward()
    torch.testing.assert_close(w.grad, w2.grad)
    torch.testing.assert_close(e.grad, e2.grad)


W, E = torch.randn(2, 3), torch.randn(2, 3)
BAD: dict[str, tuple[Any, str]] = {
    "scale": (lambda: ops.masked_weight(W, E, -1.0), "scale is -1"),
    "scale NaN": (lambda: ops.compensated_mask(E, math.nan, 1.0), "scale is nan"),
    "s_max": (lambda: ops.masked_weight(W, E, 1.0, s_max=0.0), "s_max is 0"),
    "literal": (lambda: ops.masked_weight(W, E, 1.0, literal=True), "literal needs s_max"),
    "literal scale": (lambda: ops.compensated_mask(E, 0.0, 1.0, literal=True), "scale is 0 but must be positive"),
    "shape": (lambda: ops.masked_weight(W, E[:, :2], 1.0), "embedding must have the shape of weight"),
    "two dimensions": (
        lambda: ops.masked_weight(torch.zeros(2, 3, 4), torch.zeros(2, 3, 1), 1.0),
        "in every dimension",
    ),
    "kept": (lambda: ops.masked_weight_kept(W, E[:, :1], 1.0), "embedding must have the shape of weight"),
    "dtype": (lambda: ops.masked_weight(W, E.double(), 1.0), "embedding must have the dtype of weight"),
    "integer": (lambda: ops.masked_weight(W.int(), E.int(), 1.0), "weight must be float32"),
    "reserved": (lambda: ops.masked_weight(W, E, 1.0, reserved=W * 0 + 2), r"reserved has values outside \[0, 1\]"),
    "lengths": (lambda: ops.mask_sparsity([W], [W, W]), "reserved has 2 tensors"),
    "range": (lambda: ops.mask_sparsity([W], [W * 0 - 1]), r"reserved\[0\] has values outside"),
    "mask dtype": (lambda: ops.mask_sparsity([W.int()]), r"masks\[0\] must be float32"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str) -> None:
    call, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        call()


def test_second_derivative_of_a_compensated_gradient_is_refused() -> None:
    w, e = pair((2, 3), (2, 3))
    (g,) = torch.autograd.grad(ops.masked_weight(w, e, 1.0, s_max=9.0).sum(), w, create_graph=True)
    with pytest.raises(RuntimeError, match="not differentiable with reserved or s_max"):
        g.sum().backward()


def test_hat_schedule() -> None:
    scales = [nn.hat_scale(b, 101, 400.0) for b in range(101)]
    assert scales[0] == pytest.approx(1 / 400)
    assert scales[-1] == 400.0
    assert all(a < b for a, b in pairwise(scales))
    assert scales[50] == pytest.approx(1 / 400 + (400 - 1 / 400) / 2)
    assert nn.hat_scale(0, 1, 25.0) == 25.0


@pytest.mark.parametrize("s_max", [2.0, 1e4])
def test_dgm_schedules(s_max: float) -> None:
    epochs, batches = 20, 30
    for epoch in range(epochs):
        scales = [nn.dgm_scale(epoch, epochs, b, batches, s_max) for b in range(batches)]
        assert all(a <= b for a, b in pairwise(scales))
        assert scales[-1] == nn.dgm_scale(epoch, epochs, 0, batches, s_max, "epoch")
    assert nn.dgm_scale(epochs - 1, epochs, batches - 1, batches, s_max) == s_max
    first = [nn.dgm_scale(0, epochs, b, batches, s_max, "paper") for b in range(batches)]
    assert first[0] == pytest.approx(s_max)
    assert first[-1] == pytest.approx(1 / s_max)
    i, b, top = 7, 11, 1 / s_max + (s_max - 1 / s_max) * 7 / 19
    assert nn.dgm_scale(i, epochs, b, batches, s_max, "paper") == pytest.approx(1 / top + (top - 1 / top) * 11 / 29)


def test_schedules_refuse() -> None:
    for arguments, message in (
        ((3, 3, 400.0), "batch is 3 but must be from 0 to 3 - 1"),
        ((0, 0, 400.0), "batch is 0"),
        ((0, 3, 0.5), "s_max is 0.5"),
    ):
        with pytest.raises(ValueError, match=message):
            nn.hat_scale(*arguments)
    with pytest.raises(ValueError, match="epoch is -1"):
        nn.dgm_scale(-1, 3, 0, 3, 10.0)
    with pytest.raises(ValueError, match="schedule is 'linear'"):
        nn.dgm_scale(0, 3, 0, 3, 10.0, "linear")
