"""sigmoid(s e), forward alone and with its backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import fastcl
from fastcl.bench import workloads

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
def test_masked_weight(play: Callable, compiled: Callable, device, n: int) -> None:
    play(workloads.masked_weight(device, compiled, n))


UNITS = {
    "rows": ((1500, 1000), (1500, 1)),
    "columns": ((1500, 1000), (1, 1000)),
    "transposed kernels": ((512, 256, 3, 3), (1, 256, 1, 1)),
    "small columns": ((100, 784), (1, 784)),
}


@pytest.mark.parametrize("which", UNITS)
def test_masked_weight_of_units(contest: Callable, compiled: Callable, device, which: str) -> None:
    """HAT's and DGMa's embeddings, one a unit, on the weight itself: forward and backward."""
    shape, of = UNITS[which]
    w, e = torch.randn(shape, device=device, requires_grad=True), torch.randn(of, device=device, requires_grad=True)
    upstream = torch.randn(shape, device=device)

    def gradients(weight: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(weight(), (w, e), upstream)

    def eager() -> torch.Tensor:
        return w * torch.sigmoid(3.0 * e)

    contenders = {
        "fastcl": lambda: gradients(lambda: fastcl.ops.masked_weight(w, e, 3.0)),
        "eager": lambda: gradients(eager),
        **{name: (lambda f=f: gradients(f)) for name, f in compiled(eager).items()},
    }

    def check(contenders: dict[str, Any]) -> None:
        want = gradients(eager)
        for call in contenders.values():
            torch.testing.assert_close(call(), want, rtol=1e-4, atol=1e-4)

    contest(contenders, check)
