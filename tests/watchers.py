"""Who must see an op although its kernel could be called past the dispatcher."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


def seen_by_a_mode(op: str, call: Callable[[], Any]) -> bool:
    seen: list[str] = []

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    with Mode():
        call()
    return any(op in name for name in seen)


def seen_by_the_profiler(op: str, call: Callable[[], Any]) -> bool:
    with torch.profiler.profile() as profile:
        call()
    return any(op in event.key for event in profile.key_averages())
