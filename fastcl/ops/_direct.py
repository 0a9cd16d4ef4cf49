"""In-place list ops on plain CPU tensors, straight in the library: what the dispatcher costs a tensor is more than the
work on a small one (`pytest bench/bench_masked_grad.py -k 200-tiny`).

What a call's checks look at, besides values, is its tensors' form: devices, dtypes, shapes, strides. A call of a form
that has passed the op's own checks goes to an entry of csrc/common/direct.h by addresses, which looks at what is left:
overlaps and values. Where it refuses, and wherever anything but plain tensors watches, the op itself is called and says
what is wrong.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .._ops import LIBRARY, extension, pure_python, refuse_tracked

PLAIN = (Tensor, torch.nn.Parameter)  # exactly: a subclass may keep its values elsewhere
NUMBERS = {torch.uint8: 0, torch.float16: 5, torch.float32: 6, torch.float64: 7, torch.bool: 11, torch.bfloat16: 15}
KNOWN = 4  # forms an op remembers: a model's, and a few others' in turn

library = None if pure_python else ctypes.CDLL(str(LIBRARY))  # the handle that is loaded already

exchange = getattr(Tensor, "__dlpack_c_exchange_api__", None)  # since torch 2.11
available = library is not None and extension is not None and extension.can_describe(exchange)
_requires_grad = torch._C.TensorBase.__dict__["requires_grad"]
_transforming = torch._C._are_functorch_transforms_active
_modes = torch._C._len_torch_dispatch_stack, torch._C._len_torch_function_stack, torch._C._get_tracing_state
_profiling = torch.autograd._profiler_enabled


def is_plain(t: Tensor) -> bool:
    """A strided CPU tensor without gaps, not a subclass with other storage (DTensor)."""
    return (
        t.layout == torch.strided
        and t.device.type == "cpu"
        and type(t) in PLAIN
        and not isinstance(t, torch._subclasses.FakeTensor)
        and torch.ops.aten.is_non_overlapping_and_dense.default(t)
    )


class _Lists(ctypes.Structure):
    """struct DirectLists of csrc/common/direct.h."""

    _fields_ = [(name, ctypes.c_int64) for name in ("n", "lists", "mutated")]
    _fields_ += [(name, ctypes.c_void_p) for name in ("numels", "dtypes")]


class _Known:
    """A form that has passed, and the addresses and objects of its last call: what they were, they still are."""

    def __init__(self, form: Any, lists: Sequence[Sequence[Tensor]], n_mutated: int) -> None:
        tensors = [t for tensors in lists for t in tensors]
        self.form, self.last = form, (b"", b"")
        self.numels = np.array([t.numel() for t in tensors], np.int64)
        self.dtypes = np.array([NUMBERS[t.dtype] for t in tensors], np.int64)
        self.floating = [i for i, one in enumerate(lists) if any(t.dtype.is_floating_point for t in one)]
        self.lists = _Lists(len(lists[0]), len(lists), n_mutated, self.numels.ctypes.data, self.dtypes.ctypes.data)


class Direct:
    """An in-place op whose first `n_lists` arguments are lists of tensors, the first `n_mutated` of them mutated.

    Its entry in libfastcl is a function of addresses, struct DirectLists, whether they are the last call's, and the
    rest of the arguments as doubles; it returns 0 where it is done. `otherwise` is the call through the dispatcher.
    """

    def __init__(self, op: torch._ops.OpOverload, n_lists: int, n_mutated: int, otherwise: Callable[..., None]) -> None:
        self.op, self.n_lists, self.n_mutated, self.otherwise = op, n_lists, n_mutated, otherwise
        self.known: list[_Known] = []
        if library is not None:
            self.entry = getattr(library, f"direct_{op._opname}")
            pointers = [ctypes.c_char_p, ctypes.c_void_p, ctypes.c_int64]
            self.entry.argtypes = pointers + [ctypes.c_double] * (len(op._schema.arguments) - n_lists)
            self.entry.restype = ctypes.c_int64

    def __call__(self, *args: Any) -> None:
        lists = args[: self.n_lists]
        described = self._described(lists)
        if described is None:
            return self.otherwise(*args)
        addresses, form, objects = described
        for known in self.known:
            if known.form == form:
                return None if self._run(known, (addresses, objects), args) else self.otherwise(*args)
        self.otherwise(*args)
        if self._may_be_known(lists):
            self.known = [_Known(form, lists, self.n_mutated), *self.known[: KNOWN - 1]]
        return None

    def _described(self, lists: Sequence[Any]) -> tuple[bytes, Any, bytes] | None:
        if not available or torch.compiler.is_compiling():
            return None
        if _transforming() or any(mode() for mode in _modes) or _profiling():
            return None
        tensors: list[Tensor] = []
        for one in lists:
            if not isinstance(one, (list, tuple)) or len(one) != len(lists[0]):
                return None
            tensors += one
        try:
            n = len(lists[0]) * self.n_mutated if torch.is_grad_enabled() else 0
            return extension.describe_plain(exchange, tensors, PLAIN, _requires_grad, n) if tensors else None
        except (RuntimeError, TypeError, BufferError):  # sparse, or no tensor
            return None

    def _run(self, known: _Known, which: tuple[bytes, bytes], args: Sequence[Any]) -> bool:
        mutated = [t for tensors in args[: self.n_mutated] for t in tensors]
        floating = [args[i] for i in known.floating]
        if torch.is_grad_enabled():
            refuse_tracked(self.op, (), floating[self.n_mutated :])
        same, numbers = which == known.last, args[self.n_lists :]
        if not same and any(any(map(Tensor.is_neg, tensors)) for tensors in floating):
            return False  # memory holds minus what the tensor says
        if not all(isinstance(number, (int, float)) for number in numbers):
            return False
        if self.entry(which[0], ctypes.addressof(known.lists), same, *numbers) != 0:
            return False
        known.last = which
        torch.autograd.graph.increment_version(mutated)
        return True

    def _may_be_known(self, lists: Sequence[Sequence[Tensor]]) -> bool:
        for first, *others in zip(*lists, strict=True):
            alike = [t for t in others if t.shape == first.shape]  # the rest are packed bits
            if any(t.stride() != first.stride() for t in alike):
                return False
            if not all(is_plain(t) and t.dtype in NUMBERS for t in (first, *others)):
                return False
        return True
