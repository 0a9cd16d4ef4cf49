"""A step's addresses, kept between steps: what the list ops gather and check anew each time (0.3 us a tensor and list).

A plan is built from checked tensors and called straight in the library (ctypes, 1 us). It stays valid as long as the
caller finds every address unchanged; :class:`Plan` keeps the tensors alive, so an address means the same memory.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from .._direct import library

# struct StepEntry of csrc/masked_grad/steps.h: int64 throughout
PARAM, GRAD, STATE, STEP, MASK, INNER, KIND, ROW, NUMEL, DTYPE, WIDE_STEP, FIRST, WIDTH = 0, 1, 2, *range(5, 15)
DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
KINDS = {torch.uint8: 2, torch.float32: 3, torch.float64: 4}  # enum MaskKind; 7 are two vectors
VECTORS = 7


class SgdOptions(ctypes.Structure):
    _fields_ = [(name, ctypes.c_double) for name in ("lr", "momentum", "dampening", "weight_decay")]
    _fields_ += [(name, ctypes.c_int64) for name in ("nesterov", "maximize")]


class AdamOptions(ctypes.Structure):
    _fields_ = [(name, ctypes.c_double) for name in ("lr", "beta1", "beta2", "eps", "weight_decay")]
    _fields_ += [(name, ctypes.c_int64) for name in ("decoupled", "maximize")]


available = library is not None
if library is not None:
    _sgd, _adam = library.masked_sgd_entries, library.masked_adam_entries
    for function in (_sgd, _adam):
        function.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p]
        function.restype = None


class Plan:
    """Rows of `StepEntry`; `keep` are the tensors behind the addresses."""

    def __init__(self, n: int) -> None:
        self.entries = np.zeros((n, WIDTH), np.int64)
        self.keep: list[Tensor] = []
        self._row = self.entries.strides[0]

    def set(self, i: int, param: Tensor, states: Sequence[Tensor | None], step: Tensor | None, first: bool) -> None:
        e = self.entries[i]
        e[PARAM], e[NUMEL], e[DTYPE], e[FIRST] = param.data_ptr(), param.numel(), DTYPES[param.dtype], first
        for slot, state in enumerate(states):
            e[STATE + slot] = 0 if state is None else state.data_ptr()
        if step is not None:
            e[STEP], e[WIDE_STEP] = step.data_ptr(), step.dtype == torch.float64
        self.keep += [t for t in (param, *states, step) if t is not None]

    def set_mask(self, i: int, mask: Tensor, inner: Tensor | None, row: int) -> None:
        e = self.entries[i]
        e[MASK], e[KIND] = mask.data_ptr(), VECTORS if inner is not None else KINDS[mask.dtype]
        e[INNER], e[ROW] = (inner.data_ptr(), row) if inner is not None else (0, 0)
        self.keep += [mask] if inner is None else [mask, inner]

    def sgd(self, begin: int, end: int, options: SgdOptions) -> None:
        _sgd(self.entries.ctypes.data + begin * self._row, end - begin, ctypes.addressof(options))
        self.entries[begin:end, FIRST] = 0

    def adam(self, begin: int, end: int, options: AdamOptions) -> None:
        _adam(self.entries.ctypes.data + begin * self._row, end - begin, ctypes.addressof(options))
