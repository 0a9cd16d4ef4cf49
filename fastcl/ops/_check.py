"""The checks of the plain torch references: the kernels' own rules and words, for builds without a compiler."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Generator, Sequence
from itertools import pairwise
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

T = TypeVar("T")
Checked = Generator[None, None, T]


def reference(body: Callable[..., Checked[T]]) -> Callable[..., T]:
    """A reference in two parts: what stands before its ``yield`` checks and writes nothing, the rest computes.

    ``reference.check(*args)`` is the first part alone: the Triton halves begin with it.
    """

    @functools.wraps(body)
    def run(*args: Any, **kwargs: Any) -> T:
        parts = body(*args, **kwargs)
        try:
            next(parts)
        except AttributeError:  # torch's dispatcher lets None through where a tensor must stand
            for name, arg in zip(inspect.signature(body).parameters, args, strict=False):
                if arg is None:
                    raise TypeError(f"{body.__name__}: {name} must be a tensor, not NoneType") from None
            raise
        try:
            next(parts)
        except StopIteration as result:
            return result.value
        raise AssertionError(f"{body.__name__} yields twice")

    run.check = lambda *args: next(body(*args))  # type: ignore[attr-defined]
    return run


FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def has_values(t: Tensor) -> bool:
    """False for meta and fake tensors, and while a CUDA graph is captured: values cannot be looked at."""
    if t.device.type == "meta" or isinstance(t, FakeTensor) or torch.compiler.is_compiling():
        return False
    return not (t.is_cuda and torch.cuda.is_current_stream_capturing())


def number(op: str, name: str, value: float, *, finite: bool = True) -> None:
    if not value >= 0 or (finite and math.isinf(value)):
        must = "finite and not negative" if finite else "not negative or NaN"
        raise ValueError(f"{op}: {name} is {value} but must be {must}")


def lengths(op: str, name: str, n: int, like: str, expected: int) -> None:
    if n != expected:
        raise ValueError(f"{op}: {name} has {n} tensors but must have as many as {like}, {expected}")


def strided(op: str, name: str, t: Tensor) -> None:
    """For a sparse tensor torch finds no kernel of ours and takes the reference, which is not written for it."""
    if t.layout != torch.strided:
        raise ValueError(f"{op}: {name} must be dense, not {str(t.layout).removeprefix('torch.')}")


def floating(op: str, name: str, t: Tensor) -> None:
    strided(op, name, t)
    if t.dtype not in FLOATS:
        raise ValueError(f"{op}: {name} must be float32, float64, bfloat16 or float16")


def device(op: str, name: str, t: Tensor, like_name: str, other: Tensor) -> None:
    strided(op, name, t)
    if t.device != other.device:
        raise ValueError(f"{op}: {name} must be a {other.device.type.upper()} tensor like {like_name}")


def like(op: str, name: str, t: Tensor, like_name: str, other: Tensor, *, dtype: bool = False) -> None:
    device(op, name, t, like_name, other)
    if t.shape != other.shape:
        raise ValueError(
            f"{op}: {name} has shape {list(t.shape)} but must have the shape of {like_name}, {list(other.shape)}"
        )
    if dtype and t.dtype != other.dtype:
        raise ValueError(f"{op}: {name} must have the dtype of {like_name}")


def output(op: str, name: str, t: Tensor) -> None:
    strided(op, name, t)
    dims = [(stride, size) for size, stride in zip(t.shape, t.stride(), strict=True) if size > 1]
    if any(stride == 0 for stride, _ in dims) or (has_values(t) and t.numel() and _overlaps_itself(dims)):
        raise ValueError(f"{op}: {name} overlaps itself (an expanded tensor): write to a contiguous clone instead")


def _overlaps_itself(dims: list[tuple[int, int]]) -> bool:
    """Sorted by stride, every dimension must step over all that the smaller ones reach."""
    reach = 0
    for stride, size in sorted(dims):
        if stride <= reach:
            return True
        reach += (size - 1) * stride
    return False


def distinct(op: str, name: str, outputs: Sequence[Tensor], **inputs: Sequence[Tensor]) -> None:
    """No output may share memory with another output or with an input."""
    seen: list[tuple[int, int, str]] = []
    for i, t in enumerate(outputs):
        if not has_values(t) or not t.numel():
            continue
        seen.append((*_span(t), f"{name}[{i}]"))
    seen.sort()
    for (_, end, before), (begin, _, after) in pairwise(seen):
        if end > begin:
            raise ValueError(f"{op}: {after} shares memory with {before}: each must have its own")
    for list_name, tensors in inputs.items():
        for i, t in enumerate(tensors):
            if not has_values(t) or not t.numel():
                continue
            begin, end = _span(t)
            for low, high, owner in seen:
                if begin < high and low < end:
                    raise ValueError(f"{op}: {list_name}[{i}] shares memory with {owner}, which is written")


def _span(t: Tensor) -> tuple[int, int]:
    last = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
    return t.data_ptr(), t.data_ptr() + (last + 1) * t.element_size()


def in_unit_interval(op: str, name: str, t: Tensor) -> None:
    if has_values(t) and t.dtype != torch.bool and not ((t >= 0) & (t <= 1)).all():
        raise ValueError(f"{op}: {name} has values outside [0, 1] or NaN")


def not_negative(op: str, name: str, t: Tensor) -> None:
    if has_values(t) and not (t >= 0).all():
        raise ValueError(f"{op}: {name} has NaN or negative values")


def mask(op: str, name: str, t: Tensor, columns: Tensor | None, like_name: str, other: Tensor, values: bool) -> None:
    """A reserved mask in one of the forms of :func:`free_share`."""
    device(op, name, t, like_name, other)
    n = other.numel()
    if n == 0:
        return
    if columns is not None and columns.numel():
        if t.dtype not in FLOATS or columns.dtype not in FLOATS:
            raise ValueError(f"{op}: {name} and its columns must be float32, float64, bfloat16 or float16")
        device(op, f"the columns of {name}", columns, like_name, other)
        if other.dim() < 2 or (t.shape, columns.shape) != (other.shape[:1], other.shape[1:2]):
            raise ValueError(
                f"{op}: {name} and its columns have {t.numel()} and {columns.numel()} values but must be vectors with "
                f"one for each index of dimensions 0 and 1 of {like_name}"
            )
        if values:
            in_unit_interval(op, name, t)
            in_unit_interval(op, name, columns)
        return
    if t.dtype == torch.bool and t.shape == (0,):
        return
    if t.dtype == torch.uint8:
        if t.dim() != 1 or t.numel() != (n + 7) // 8:
            raise ValueError(
                f"{op}: {name} has {t.numel()} bytes in {t.dim()} dimensions but packed bits for {like_name} must be "
                f"one dimension of {(n + 7) // 8}"
            )
        return
    if t.dtype != torch.bool and t.dtype not in FLOATS:
        raise ValueError(f"{op}: {name} must be bool, uint8 (packed bits), float32, float64, bfloat16 or float16")
    like(op, name, t, like_name, other)
    if values:
        in_unit_interval(op, name, t)


def dense(t: Tensor) -> Tensor:
    """`t` if it fills its memory without gaps, in whatever order; else a copy in that order."""
    expected = 1
    for dim in reversed(_memory_order(t)):
        if t.shape[dim] != 1 and t.stride(dim) != expected:
            return torch.empty_like(t).copy_(t)
        expected *= t.shape[dim]
    return t


def _memory_order(t: Tensor) -> list[int]:
    return sorted((d for d in range(t.dim())), key=lambda d: -t.stride(d) if t.shape[d] != 1 else -t.numel())


def flat(t: Tensor) -> Tensor:
    """The elements in memory order."""
    t = dense(t)
    return t.permute(_memory_order(t)).reshape(-1)


def unpack(packed: Tensor, like: Tensor) -> Tensor:
    """One bit an element of `like`, in its memory order: bit i % 8 of byte i // 8."""
    like = dense(like)
    order = _memory_order(like)
    bits = (packed.unsqueeze(1) >> torch.arange(8, dtype=torch.uint8, device=packed.device)) & 1
    inverse = sorted(range(len(order)), key=order.__getitem__)
    found = bits.reshape(-1)[: like.numel()].bool().reshape([like.shape[d] for d in order]).permute(inverse)
    return torch.empty_like(like, dtype=torch.bool).copy_(found)


def free_share(t: Tensor, columns: Tensor | None, weight: Tensor) -> Tensor | None:
    """1 - r in float32 (float64 for a float64 weight): 0 exactly where r is 1; None without a mask.

    `t`: bool or float of the weight's shape, packed bits (uint8), or with `columns` one value for each index of
    dimension 0, and in `columns` of dimension 1: r = min(t[i], columns[j]). Bool of shape [0]: no mask.
    """
    wide = torch.promote_types(weight.dtype, torch.float32)
    if weight.numel() == 0:
        return None
    if columns is not None and columns.numel():
        shape = [weight.shape[0], weight.shape[1], *[1] * (weight.dim() - 2)]
        r = torch.minimum(t.to(wide).unsqueeze(1), columns.to(wide).unsqueeze(0)).reshape(shape)
        return (1 - r).expand(weight.shape)
    if t.dtype == torch.bool and t.shape == (0,):
        return None
    if t.dtype == torch.uint8:
        return (~unpack(t, weight)).to(wide)
    return 1 - t.to(wide)
