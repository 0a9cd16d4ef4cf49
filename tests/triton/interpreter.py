"""Triton's interpreter, repaired and watched. TRITON_INTERPRET=1 must be set before triton is first imported.

:func:`repair` makes bf16 what hardware does (the interpreter computes on the bit patterns and truncates casts) and
rounds tf32 operands as tensor cores do. :class:`Watch` finds accesses out of bounds and races between programs.
Both patch private classes of Triton 3.6 to 3.9.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton._C.libtriton import ir
from triton.runtime import interpreter as inner

Builder, Handle, Executor = inner.InterpreterBuilder, inner.TensorHandle, inner.GridExecutor


def _is_bf16(h: Any) -> bool:
    return h.dtype.scalar == tl.bfloat16 and h.data.dtype == np.uint16


def _widen(h: Any) -> Any:
    return Handle((h.data.astype(np.uint32) << np.uint32(16)).view(np.float32), tl.float32) if _is_bf16(h) else h


def _round_to_bf16(x: np.ndarray) -> np.ndarray:
    """Nearest, ties to even; NaN stays NaN."""
    x = np.asarray(x, np.float32)
    bits = x.view(np.uint32)
    rounded = ((bits.astype(np.uint64) + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FC0), rounded)


def _round_to_tf32(x: np.ndarray) -> np.ndarray:
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    one = np.uint32(1)
    return ((bits + np.uint32(0x0FFF) + ((bits >> np.uint32(13)) & one)) & np.uint32(0xFFFFE000)).view(np.float32)


def _narrow(h: Any, was_bf16: bool) -> Any:
    return Handle(_round_to_bf16(h.data), tl.bfloat16) if was_bf16 and h.data.dtype == np.float32 else h


def repair() -> None:
    if getattr(Builder, "_fastcl", False):
        return
    Builder._fastcl = True
    cast, binary, unary, ternary = Builder.cast_impl, Builder.binary_op, Builder.unary_op, Builder.ternary_op
    dot, convert = Builder.create_dot, Builder.create_fp_to_fp

    def cast_impl(self: Any, source: Any, target: Any) -> Any:
        source = _widen(source)
        if target.scalar == tl.bfloat16 and source.dtype.scalar != tl.bfloat16:
            return Handle(_round_to_bf16(source.data.astype(np.float32)), tl.bfloat16)
        return cast(self, source, target)

    def binary_op(self: Any, a: Any, b: Any, op: Any) -> Any:
        return _narrow(binary(self, _widen(a), _widen(b), op), _is_bf16(a) or _is_bf16(b))

    def unary_op(self: Any, a: Any, op: Any) -> Any:
        return _narrow(unary(self, _widen(a), op), _is_bf16(a))

    def ternary_op(self: Any, a: Any, b: Any, c: Any, op: Any) -> Any:
        if op is np.where and _is_bf16(b) and _is_bf16(c):
            return ternary(self, a, b, c, op)  # a choice of bits
        return _narrow(ternary(self, _widen(a), _widen(b), _widen(c), op), _is_bf16(c))

    def create_dot(self: Any, a: Any, b: Any, d: Any, precision: Any, imprecise: Any) -> Any:
        a, b = _widen(a), _widen(b)
        if precision == ir.INPUT_PRECISION.TF32 and a.data.dtype == np.float32:
            a, b = Handle(_round_to_tf32(a.data), tl.float32), Handle(_round_to_tf32(b.data), tl.float32)
        return dot(self, a, b, d, precision, imprecise)

    def create_fp_to_fp(self: Any, source: Any, target: Any, mode: Any) -> Any:
        scalars = source.dtype.scalar, target.scalar
        if tl.bfloat16 in scalars and max(s.primitive_bitwidth for s in scalars) >= 16:
            return cast_impl(self, source, target)
        return convert(self, source, target, mode)

    Builder.cast_impl, Builder.binary_op, Builder.unary_op = cast_impl, binary_op, unary_op
    Builder.ternary_op, Builder.create_dot, Builder.create_fp_to_fp = ternary_op, create_dot, create_fp_to_fp
    if not hasattr(Builder, "get_bf16"):  # 3.6
        Builder.get_bf16 = lambda self, value: Handle(_round_to_bf16(np.array([value], np.float32)), tl.bfloat16)
    patch = inner._patch_lang_tensor

    def patch_tensor(tensor: Any, scope: Any) -> None:  # range(a runtime scalar): 3.6 with NumPy >= 2.4
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.squeeze()))

    inner._patch_lang_tensor = patch_tensor


class Watch:
    """Inside `with Watch(*tensors):` every lane of every access must lie in an argument or in one of `tensors` (those
    behind tables of addresses), and no program may write where another of its launch has read or written."""

    launches = 0

    def __init__(self, *tensors: torch.Tensor) -> None:
        self.tensors = tensors

    def __enter__(self) -> Watch:
        self.saved = [
            (owner, name, getattr(owner, name))
            for owner, name in (
                (Builder, "create_masked_load"),
                (Builder, "create_masked_store"),
                (Builder, "create_atomic_rmw"),
                (Builder, "create_atomic_cas"),
                (Executor, "_init_args_hst"),
                (Executor, "__call__"),
            )
        ]
        load, store, _, _, init, call = (original for _, _, original in self.saved)
        watch = self

        def refuse(*args: Any) -> None:
            raise AssertionError("an atomic: sums would depend on the order of programs")

        def masked_load(self: Any, pointers: Any, mask: Any, *args: Any) -> Any:
            places = watch._inside(self, pointers, mask, "load")
            watch._clash(watch.written, places, self.grid_idx, "load of what another program stores")
            watch.read.update(dict.fromkeys(places, self.grid_idx))
            return load(self, pointers, mask, *args)

        def masked_store(self: Any, pointers: Any, value: Any, mask: Any, *args: Any) -> Any:
            places = watch._inside(self, pointers, mask, "store")
            for seen, what in ((watch.written, "two stores"), (watch.read, "store to what another program loads")):
                watch._clash(seen, places, self.grid_idx, what)
            watch.written.update(dict.fromkeys(places, self.grid_idx))
            return store(self, pointers, value, mask, *args)

        def init_args(self: Any, args: Any, kwargs: Any) -> Any:
            args, kwargs = init(self, args, kwargs)
            given = [t for t in (*args, *kwargs.values()) if isinstance(t, torch.Tensor)]
            spans = set()
            for t in (*given, *watch.tensors):
                begin = t.untyped_storage().data_ptr()
                spans.add((begin, begin + t.untyped_storage().nbytes()))
            watch.spans = np.array(sorted(spans), np.uint64).reshape(-1, 2)
            return args, kwargs

        def launch(self: Any, *args: Any, **kwargs: Any) -> Any:
            watch.written, watch.read = {}, {}
            watch.launches += 1
            return call(self, *args, **kwargs)

        Builder.create_masked_load, Builder.create_masked_store = masked_load, masked_store
        Builder.create_atomic_rmw = Builder.create_atomic_cas = refuse
        Executor._init_args_hst, Executor.__call__ = init_args, launch
        return self

    def __exit__(self, *exception: Any) -> None:
        for owner, name, original in self.saved:
            setattr(owner, name, original)

    def _inside(self, builder: Any, pointers: Any, mask: Any, what: str) -> list[int]:
        shape = pointers.data.shape
        active = np.ones(shape, bool) if mask is None else np.broadcast_to(mask.data.astype(bool), shape)
        places = pointers.data[active].astype(np.uint64).ravel()
        size = np.uint64(max(1, pointers.get_element_ty().primitive_bitwidth // 8))
        if places.size:
            owner = np.searchsorted(self.spans[:, 0], places, side="right") - 1
            outside = (owner < 0) | (places + size > self.spans[np.maximum(owner, 0), 1])
            if outside.any():
                lanes = f"{int(outside.sum())} of {places.size} lanes"
                raise IndexError(f"{what} out of bounds: {lanes} in program {builder.grid_idx}")
        return places.tolist()

    @staticmethod
    def _clash(seen: dict[int, Any], places: list[int], program: Any, what: str) -> None:
        for place in places:
            if seen.get(place, program) != program:
                raise RuntimeError(f"race: {what}, by programs {seen[place]} and {program}")
