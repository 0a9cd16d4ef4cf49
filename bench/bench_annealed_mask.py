"""sigmoid(s e), forward alone and with its backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import fastcl

SIZES = [1_000, 100_000, 1_500_000, 10_000_000]


@pytest.mark.parametrize("n", SIZES)
def test_forward(contest: Callable, compiled: Callable, copy_rate: Callable, device, n: int) -> None:
    e = torch.randn(n, device=device)

    def eager() -> torch.Tensor:
        return torch.sigmoid(3.0 * e)

    contenders = {"fastcl": lambda: fastcl.ops.annealed_mask(e, 3.0), "eager": eager, **compiled(eager)}

    def check(contenders: dict[str, Any]) -> None:
        for call in contenders.values():
            torch.testing.assert_close(call(), eager())

    contest(contenders, check, floor=8 * n / copy_rate(device, 8 * n))


@pytest.mark.parametrize("n", SIZES)
def test_forward_and_backward(contest: Callable, compiled: Callable, copy_rate: Callable, device, n: int) -> None:
    e = torch.randn(n, device=device, requires_grad=True)
    upstream = torch.randn(n, device=device)

    def with_mask(mask: Callable[[], torch.Tensor]) -> torch.Tensor:
        (grad,) = torch.autograd.grad(mask(), e, upstream)
        return grad

    def eager() -> torch.Tensor:
        return torch.sigmoid(3.0 * e)

    contenders = {
        "fastcl": lambda: with_mask(lambda: fastcl.ops.annealed_mask(e, 3.0)),
        "eager": lambda: with_mask(eager),
        **{name: (lambda f=f: with_mask(f)) for name, f in compiled(eager).items()},
    }

    def check(contenders: dict[str, Any]) -> None:
        want = with_mask(eager)
        for call in contenders.values():
            torch.testing.assert_close(call(), want, rtol=1e-5, atol=1e-6)

    contest(contenders, check, floor=20 * n / copy_rate(device, 20 * n))


@pytest.mark.parametrize("n", SIZES)
def test_masked_weight(contest: Callable, compiled: Callable, copy_rate: Callable, device, n: int) -> None:
    """DGMw's layer: w o sigmoid(s e) with its regulariser's numerator, forward and backward."""
    rows = n // 100
    w, e = (torch.randn(rows, 100, device=device, requires_grad=True) for _ in range(2))
    reserved = torch.rand(rows, 100, device=device) > 0.5
    free, upstream = (~reserved).float(), torch.randn(rows, 100, device=device)

    def eager() -> tuple[torch.Tensor, torch.Tensor]:
        mask = torch.sigmoid(3.0 * e)
        return w * mask, (mask * free).sum()

    def with_gradients(forward: Callable[[], tuple[torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, ...]:
        out, kept = forward()
        return torch.autograd.grad((out, kept), (w, e), (upstream, torch.ones_like(kept)))

    def fused() -> tuple[torch.Tensor, torch.Tensor]:
        return fastcl.ops.masked_weight_kept(w, e, 3.0, reserved=reserved)

    def eager_reserved() -> tuple[torch.Tensor, ...]:
        grad_w, grad_e = with_gradients(eager)
        return grad_w * free, grad_e

    compiled_forward = compiled(eager)
    contenders = {
        "fastcl": lambda: with_gradients(fused),
        "eager": eager_reserved,
        **{
            name: (lambda f=f: [g * m for g, m in zip(with_gradients(f), (free, 1), strict=True)])
            for name, f in compiled_forward.items()
        },
    }

    def check(contenders: dict[str, Any]) -> None:
        want = eager_reserved()
        for call in contenders.values():
            for a, b in zip(call(), want, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)

    contest(contenders, check, floor=34 * n / copy_rate(device, 34 * n))
