"""Penalties and the per-sample accumulation kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import fastcl
from fastcl import ops

STRENGTH = 2.0


def test_penalty_with_gradient(contest: Callable, compiled: Callable, copy_rate: Callable, device, shapes) -> None:
    """What a step of EWC adds: the penalty's value and its gradient on top of the loss's."""
    params = [torch.randn(s, device=device, requires_grad=True) for s in shapes]
    anchors = [torch.randn(s, device=device) for s in shapes]
    importances = [torch.rand(s, device=device) for s in shapes]
    for p in params:
        p.grad = torch.zeros_like(p)
    grads = [p.grad for p in params]
    n = sum(p.numel() for p in params)

    def value() -> torch.Tensor:
        terms = [(f * (p - a).square()).sum() for p, a, f in zip(params, anchors, importances, strict=True)]
        return 0.5 * STRENGTH * torch.stack(terms).sum()

    def autograd() -> torch.Tensor:
        loss = value()
        loss.backward()
        return loss.detach()

    @torch.no_grad()
    def by_hand() -> torch.Tensor:
        total = torch.zeros((), device=device)
        for p, a, f, g in zip(params, anchors, importances, grads, strict=True):
            drift = p - a
            slope = STRENGTH * f * drift
            g += slope
            total = total + 0.5 * (slope * drift).sum()
        return total

    @torch.no_grad()
    def fused(check: bool) -> torch.Tensor:
        return ops.quadratic_penalty_grad_(grads, params, anchors, importances, STRENGTH, check=check)

    contenders: dict[str, Any] = {
        "fastcl": lambda: fused(False),
        "fastcl, importances checked": lambda: fused(True),
        "eager autograd": autograd,
        "eager by hand": by_hand,
        **compiled(by_hand),
    }

    def check(contenders: dict[str, Any]) -> None:
        want_value = value().detach()
        want = torch.autograd.grad(value(), params)
        for call in contenders.values():
            for g in grads:
                g.zero_()
            torch.testing.assert_close(call(), want_value, rtol=1e-4, atol=0)
            for g, w in zip(grads, want, strict=True):
                torch.testing.assert_close(g, w)

    contest(contenders, check, floor=20 * n / copy_rate(device, 20 * n))


DENSE = [(128, None, 400, 784), (128, 256, 64, 576), (128, 64, 128, 1152), (128, 16, 256, 2304), (64, 16, 512, 4608),
         (32, 128, 768, 3072)]  # fmt: skip


@pytest.mark.parametrize("sizes", DENSE, ids=lambda s: "x".join(map(str, s)))
def test_accumulate_outer(contest: Callable, device, sizes: tuple) -> None:
    """Against the ordinary weight gradient of the same layer (which an importance pass need not compute)."""
    n, p, o, i = sizes
    lead = (n,) if p is None else (n, p)
    grad, activation = torch.randn(*lead, o, device=device), torch.randn(*lead, i, device=device)
    flat_g, flat_a = grad.reshape(-1, o), activation.reshape(-1, i)
    out = torch.zeros(o, i, device=device)
    scratch = torch.empty(o, i, device=device)

    def materialised() -> None:
        if p is None:
            out.addmm_(grad.square().T, activation.square())
        else:
            out.add_(torch.bmm(grad.transpose(1, 2), activation).square_().sum(0))

    contenders = {
        "fastcl": lambda: ops.accumulate_outer_(out, grad, activation, 2),
        "bmm, square, sum" if p else "squares and a GEMM": materialised,
        "ordinary weight gradient": lambda: torch.mm(flat_g.T, flat_a, out=scratch),
    }

    def check(contenders: dict[str, Any]) -> None:
        results = []
        for name, call in contenders.items():
            if name != "ordinary weight gradient":  # another quantity: the price to be compared with
                out.zero_()
                call()
                results.append(out.clone())
        torch.testing.assert_close(results[0], results[1], rtol=1e-3, atol=1e-3)
        out.zero_()

    contest(contenders, check)


CONV = [(128, 64, 32, 64, 3), (128, 128, 16, 128, 3), (128, 256, 8, 256, 3), (128, 512, 4, 512, 3),
        (128, 64, 16, 128, 1)]  # fmt: skip


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("sizes", CONV, ids=lambda s: "x".join(map(str, s)))
def test_accumulate_conv(contest: Callable, device, sizes: tuple, layout: str) -> None:
    n, c, side, o, k = sizes
    form = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    x = torch.randn(n, c, side, side, device=device).contiguous(memory_format=form)
    w = torch.randn(o, c, k, k, device=device).contiguous(memory_format=form)
    grad = torch.randn(n, o, side, side, device=device).contiguous(memory_format=form)
    out, pad = torch.zeros_like(w), k // 2
    few = slice(0, 4)  # unfold and bmm hold [N, O, C k k]: compared on four samples, not timed

    def plain() -> torch.Tensor:
        args = (None, [1, 1], [pad, pad], [1, 1], False, [0, 0], 1, [False, True, False])
        return torch.ops.aten.convolution_backward(grad, x, w, *args)[1]

    contenders = {
        "fastcl": lambda: ops.accumulate_conv_(out, grad, x, [1, 1], [pad, pad], [1, 1], 1, 2),
        "ordinary weight gradient": plain,
    }

    def check(contenders: dict[str, Any]) -> None:
        ops.accumulate_conv_(out, grad[few], x[few], [1, 1], [pad, pad], [1, 1], 1, 2)
        columns = torch.nn.functional.unfold(x[few], k, padding=pad)
        want = torch.bmm(grad[few].flatten(2), columns.transpose(1, 2)).square().sum(0)
        torch.testing.assert_close(out.reshape(o, -1), want, rtol=1e-3, atol=1e-2)
        out.zero_()

    contest(contenders, check)


def test_ewc_step(contest: Callable, device) -> None:
    """One training step of the split-MNIST MLP with EWC, whole."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(
        torch.nn.Linear(784, 400), torch.nn.ReLU(), torch.nn.Linear(400, 400), torch.nn.ReLU(), torch.nn.Linear(400, 10)
    ).to(device)
    x, y = torch.randn(128, 784, device=device), torch.randint(0, 10, (128,), device=device)
    ewc = fastcl.EWC(net, 100.0)
    ewc.consolidate([(x, y)])
    with torch.no_grad():
        for p in net.parameters():
            p += 0.01 * torch.randn_like(p)
    params = dict(net.named_parameters())

    def loss() -> torch.Tensor:
        net.zero_grad()
        return torch.nn.functional.cross_entropy(net(x), y)

    def fused() -> None:
        loss().backward()
        ewc.add_gradients()

    def eager() -> None:
        total = loss()
        for name, p in params.items():
            total = total + 50.0 * (ewc.importances[name] * (p - ewc.anchors[name]).square()).sum()
        total.backward()

    def check(contenders: dict[str, Any]) -> None:
        grads = []
        for name in ("fastcl", "eager penalty"):
            contenders[name]()
            grads.append([p.grad.clone() for p in params.values()])
        for a, b in zip(*grads, strict=True):
            torch.testing.assert_close(a, b)

    contest({"fastcl": fused, "eager penalty": eager, "no penalty": lambda: loss().backward()}, check)
