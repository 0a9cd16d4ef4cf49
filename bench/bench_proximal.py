"""Soft threshold over a whole model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import fastcl
from fastcl.bench import workloads


def test_soft_threshold(play: Callable, compiled: Callable, device, shapes) -> None:
    play(workloads.soft_threshold(device, compiled, shapes))


def test_group_soft_threshold(contest: Callable, compiled: Callable, copy_rate: Callable, device, shapes) -> None:
    """Group lasso over the rows of every matrix and filter."""
    tensors = [torch.randn(s, device=device) for s in shapes if len(s) > 1]
    if not tensors:
        pytest.skip("no matrices")
    n = sum(t.numel() for t in tensors)

    def loop() -> None:
        for w in tensors:
            norm = torch.linalg.vector_norm(w.flatten(1), dim=1).view(-1, *[1] * (w.dim() - 1))
            w.mul_((1 - 1e-6 / norm).clamp(min=0))

    def check(contenders: dict[str, Any]) -> None:
        start = [t.clone() for t in tensors]
        results = []
        for call in contenders.values():
            torch._foreach_copy_(tensors, start)
            call()
            results.append([t.clone() for t in tensors])
        for other in results[1:]:
            for a, b in zip(results[0], other, strict=True):
                torch.testing.assert_close(a, b)

    contenders = {"fastcl": lambda: fastcl.ops.group_soft_threshold_(tensors, 1e-6, 0), "eager": loop, **compiled(loop)}
    contest(contenders, check, floor=12 * n / copy_rate(device, 8 * n))
