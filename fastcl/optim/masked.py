"""What MaskedSGD and MaskedAdam share: masks, the cached plan, and when it must be made anew."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import chain, pairwise
from operator import attrgetter
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..ops import _direct as direct
from ..ops._state import check_optimizer
from ..ops.masked_grad import plan as plans
from .reserved import Mask, Reserved, read_masks, tensors_of

_version = attrgetter("_version")
_increment_version = torch.autograd.graph.increment_version


class MaskedStep:
    """Mixed into one of torch's optimizers, whose arguments, groups and state it keeps; `step` is its own.

    Subclasses say which state tensors a group's options ask for (`_used`, in StepEntry's order), how a parameter gets
    them (`_state_of`), and how a group's step is called, by plan (`_by_plan`) or with lists of tensors (`_by_lists`).
    """

    param_groups: list[dict[str, Any]]
    state: dict[Tensor, dict[str, Any]]

    def _start(self, reserved: Reserved | None) -> None:
        for group in self.param_groups:
            self._refuse(group)
        self._masks: dict[Tensor, Mask] = read_masks(type(self).__name__, self.param_groups, reserved)
        self._plan: _Plan | None = None

    def _refuse(self, group: dict[str, Any]) -> None:
        for option in ("differentiable", "capturable"):
            if group.get(option):
                raise ValueError(f"{type(self).__name__}: {option}=True is not supported")
        for p in group["params"]:
            if p.is_complex():
                raise ValueError(f"{type(self).__name__}: complex parameters are not supported")

    def reserve(self, reserved: Reserved) -> None:
        """Gives parameters new masks (None: no mask any more); the others keep theirs.

        Raises:
            ValueError, TypeError: as the constructor; no mask has been changed then.
        """
        self._masks.update(read_masks(type(self).__name__, self.param_groups, reserved))
        for param, given in reserved.items():
            if given is None:
                self._masks.pop(param, None)
        self._plan = None

    @property
    def reserved(self) -> dict[Tensor, Any]:
        """The masks as they were given, by parameter."""
        return {p: mask.given for p, mask in self._masks.items()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """torch's takes moments of any shape and dtype and fails in the next step; this raises ValueError."""
        check_optimizer(self, state_dict)  # type: ignore[arg-type]
        super().load_state_dict(state_dict)  # type: ignore[misc]

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_masks": self._masks}  # type: ignore[misc]

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[misc]
        self._plan = None

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """torch's, with one more key: ``reserved``, masks of the new parameters."""
        reserved = param_group.pop("reserved", None)
        super().add_param_group(param_group)  # type: ignore[misc]
        if not hasattr(self, "_masks"):  # torch's constructor adds the first groups
            if reserved is not None:
                raise ValueError(f"{type(self).__name__}: reserved is an argument of its own, not of a param group")
            return
        try:
            self._refuse(self.param_groups[-1])
            self._masks.update(read_masks(type(self).__name__, self.param_groups, reserved))
        except Exception:
            self.param_groups.pop()
            raise
        self._plan = None

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; entries with r = 1 keep every bit of parameter and state."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        found = None if torch.compiler.is_compiling() else self._plan
        if found is None or not found.holds(self):
            found = self._prepare()
        if found is None:
            return loss
        for group, begin, end in found.groups:
            self._by_plan(group, found.plan, begin, end)
        _increment_version(found.written)
        return loss

    def _prepare(self) -> _Plan | None:
        """A plan for this step and the next ones; None where the list ops had to be called instead."""
        self._plan = None
        for group in self.param_groups:
            self._check(group)
        _refuse_overlap(type(self).__name__, [p for g in self.param_groups for p in g["params"] if p.grad is not None])
        batches = [(group, self._gather(group)) for group in self.param_groups]
        if plans.available and not torch.compiler.is_compiling() and _Plan.possible(batches):
            self._plan = _Plan(self, batches)
            return self._plan
        for group, items in batches:
            for first in (False, True):
                chosen = [item for item in items if item.first == first]
                by_device: dict[torch.device, list[Item]] = {}
                for item in chosen:
                    by_device.setdefault(item.param.device, []).append(item)
                for same in by_device.values():
                    self._by_lists(group, same, first)
        return None

    def _check(self, group: dict[str, Any]) -> None:
        """Everything that may be refused, before any state is made."""
        name = type(self).__name__
        self._refuse(group)
        for p in group["params"]:
            if p.grad is None:
                continue
            if p.grad.layout != torch.strided:
                raise RuntimeError(f"{name} does not support sparse gradients")
            if p.dtype not in plans.DTYPES:
                raise ValueError(
                    f"{name}: a parameter has dtype {p.dtype} but must be float32, float64 or half precision"
                )
            if p.grad.dtype != p.dtype or p.grad.shape != p.shape:
                raise ValueError(
                    f"{name}: a gradient has shape {list(p.grad.shape)} and dtype {p.grad.dtype} but its parameter "
                    f"{list(p.shape)} and {p.dtype}"
                )
            for slot in self._used(group):
                t = self.state[p].get(slot) if p in self.state else None
                if t is not None and (t.shape != p.shape or t.dtype != p.dtype):
                    raise ValueError(
                        f"{name}: the state {slot!r} has shape {list(t.shape)} and dtype {t.dtype} but its parameter "
                        f"{list(p.shape)} and {p.dtype}"
                    )
            mask = self._masks.get(p)
            if mask is not None and not mask.current(p):
                mask.read(p)

    def _gather(self, group: dict[str, Any]) -> list[Item]:
        items = []
        for p in group["params"]:
            if p.grad is None:
                continue
            first = self._state_of(group, p)
            state = self.state.get(p, {})
            slots = tuple(state.get(slot) for slot in self._used(group))
            items.append(Item(p, slots, state.get("step"), self._masks.get(p), first))
        return items

    def _lists(self, items: list[Item]) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """grads, reserved and columns as the list ops take them."""
        grads = [item.param.grad for item in items]
        if all(item.mask is None for item in items):
            return grads, [], []
        none = torch.empty(0, dtype=torch.bool, device=items[0].param.device)
        reserved = [none if item.mask is None else item.mask.rows for item in items]
        columns = [none if item.mask is None else item.mask.columns for item in items]
        return grads, reserved, columns if any(c.numel() for c in columns) else []

    def _state_of(self, group: dict[str, Any], p: Tensor) -> bool:
        raise NotImplementedError

    def _used(self, group: dict[str, Any]) -> tuple[str, ...]:
        raise NotImplementedError

    def _by_plan(self, group: dict[str, Any], plan: plans.Plan, begin: int, end: int) -> None:
        raise NotImplementedError

    def _by_lists(self, group: dict[str, Any], items: list[Item], first: bool) -> None:
        raise NotImplementedError


class Item:
    """One parameter of a step."""

    __slots__ = ("first", "mask", "param", "slots", "step")

    def __init__(
        self, param: Tensor, slots: tuple[Tensor | None, ...], step: Tensor | None, mask: Mask | None, first: bool
    ) -> None:
        self.param, self.slots, self.step, self.mask, self.first = param, slots, step, mask, first

    def tensors(self) -> Iterator[Tensor]:
        yield self.param
        yield from (t for t in self.slots if t is not None)


class _Plan:
    """The plan of all groups, and what it was made from: `holds` is the whole cost of a step beyond the kernel."""

    @staticmethod
    def possible(batches: list[tuple[dict[str, Any], list[Item]]]) -> bool:
        for _, items in batches:
            for item in items:
                p = item.param
                tensors = [*item.tensors(), p.grad]
                if not all(direct.is_plain(t) and t.stride() == p.stride() for t in tensors):
                    return False
                if item.step is not None and not direct.is_plain(item.step):
                    return False
        return True

    def __init__(self, optimizer: MaskedStep, batches: list[tuple[dict[str, Any], list[Item]]]) -> None:
        items = [item for _, group in batches for item in group]
        self.plan = plans.Plan(len(items))
        self.groups, at = [], 0
        for group, of_group in batches:
            self.groups.append((group, at, at + len(of_group)))
            at += len(of_group)
        for i, item in enumerate(items):
            self.plan.set(i, item.param, item.slots, item.step, item.first)
            if item.mask is not None:
                self.plan.set_mask(i, *item.mask.for_plan(item.param))
        self.written = [t for item in items for t in item.tensors()]  # all but the counts
        self.given = [g for item in items if item.mask for g in tensors_of(item.mask.given) if not g.is_inference()]
        self.with_grad = [item.param for item in items]
        self.known = self._of_optimizer(optimizer)
        self.params = [p for group in optimizer.param_groups for p in group["params"]]
        self.none = [p.grad is None for p in self.params]
        self.grad_addresses, self.grad_forms, _ = direct.describe([p.grad for p in self.with_grad])
        self._take_gradients()

    def holds(self, optimizer: MaskedStep) -> bool:
        """Whether every address is still what it was; new addresses of gradients are taken over."""
        try:
            if self._of_optimizer(optimizer) != self.known:
                return False
            addresses, forms, _ = direct.describe([p.grad for p in self.with_grad])
        except (TypeError, RuntimeError):  # None and sparse gradients have no address
            return False
        if forms != self.grad_forms:
            return False
        if len(self.with_grad) < len(self.none) and [p.grad is None for p in self.params] != self.none:
            return False
        if addresses != self.grad_addresses:
            self.grad_addresses = addresses
            self._take_gradients()
        return True

    def _take_gradients(self) -> None:
        self.plan.entries[:, plans.GRAD] = np.frombuffer(self.grad_addresses, np.int64)

    def _of_optimizer(self, optimizer: MaskedStep) -> tuple[Any, ...]:
        groups = optimizer.param_groups
        params = [p for group in groups for p in group["params"]]
        states = [*chain.from_iterable(map(dict.values, optimizer.state.values()))]
        try:
            described = direct.describe(params + states)
        except TypeError:  # a state may be None
            described = direct.describe(params + [t for t in states if t is not None])
        return (
            [(id(group), len(group["params"]), optimizer._used(group)) for group in groups],
            described,
            [*map(_version, self.given)],
        )


def _refuse_overlap(name: str, tensors: list[Tensor]) -> None:
    spans = sorted((t.data_ptr(), t.data_ptr() + t.numel() * t.element_size()) for t in tensors if t.numel())
    if any(end > begin for (_, end), (begin, _) in pairwise(spans)):
        raise ValueError(f"{name}: parameters share memory: each must have its own")
