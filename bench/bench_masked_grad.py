"""g *= 1 - reserved over a whole model, against torch's own ways of writing it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import fastcl


@pytest.mark.parametrize("mask", ["bool", "float"])
def test_masked_grad(contest: Callable, compiled: Callable, copy_rate: Callable, device, shapes, mask: str) -> None:
    grads = [torch.randn(s, device=device) for s in shapes]
    reserved = [torch.rand(s, device=device) > 0.5 for s in shapes]
    floats = [r.float() for r in reserved]
    free = [1 - f for f in floats]
    given = reserved if mask == "bool" else floats
    n = sum(g.numel() for g in grads)

    def loop() -> None:
        for g, r in zip(grads, floats, strict=True):
            g.mul_(1 - r)

    def fill() -> None:
        for g, r in zip(grads, reserved, strict=True):
            g.masked_fill_(r, 0)

    contenders: dict[str, Any] = {
        "fastcl": lambda: fastcl.ops.masked_grad_(grads, given),
        "loop (1 - m) * g": loop,
        "loop masked_fill_": fill,
        "_foreach_mul_ (mask precomputed)": lambda: torch._foreach_mul_(grads, free),
        **compiled(loop),
    }

    def check(contenders: dict[str, Any]) -> None:
        start = [g.clone() for g in grads]
        want = [g * f for g, f in zip(start, free, strict=True)]
        for call in contenders.values():
            torch._foreach_copy_(grads, start)
            call()
            for g, w in zip(grads, want, strict=True):
                torch.testing.assert_close(g, w)
        torch._foreach_copy_(grads, start)

    bytes_moved = n * (9 if mask == "bool" else 12)
    contest(contenders, check, floor=bytes_moved / copy_rate(device, bytes_moved))
