"""What SI and RWalk share: they watch the optimizer's steps instead of the data."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn

from .distributed import local
from .regulariser import FLOATS, Regulariser, grown


class PathRegulariser(Regulariser):
    """Accumulates something of every step's gradient and movement; no second forward pass, nothing leaves the device.

    Either give `optimizer`: its step hooks do the rest, for any torch optimizer. Or call :meth:`before_step` after
    ``loss.backward()`` and :meth:`after_step` after ``optimizer.step()``.

    The gradient that counts is the task's own. Use :meth:`add_gradients`, which notes it before adding the penalty's;
    with :meth:`penalty` in the loss the two can no longer be told apart.
    """

    _sums: tuple[str, ...] = ()  # attributes, each name -> a sum of the parameter's shape
    _optional: tuple[str, ...] = ()  # those of them that may be empty
    excluded: frozenset[str] = frozenset()  # names of parameters that are left alone

    def __init__(
        self,
        model: nn.Module,
        strength: float,
        optimizer: torch.optim.Optimizer | None = None,
        *,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(model, strength, dtype=dtype)
        self.start = {name: p.detach().clone() for name, p in self._params().items()}  # where the task began
        self._names: list[str] | None = None  # of the parameters of the step that is under way
        self._own_note = False  # made by add_gradients
        self._kept: dict[str, tuple[Tensor, Tensor]] = {}  # memory for their values and task gradients before it
        if optimizer is not None:
            self.attach(optimizer)

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        """Watches every step of `optimizer` from now on."""
        me = weakref.ref(self)  # the optimizer's hooks must not keep the regulariser alive

        def before(*_: Any) -> None:
            if (regulariser := me()) is not None and regulariser._names is None:
                regulariser.before_step()

        def after(*_: Any) -> None:
            if (regulariser := me()) is not None:
                regulariser.after_step()

        optimizer.register_step_pre_hook(before)
        optimizer.register_step_post_hook(after)

    @torch.no_grad()
    def before_step(self) -> None:
        """Notes where the parameters are and the task's gradient; call it before `add_gradients`."""
        self._grow()
        params = {name: p for name, p in self._params().items() if p.grad is not None}
        for name, p in params.items():
            if name not in self._kept or self._kept[name][0].shape != p.shape:
                self._kept[name] = (torch.empty_like(p), torch.empty_like(p))
        self._names, self._own_note = list(params), False
        kept = [self._kept[n] for n in params]
        torch._foreach_copy_(local([p for p, _ in kept]), local([p.detach() for p in params.values()]))
        torch._foreach_copy_(local([g for _, g in kept]), local([p.grad for p in params.values()]))

    @torch.no_grad()
    def add_gradients(self) -> Tensor:
        """Notes the task's gradient if `before_step` has not, then adds the penalty's; returns the penalty.

        A note that no step has followed is made anew: GradScaler has skipped that step, and its gradient is infinite.
        """
        if self._names is None or self._own_note:
            self.before_step()
            self._own_note = True
        return super().add_gradients()

    @torch.no_grad()
    def after_step(self) -> None:
        """Accumulates this step. RuntimeError without a `before_step`."""
        if self._names is None:
            raise RuntimeError("after_step: call before_step (or add_gradients) before optimizer.step()")
        names, self._names = self._names, None
        params, kept = self._params(), [self._kept[n] for n in names]
        before, grads = [p for p, _ in kept], [g for _, g in kept]
        self._step(names, local(grads), local([params[n].detach() for n in names]), local(before))

    def _step(self, names: list[str], grads: list[Tensor], params: list[Tensor], before: list[Tensor]) -> None:
        """One step: the task's gradients, the parameters after it and before it (this process's shards)."""
        raise TypeError(f"{type(self).__name__} must say what it accumulates")

    def _params(self) -> dict[str, Tensor]:
        return {name: p for name, p in super()._params().items() if name not in self.excluded}

    def _grow(self) -> None:
        """Sums take the shape of parameters that have grown, or are new (a head); new entries have not moved yet."""
        for name, p in self._params().items():
            if name not in self.start:
                self.start[name] = p.detach().clone()
                for sum_ in self._sums:
                    if values := getattr(self, sum_):
                        values[name] = torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32))
            if self.start[name].shape != p.shape:
                self.start[name] = grown(name, self.start[name], p, fill=p)
                for sum_ in self._sums:
                    if name in (values := getattr(self, sum_)):
                        values[name] = grown(name, values[name], p, fill=None)

    def _restart(self) -> None:
        self.start = {name: p.detach().clone() for name, p in self._params().items()}

    def _zeros(self) -> dict[str, Tensor]:
        return {
            n: torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32)) for n, p in self._params().items()
        }

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "start": dict(self.start)}

    def _read(self, state: dict[str, Any]) -> dict[str, Any]:
        found = super()._read(state)
        unknown = set(state["start"]) - set(self._params())
        if unknown:
            raise ValueError(f"state.start is of another model: it has {sorted(unknown)[0]}")
        self._check_sums(state["start"], "start")
        sums = {name: self._read_sum(state, name) for name in self._sums}
        start = {name: t.detach().clone() for name, t in state["start"].items()}
        return {**found, **sums, "start": start, "_names": None}

    def _read_sum(self, state: dict[str, Any], name: str) -> dict[str, Tensor]:
        if state[name] or name not in self._optional:
            self._check_sums(state[name], name, floats=FLOATS, like=state["start"])
        return {key: t.detach().clone() for key, t in state[name].items()}
