"""The classes of input that every op meets: each changes one argument (or all) of a valid call.

The table of bench/results/robustness.md has a column for each group. `NO` where a class cannot be made of an argument.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..samples import mapped, replaced, tensors
from ..test_catalogue import op

NO = object()
FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
OTHERS = (torch.int64, torch.int32, torch.uint8, torch.bool, torch.complex64)


class Subclass(Tensor):
    """A tensor of a class that is not torch's, as users' are."""


# ---- one tensor ----


def put(value: float, everywhere: bool = False) -> Callable[[Tensor], Any]:
    def change(t: Tensor) -> Any:
        if not t.is_floating_point() or not t.numel() or t.is_meta:
            return NO
        t = t.clone()
        (t if everywhere else t[tuple(0 for _ in t.shape)]).fill_(value)
        return t

    return change


def scaled(exponent: float) -> Callable[[Tensor], Any]:
    """Of the size 10^exponent; float64 and float16 by their own range."""

    def change(t: Tensor) -> Any:
        if not t.is_floating_point() or not t.numel():
            return NO
        span = {torch.float64: 8.0, torch.float16: 0.12}.get(t.dtype, 1.0)
        return (t.double() * 10.0 ** (exponent * span)).to(t.dtype)

    return change


def with_offset(t: Tensor) -> Tensor:
    """The same values in the middle of a longer memory."""
    base = torch.zeros(t.numel() + 5, dtype=t.dtype)
    return base[3 : 3 + t.numel()].view(t.shape).copy_(t)


def with_gaps(t: Tensor) -> Tensor:
    return torch.stack([t, t], -1)[..., 0]


def transposed(t: Tensor) -> Any:
    return t.transpose(0, -1).contiguous().transpose(0, -1) if t.dim() > 1 else NO


def expanded(t: Tensor) -> Any:
    return t.flatten()[:1].reshape([1] * t.dim()).expand(t.shape) if t.numel() > 1 else NO


def sliding(t: Tensor) -> Any:
    """Every row begins one element after the one before."""
    if t.dim() < 2 or t.numel() < 2:
        return NO
    return t.flatten().as_strided(t.shape, [1] * t.dim())


def negative_view(t: Tensor) -> Any:
    """A view whose elements are minus what its memory holds (of a conjugate's imaginary part, say)."""
    return torch._neg_view(-t) if t.is_floating_point() else NO


def sparse(t: Tensor) -> Any:
    return t.to_sparse() if t.dim() else NO


def inference(t: Tensor) -> Tensor:
    with torch.inference_mode():
        return t.clone()


def other_dtype(dtype: torch.dtype) -> Callable[[Tensor], Any]:
    return lambda t: NO if t.dtype == dtype else t.to(dtype)


def requires_grad(t: Tensor) -> Any:
    return t.clone().requires_grad_() if t.is_floating_point() else NO


def has_graph(t: Tensor) -> Any:
    return t.clone().requires_grad_() * 1 if t.is_floating_point() else NO


def longer(t: Tensor) -> Any:
    return torch.cat([t, t[:1]]) if t.dim() and t.shape[0] else NO


# ---- lists, numbers, all ----


def numbers(case: str, args: Any) -> list[int]:
    return [k for k, a in enumerate(args) if isinstance(a, (int, float)) and not isinstance(a, bool)]


def lists(args: Any) -> list[int]:
    return [k for k, a in enumerate(args) if isinstance(a, (list, tuple))]


def swapped(args: Any, k: int, value: Any) -> Any:
    return (*args[:k], value, *args[k + 1 :])


def owners(case: str, args: Any) -> list[str]:
    """The argument that each tensor is in."""
    names = [argument.name for argument in op(case)._schema.arguments]
    return [name for name, a in zip(names, args, strict=False) for _ in tensors(a)]


def pairs(case: str, args: Any) -> Iterator[tuple[int, int]]:
    """Two tensors of each argument, and of each two arguments."""
    seen = set()
    names = owners(case, args)
    for i, first in enumerate(names):
        for j in range(i + 1, len(names)):
            if (first, names[j]) not in seen:
                seen.add((first, names[j]))
                yield i, j


@dataclass(frozen=True)
class Class:
    """`at(case, args)` names the places where it can be applied, `make(args, place)` gives the changed arguments."""

    name: str
    group: str
    kind: str  # tensor, pair, list, number, all
    change: Callable[..., Any]

    def at(self, case: str, args: Any) -> list[Any]:
        n = len(tensors(args))
        if self.kind == "tensor":
            return list(range(n))
        if self.kind == "pair":
            return list(pairs(case, args))
        if self.kind == "list":
            return lists(args)
        return numbers(case, args) if self.kind == "number" else [None]

    def make(self, args: Any, place: Any) -> Any:
        """The changed arguments, or NO."""
        if self.kind == "tensor":
            new = self.change(tensors(args)[place])
            return NO if new is NO else replaced(args, place, lambda t: new)
        if self.kind == "pair":
            found = self.change(*(tensors(args)[k] for k in place))
            if found is NO:
                return NO
            return replaced(replaced(args, place[0], lambda t: found[0]), place[1], lambda t: found[1])
        if self.kind in ("list", "number"):
            new = self.change(args[place])
            return NO if new is NO else swapped(args, place, new)
        return self.change(args)

    def argument(self, case: str, args: Any, place: Any) -> str:
        """The schema's name of what is changed."""
        names = [argument.name for argument in op(case)._schema.arguments]
        if self.kind in ("list", "number"):
            return names[place]
        if place is None:
            return ""
        owner = owners(case, args)
        return "/".join(dict.fromkeys(owner[k] for k in (place if self.kind == "pair" else (place,))))


def same_tensor(a: Tensor, b: Tensor) -> Any:
    return (a, a) if a.numel() else NO


def same_memory(a: Tensor, b: Tensor) -> Any:
    """Two views, the second one element later, in one memory."""
    if a.dtype != b.dtype or not a.numel() or not b.numel():
        return NO
    base = torch.cat([a.flatten(), b.flatten()])
    return base[: a.numel()].view(a.shape), base[1 : 1 + b.numel()].view(b.shape)


def all_of(change: Callable[[Tensor], Any], keep: Callable[[Tensor], bool] = lambda t: False) -> Callable[[Any], Any]:
    def every(args: Any) -> Any:
        changed = [change(t) for t in tensors(args) if not keep(t)]
        if not changed or any(c is NO for c in changed):
            return NO
        return mapped(args, lambda t: t if keep(t) else change(t))

    return every


def to_float(dtype: torch.dtype) -> Callable[[Any], Any]:
    return all_of(lambda t: t.to(dtype), keep=lambda t: not t.is_floating_point())


def no_samples(t: Tensor) -> Any:
    return t[:0] if t.dim() else NO


CLASSES: list[Class] = [
    *(Class(f"{v} in one entry", "NaN, infinity", "tensor", put(float(v))) for v in ("nan", "inf", "-inf")),
    *(Class(f"{v} everywhere", "NaN, infinity", "tensor", put(float(v), True)) for v in ("nan", "inf", "-inf")),
    *(Class(f"{v} everywhere", "out of range", "tensor", put(v, True)) for v in (-1.0, 1.5, 0.0)),
    *(Class(f"times 1e{e}", "huge, tiny", "tensor", scaled(e)) for e in (38, 20, -20, -40)),
    *(
        Class(f"all times 1e{e}", "huge, tiny", "all", all_of(scaled(e), lambda t: not t.is_floating_point()))
        for e in (19, -19)
    ),
    Class("offset", "strides", "tensor", with_offset),
    Class("gaps", "strides", "tensor", with_gaps),
    Class("transposed", "strides", "tensor", transposed),
    Class(
        "channels last",
        "strides",
        "tensor",
        lambda t: t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else NO,
    ),
    Class("expanded", "overlaps itself", "tensor", expanded),
    Class("sliding window", "overlaps itself", "tensor", sliding),
    *(Class(f"{str(d)[6:]} instead", "another dtype", "tensor", other_dtype(d)) for d in (*FLOATS, *OTHERS)),
    *(Class(f"all {str(d)[6:]}", "all of one dtype", "all", to_float(d)) for d in (*FLOATS, torch.complex64)),
    Class("0-d", "another shape", "tensor", lambda t: t.flatten()[0] if t.dim() and t.numel() else NO),
    Class("one dimension more", "another shape", "tensor", lambda t: torch.stack([t, t])),
    Class("one row more", "another shape", "tensor", longer),
    Class("one row less", "another shape", "tensor", lambda t: t[1:] if t.dim() and t.shape[0] else NO),
    Class("flat", "another shape", "tensor", lambda t: t.flatten() if t.dim() != 1 else NO),
    Class("no rows", "empty", "tensor", no_samples),
    Class("no rows in any", "empty", "all", all_of(no_samples, keep=lambda t: not t.dim())),
    Class(
        "no elements in any",
        "empty",
        "all",
        all_of(lambda t: t.new_empty([0] * t.dim()) if t.dim() else NO, lambda t: not t.dim()),
    ),
    Class("empty list", "lists", "list", lambda a: [] if a else NO),
    Class(
        "all lists empty",
        "lists",
        "all",
        lambda args: tuple([] if isinstance(a, list) else a for a in args) if lists(args) else NO,
    ),
    Class("one less", "lists", "list", lambda a: a[:-1] if a else NO),
    Class("one more", "lists", "list", lambda a: [*a, a[-1]] if a else NO),
    Class("tuple", "lists", "list", tuple),
    Class("its first", "lists", "list", lambda a: a[0] if a else NO),
    Class("reversed", "lists", "list", lambda a: a[::-1] if len(a) > 1 else NO),
    Class("on meta", "another device", "tensor", lambda t: t.to("meta")),
    Class("all on meta", "all on meta", "all", all_of(lambda t: t.to("meta"))),
    Class("same tensor", "aliases", "pair", same_tensor),
    Class("overlapping views", "aliases", "pair", same_memory),
    Class("leaf that requires grad", "requires grad", "tensor", requires_grad),
    Class("result with a graph", "requires grad", "tensor", has_graph),
    Class("negative view", "odd tensors", "tensor", negative_view),
    Class("sparse", "odd tensors", "tensor", sparse),
    Class("inference tensor", "odd tensors", "tensor", inference),
    Class("subclass", "odd tensors", "tensor", lambda t: t.clone().as_subclass(Subclass)),
    Class("None", "no tensor", "tensor", lambda t: None),
    Class("a number", "no tensor", "tensor", lambda t: 1.0),
    Class("an array", "no tensor", "tensor", lambda t: NO if t.dtype == torch.bfloat16 else t.numpy()),
    *(Class(str(v), "numbers", "number", lambda a, v=v: v) for v in (0, -1, 1e-40, 1e38, 2**31, 2**62, -(2**63))),
    *(Class(str(v), "numbers", "number", lambda a, v=v: v) for v in (float("nan"), float("inf"), -float("inf"))),
    *(Class(repr(v), "no number", "number", lambda a, v=v: v) for v in (None, "1", 1j, 10**30)),
    *(
        Class(f"{v} in it", "numbers", "list", lambda a, v=v: [v, *a[1:]] if a and isinstance(a[0], int) else NO)
        for v in (0, -1, 2**31, 2**40, 2**62, -(2**63))
    ),
]
GROUPS = list(dict.fromkeys(c.group for c in CLASSES))
BY_NAME = {(c.group, c.name): c for c in CLASSES}


def examples(case: str, args: Callable[[], Any]) -> Iterator[tuple[Class, Any, Callable[[], Any]]]:
    """Every class at every place: the class, the place, and what makes the changed arguments anew.

    Of a long list its first two tensors stand for the others, but for masks: there each has another form.
    """
    names = owners(case, args())
    kept = {k for k, name in enumerate(names) if names[:k].count(name) < (9 if name == "reserved" else 2)}
    for c in CLASSES:
        for place in c.at(case, args()):
            if (c.kind != "tensor" or place in kept) and c.make(args(), place) is not NO:
                yield c, place, lambda c=c, place=place: c.make(args(), place)
