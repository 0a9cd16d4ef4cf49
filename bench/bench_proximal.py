"""Soft threshold over a whole model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

import fastcl


def test_soft_threshold(contest: Callable, compiled: Callable, copy_rate: Callable, device, shapes) -> None:
    tensors = [torch.randn(s, device=device) for s in shapes]
    n = sum(t.numel() for t in tensors)

    def loop() -> None:
        for w in tensors:
            w.copy_(torch.sign(w) * torch.clamp(w.abs() - 1e-6, min=0))

    def softshrink() -> None:
        for w in tensors:
            w.copy_(torch.nn.functional.softshrink(w, 1e-6))

    def foreach() -> None:
        size = torch._foreach_abs(tensors)
        torch._foreach_sub_(size, 1e-6)
        torch._foreach_clamp_min_(size, 0)
        signs = torch._foreach_sign(tensors)
        torch._foreach_mul_(size, signs)
        torch._foreach_copy_(tensors, size)

    contenders: dict[str, Any] = {
        "fastcl": lambda: fastcl.ops.soft_threshold_(tensors, 1e-6),
        "eager": loop,
        "softshrink": softshrink,
        "_foreach_": foreach,
        **compiled(loop),
    }

    def check(contenders: dict[str, Any]) -> None:
        start = [t.clone() for t in tensors]
        for call in contenders.values():
            torch._foreach_copy_(tensors, start)
            call()
            for w, s in zip(tensors, start, strict=True):
                torch.testing.assert_close(w, torch.nn.functional.softshrink(s, 1e-6))

    contest(contenders, check, floor=8 * n / copy_rate(device, 8 * n))
