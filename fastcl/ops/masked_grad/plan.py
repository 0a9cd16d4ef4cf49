"""A step's addresses, kept between steps: what the list ops gather and check anew each time (0.3 us a tensor and list).

A plan is built from checked tensors. Its `run` asks csrc/plan.cpp whether everything is still what it was, and steps.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim import optimizer as torch_optimizer

from ..._ops import extension
from .. import _direct as direct

# struct StepEntry of csrc/masked_grad/steps.h: int64 throughout
PARAM, STATE, STEP, MASK, INNER, KIND, ROW, NUMEL, DTYPE, WIDE_STEP, FIRST, WIDTH = 0, 2, *range(5, 15)
DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
KINDS = {torch.uint8: 2, torch.float32: 3, torch.float64: 4}  # enum MaskKind; 7 are two vectors
VECTORS = 7

_ATTRIBUTES = torch._C.TensorBase.__dict__["grad"], torch._C.TensorBase.__dict__["_version"]
_FUNCTIONS = torch._C._increment_version, torch.autograd._profiler_enabled
_HOOKS = torch_optimizer._global_optimizer_pre_hooks, torch_optimizer._global_optimizer_post_hooks


class Plan:
    """Rows of `StepEntry`, in the order of the groups' parameters that have a gradient; keeps alive what it knows."""

    def __init__(self, n: int) -> None:
        self.entries = np.zeros((n, WIDTH), np.int64)
        self._keep: list[Any] = []

    def set(self, i: int, param: Tensor, states: Sequence[Tensor | None], step: Tensor | None, first: bool) -> None:
        e = self.entries[i]
        e[PARAM], e[NUMEL], e[DTYPE], e[FIRST] = param.data_ptr(), param.numel(), DTYPES[param.dtype], first
        for slot, state in enumerate(states):
            e[STATE + slot] = 0 if state is None else state.data_ptr()
        if step is not None:
            e[STEP], e[WIDE_STEP] = step.data_ptr(), step.dtype == torch.float64

    def set_mask(self, i: int, mask: Tensor, inner: Tensor | None, row: int) -> None:
        e = self.entries[i]
        e[MASK], e[KIND] = mask.data_ptr(), VECTORS if inner is not None else KINDS[mask.dtype]
        e[INNER], e[ROW] = (inner.data_ptr(), row) if inner is not None else (0, 0)
        self._keep += [mask, inner]

    def start(
        self,
        kernel: str,
        used: tuple[str, ...],
        numbers: tuple[str, ...],
        flags: tuple[str, ...],
        watched: list[Tensor],
        written: list[Tensor],
        groups: list[dict[str, Any]],
        state: dict[Tensor, dict[str, Any]],
    ) -> None:
        """Writes down what may not change: groups, parameters, the options `used`, states, versions of `watched`."""
        self._keep += [watched, written, *groups, *state, *(p for g in groups for p in g["params"])]
        self._keep += [value for of_param in state.values() for value in of_param.values()]
        kernel_at = ctypes.cast(getattr(direct.library, kernel), ctypes.c_void_p).value
        torchs, names = (direct.exchange, *_ATTRIBUTES, *_FUNCTIONS, _HOOKS), (used, numbers, flags)
        addresses = kernel_at, self.entries.ctypes.data
        plan = extension.Plan(*torchs, *names, watched, written, *addresses, groups, state)
        self.run = plan.run  # run(groups, state): one step, or False where something has changed
        self.run_unwatched = plan.run_unwatched  # the same with the optimizer's hooks: False where there are any
