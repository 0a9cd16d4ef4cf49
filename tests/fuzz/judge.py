"""One call of an op on any arguments: it equals the float64 reference, or it raises and every bit is as it was.

Everything else (another exception, a value that the reference does not have, a byte written that should not be, kernel
and reference of different opinions about what is bad) is an AssertionError.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..samples import OPS, in_float64, mapped, op_name, tensors
from ..test_catalogue import ROUNDING, op, public, reference

# MemoryError: a size that is legal and cannot be had
REFUSALS = (ValueError, TypeError, RuntimeError, MemoryError)
WAYS: dict[str, Callable[[str, Any], Any]] = {"raw": lambda case, args: op(case)(*args), "public": public}


ANNEALED = {"annealed_mask", "compensated_mask", "masked_weight", "masked_weight_kept"}
ANNEALED |= {f"{name}_backward" for name in ANNEALED}
# `public` of test_catalogue.py turns these into options: another value would not arrive
ONLY_RAW = {(name, n) for name in ("masked_weight", "masked_weight_kept") for n in ("s_max", "compensation")}
ONLY_RAW |= {("accumulate_affine_", "weights"), ("accumulate_affine_", "biases")}


@dataclass
class Verdict:
    """`equals` (the reference; `nans`: NaN or infinity came out) or `raises` (`error`: the message)."""

    outcome: str
    error: str = ""
    nans: bool = False


def has_bytes(t: Any) -> bool:
    return isinstance(t, Tensor) and t.layout == torch.strided and not t.is_meta and t.untyped_storage().nbytes() > 0


def memory(t: Tensor) -> Tensor:
    """All bytes of the storage that `t` looks at, also those between and around its elements."""
    return torch.empty(0, dtype=torch.uint8).set_(t.untyped_storage())


class Before:
    """The arguments' bytes, versions and forms before a call."""

    def __init__(self, args: Any) -> None:
        self.all = tensors(args)
        self.bytes = {t.untyped_storage().data_ptr(): memory(t).clone() for t in self.all if has_bytes(t)}
        self.forms = [self._form(t) for t in self.all]
        self.versions = [t._version for t in self.all if not t.is_inference()]

    @staticmethod
    def _form(t: Tensor) -> tuple[Any, ...]:
        strides = t.stride() if t.layout == torch.strided else ()
        return t.shape, strides, t.dtype, t.device, t.requires_grad, t.is_leaf

    def check_untouched(self) -> None:
        self.check_only([])
        assert [t._version for t in self.all if not t.is_inference()] == self.versions, "a version counter moved"

    def check_only(self, written: list[Tensor]) -> None:
        """No byte differs but those that the elements of `written` occupy."""
        expected = {key: kept.clone() for key, kept in self.bytes.items()}
        for t in written:
            if has_bytes(t):
                kept = expected[t.untyped_storage().data_ptr()]
                there = torch.empty(0, dtype=t.dtype).set_(
                    kept.untyped_storage(), t.storage_offset(), t.size(), t.stride()
                )
                there.copy_(t)
        for t in self.all:
            if has_bytes(t):
                assert torch.equal(memory(t), expected[t.untyped_storage().data_ptr()]), "bytes of an argument changed"
        assert [self._form(t) for t in self.all] == self.forms, "an argument's shape, dtype or grad mode changed"


def judge(case: str, args: Any, way: str = "raw") -> Verdict:
    before = Before(args)
    wanted = Wanted(case, args)
    try:
        result = WAYS[way](case, args)
    except REFUSALS as error:
        raised: Exception = error
    else:
        return wanted.verdict(before, result, tensors(args[: OPS[case].mutates]))
    assert str(raised), f"{type(raised).__name__} without a message"
    before.check_untouched()
    return Verdict("raises", f"{type(raised).__name__}: {raised}")


class Wanted:
    """What the reference gives for copies of the arguments, computed before the call changes them."""

    def __init__(self, case: str, args: Any) -> None:
        self.case = case
        # an int where the schema has a float arrives in the kernel as one
        kinds = [str(argument.type) for argument in op(case)._schema.arguments]
        real = [float(a) if k == "float" and isinstance(a, int) else a for k, a in zip(kinds, args, strict=False)]
        self.inputs: Any = None
        self.refusal: str | None
        try:
            self.inputs = tuple(mapped(real, _plain))
            self.native = mapped(self.inputs, lambda t: t.clone())
            self.refusal = self._checked(real)
        except REFUSALS as error:  # no copy of such a tensor, say: then the op must refuse it too
            self.refusal = str(error) or type(error).__name__

    def _checked(self, args: Any) -> str | None:
        try:
            with torch.no_grad():
                reference(self.case).check(*args)
        except (*REFUSALS, AttributeError, NotImplementedError) as error:
            return str(error) or type(error).__name__
        return None

    def verdict(self, before: Before, result: Any, written: list[Tensor]) -> Verdict:
        before.check_only(written)
        results = tensors(result) + written
        self.compare(results)
        nans = any(not bool(t.isfinite().all()) for t in results if t.is_floating_point() and not t.is_meta)
        return Verdict("equals", nans=nans)

    def run(self, args: Any) -> list[Tensor]:
        with torch.no_grad():
            result = reference(self.case)(*args)
        return tensors(result) + tensors(args[: OPS[self.case].mutates])

    def compare(self, got: list[Tensor]) -> None:
        assert self.refusal is None, f"the op took what its reference refuses: {self.refusal}"
        exact = self.run(in_float64(self.inputs))
        assert [t.shape for t in got] == [t.shape for t in exact]
        # ops that take each tensor by itself take one on meta beside one with values
        assert [t.is_meta for t in got] == [t.is_meta for t in exact]
        here = [i for i, t in enumerate(got) if not t.is_meta]
        got, exact = [got[i] for i in here], [exact[i] for i in here]
        if all(close(a, b) for a, b in zip(got, exact, strict=True)):
            return
        # Not within rounding: then no further off than the reference in the op's own arithmetic, or than the exact one
        # on inputs that differ by an ulp: sums that cancel, float32 that overflows or underflows on the way.
        native = [t for t in self.run(self.native) if not t.is_meta]
        moved = [t for t in self.moved() or () if not t.is_meta]
        floor = self.floor()
        for i, (a, b, c) in enumerate(zip(got, exact, native, strict=True)):
            assert close(a, b, c, moved[i] if moved else None, floor), f"result {i}: {a} but the reference gives {b}"

    def floor(self) -> float:
        """How far off a sigmoid may be where it should underflow (their exp ends at 2^-126), times all factors."""
        if op_name(self.case) not in ANNEALED:
            return 0.0
        size = 2.0**-125
        for a in (*tensors(self.inputs), *(n for n in self.inputs if isinstance(n, float))):
            if isinstance(a, float):
                size *= max(1.0, abs(a))
            elif a.is_floating_point() and bool(a.isfinite().any()):
                size *= max(1.0, float(a[a.isfinite()].abs().max()))
        return size

    def moved(self) -> list[Tensor] | None:
        floats = [t.dtype for t in tensors(self.inputs) if t.is_floating_point() and t.numel()]
        ulp = 2.0**-23 if any(d != torch.float64 for d in floats) else 2.0**-52
        signs = torch.Generator().manual_seed(0)

        def move(t: Tensor) -> Tensor:
            if not t.is_floating_point():
                return t.clone()
            sign = torch.randint(0, 2, t.shape, generator=signs) * 2 - 1
            return t.double() * (1 + ulp * sign)

        try:
            return self.run(mapped(self.inputs, move))
        except REFUSALS:  # out of its range by an ulp
            return None


def _plain(t: Tensor) -> Tensor:
    return (t.detach().to_dense() if t.layout != torch.strided else t.detach()).resolve_neg().clone()


def close(
    got: Tensor, exact: Tensor, native: Tensor | None = None, moved: Tensor | None = None, floor: float = 0.0
) -> bool:
    """Whether every element is the exact one, rounded; with `native` and `moved` as close as those two are."""
    if not got.is_floating_point():
        return torch.equal(got, exact)
    if not got.numel():
        return True
    a, b = got.double(), exact.to(got.dtype).double()
    eps = torch.finfo(got.dtype).eps
    limit = torch.finfo(torch.float32 if got.dtype != torch.float16 else torch.float16).max
    rtol = 1e-5 if got.dtype == torch.float32 else ROUNDING.get(got.dtype, 0) * 2
    tolerance = rtol * b.abs() + torch.finfo(torch.float32).tiny
    right = (a == b) | (a.isnan() & b.isnan()) | ((a - b).abs() <= tolerance)
    if native is None or bool(right.all()):
        return bool(right.all())
    c = native.double()
    size = float(b[b.isfinite()].abs().max()) if bool(b.isfinite().any()) else 0.0
    # float32 that overflows on the way to a result that is nearly as large, or to a float64 sum that is larger
    right |= a.isinf() & (b.abs() >= limit / 1000) & (a.sign() == b.sign())
    if size >= limit:
        right |= ~a.isfinite()
    right |= ~a.isfinite() & ~c.isfinite()
    right |= (a == c) | (a.isnan() & c.isnan()) | ((a - c).abs() <= rtol * c.abs())
    off = [x - exact for x in (c, moved) if x is not None]
    worst = max((float(d[d.isfinite()].abs().max()) if bool(d.isfinite().any()) else 0.0) for d in off)
    right |= (a - b).abs() <= tolerance + 16 * worst + 16 * eps * size + floor
    return bool(right.all())
