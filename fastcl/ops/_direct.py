"""Ops on plain CPU tensors, straight in the library: what the dispatcher costs a tensor is more than the work on a
small one (`pytest bench/bench_masked_grad.py -k 200-tiny`, `pytest bench/bench_overhead.py`).

**In-place list ops**, :class:`Direct`. What a call's checks look at, besides values, is its tensors' form: devices,
dtypes, shapes, strides. A call of a form that has passed the op's own checks goes by addresses (csrc/direct_calls.cpp)
to an entry of csrc/common/direct.h, which looks at what is left: overlaps and values. Where it refuses, and wherever
anything but plain tensors watches, the op itself is called and says what is wrong.

**Ops that give new tensors**, :func:`direct`: csrc/direct_functions.cpp makes the results and calls an entry that looks
at shapes, dtypes and numbers itself. `_ops.call` asks it first, and so does its autograd.Function, in both directions.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from .._ops import LIBRARY, extension, pure_python, shortcut

PLAIN = (Tensor, torch.nn.Parameter)  # exactly: a subclass may keep its values elsewhere
NUMBERS = {torch.uint8: 0, torch.float16: 5, torch.float32: 6, torch.float64: 7, torch.bool: 11, torch.bfloat16: 15}

library = None if pure_python else ctypes.CDLL(str(LIBRARY))  # the handle that is loaded already

exchange = getattr(Tensor, "__dlpack_c_exchange_api__", None)  # since torch 2.11
available = library is not None and extension is not None and extension.can_describe(exchange)

_TRACKING = (
    torch._C.TensorBase.__dict__["requires_grad"],
    torch._C.TensorBase.__dict__["is_leaf"],
    torch.is_grad_enabled,
)
_WATCHERS = (
    torch._C._are_functorch_transforms_active,
    torch._C._len_torch_dispatch_stack,
    torch._C._len_torch_function_stack,
    torch._C._get_tracing_state,
    torch.autograd._profiler_enabled,
)


def is_plain(t: Tensor) -> bool:
    """A strided CPU tensor without gaps, not a subclass with other storage (DTensor)."""
    return (
        t.layout == torch.strided
        and t.device.type == "cpu"
        and type(t) in PLAIN
        and not isinstance(t, torch._subclasses.FakeTensor)
        and torch.ops.aten.is_non_overlapping_and_dense.default(t)
    )


class Direct:
    """An in-place op whose first `n_lists` arguments are lists of tensors, the first `n_mutated` of them mutated.

    Its entry in libfastcl is a function of addresses, struct DirectLists, whether they are the last call's, and the
    rest of the arguments as doubles; it returns 0 where it is done. `otherwise` is the call through the dispatcher.
    """

    def __init__(self, op: torch._ops.OpOverload, n_lists: int, n_mutated: int, otherwise: Callable[..., None]) -> None:
        self.n_lists, self.n_mutated, self.otherwise = n_lists, n_mutated, otherwise
        self.calls = None
        if available:
            entry = ctypes.cast(getattr(library, f"direct_{op._opname}"), ctypes.c_void_p).value
            sizes = n_lists, n_mutated, len(op._schema.arguments) - n_lists
            self.calls = extension.DirectCalls(exchange, PLAIN, *_TRACKING, _WATCHERS, increment_version, entry, *sizes)

    def __call__(self, *args: Any) -> None:
        if self.calls is None or torch.compiler.is_compiling():
            return self.otherwise(*args)
        done = self.calls.call(args)
        if done is True:
            return None
        self.otherwise(*args)
        if done is None and self._may_be_known(lists := args[: self.n_lists]):
            tensors = [t for one in lists for t in one]
            self.calls.learn(args, [t.numel() for t in tensors], [NUMBERS[t.dtype] for t in tensors])
        return None

    def _may_be_known(self, lists: Sequence[Sequence[Tensor]]) -> bool:
        for first, *others in zip(*lists, strict=True):
            alike = [t for t in others if t.shape == first.shape]  # the rest are packed bits
            if any(t.stride() != first.stride() for t in alike):
                return False
            if not all(is_plain(t) and t.dtype in NUMBERS for t in (first, *others)):
                return False
        return True


def direct(op: torch._ops.OpOverload, *like: str | None) -> None:
    """Gives an op that returns tensors its entry.

    `like`: the argument of which each result has shape and dtype, None for a float32 number. Plain here: also
    contiguous and below 4 MB.
    """
    if not available:
        return
    kinds = {"Tensor": "t", "Optional[Tensor]": "?", "float": "n", "int": "n"}
    arguments = op._schema.arguments
    tensors = [a.name for a in arguments if kinds[str(a.type)] != "n"]
    function = extension.DirectFunction(
        exchange,
        PLAIN,
        _TRACKING[0],
        _TRACKING[2],
        _WATCHERS,
        torch.empty_like,
        torch.zeros((), dtype=torch.float32, device="cpu"),
        ctypes.cast(getattr(library, f"function_{op._opname}"), ctypes.c_void_p).value,
        "".join(kinds[str(a.type)] for a in arguments),
        tuple(-1 if name is None else tensors.index(name) for name in like),
    )
    shortcut(op, function.call)
