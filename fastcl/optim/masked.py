"""What MaskedSGD and MaskedAdam share: masks, the cached plan, and when it must be made anew."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ..ops import _direct as direct
from ..ops._state import check_optimizer
from ..ops.masked_grad import plan as plans
from .reserved import Mask, Reserved, read_masks, tensors_of


class MaskedStep:
    """Mixed into one of torch's optimizers, whose arguments, groups and state it keeps; `step` is its own.

    Subclasses name their kernel and a group's options for it, in its struct's order (`_kernel`, `_options`, `_flags`),
    and say which options decide what state there is (`_deciding`), which tensors that is (`_used`, in StepEntry's
    order), how a parameter gets them (`_state_of`), and how the op with lists of tensors is called (`_by_lists`).
    """

    _kernel: str
    _deciding: tuple[str, ...]
    _options: tuple[str, ...]
    _flags: tuple[str, ...]
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

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; entries with r = 1 keep every bit of parameter and state."""
        if torch.compiler.is_compiling():
            return self._hooked_step(closure)
        # straight: between kernels, which sweep the caches, each frame of Python comes from memory
        hooks = self._optimizer_step_pre_hooks, self._optimizer_step_post_hooks  # type: ignore[attr-defined]
        plan = self._plan
        if closure is None and plan is not None and plan.run_unwatched(self.param_groups, self.state, *hooks):
            return None
        # a subclass's own step has been wrapped by torch
        return self._hooked_step(closure) if type(self).step is MaskedStep.step else self._step(closure)

    step.hooked = True  # type: ignore[attr-defined]  # torch leaves it alone: its wrapper costs 10 us, 60 between kernels

    def _step(self, closure: Callable[[], Any] | None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        compiling = torch.compiler.is_compiling()
        if compiling or self._plan is None or not self._plan.run(self.param_groups, self.state):
            batches = self._prepare(may_plan=not compiling)
            if self._plan is None or not self._plan.run(self.param_groups, self.state):
                self._plan = None
                self._by_batches(batches)
        return loss

    _hooked_step = torch.optim.Optimizer.profile_hook_step(_step)

    @torch.no_grad()
    def _prepare(self, may_plan: bool) -> Batches:
        """Checks everything and makes the states that are missing; then the plan of this step and the next ones."""
        self._plan = None
        for group in self.param_groups:
            self._check(group)
        _refuse_overlap(type(self).__name__, [p for g in self.param_groups for p in g["params"] if p.grad is not None])
        batches = [(group, self._gather(group)) for group in self.param_groups]
        if may_plan and direct.available and _Plan.possible(batches):
            self._plan = _Plan(self, batches)
        return batches

    @torch.no_grad()
    def _by_batches(self, batches: Batches) -> None:
        for group, items in batches:
            for first in (False, True):
                chosen = [item for item in items if item.first == first]
                by_device: dict[torch.device, list[Item]] = {}
                for item in chosen:
                    by_device.setdefault(item.param.device, []).append(item)
                for same in by_device.values():
                    self._by_lists(group, same, first)

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

    def _numbers(self, group: dict[str, Any]) -> tuple[Any, ...]:
        """The group's options as the list ops take them."""
        numbers: list[Any] = []
        for name in self._options:
            numbers += group[name] if isinstance(group[name], (tuple, list)) else [group[name]]
        return *map(float, numbers), *(bool(group[name]) for name in self._flags)

    def _state_of(self, group: dict[str, Any], p: Tensor) -> bool:
        raise NotImplementedError

    def _used(self, group: dict[str, Any]) -> tuple[str, ...]:
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


Batches = list[tuple[dict[str, Any], list[Item]]]


class _Plan:
    """The plan of all groups. `run` is a step, or False where something is not what it was made from."""

    @staticmethod
    def possible(batches: Batches) -> bool:
        for _, items in batches:
            for item in items:
                p = item.param
                tensors = [*item.tensors(), p.grad]
                if not all(direct.is_plain(t) and t.stride() == p.stride() and not t.is_neg() for t in tensors):
                    return False
                if item.step is not None and not direct.is_plain(item.step):
                    return False
        return True

    def __init__(self, optimizer: MaskedStep, batches: Batches) -> None:
        items = [item for _, of_group in batches for item in of_group]
        self.plan = plan = plans.Plan(len(items))
        for i, item in enumerate(items):
            plan.set(i, item.param, item.slots, item.step, item.first)
            if item.mask is not None:
                plan.set_mask(i, *item.mask.for_plan(item.param))
        written = [t for item in items for t in item.tensors()]  # all but the counts
        given = [g for item in items if item.mask for g in tensors_of(item.mask.given) if not g.is_inference()]
        which = optimizer._kernel, optimizer._deciding, optimizer._options, optimizer._flags
        plan.start(*which, given, written, optimizer.param_groups, optimizer.state)
        self.run, self.run_unwatched = plan.run, plan.run_unwatched


def _refuse_overlap(name: str, tensors: list[Tensor]) -> None:
    spans = sorted((t.data_ptr(), t.data_ptr() + t.numel() * t.element_size()) for t in tensors if t.numel())
    if any(end > begin for (_, end), (begin, _) in pairwise(spans)):
        raise ValueError(f"{name}: parameters share memory: each must have its own")
