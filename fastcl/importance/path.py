"""What SI and RWalk share: they watch the optimizer's steps instead of the data."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn

from .regulariser import Regulariser


class PathRegulariser(Regulariser):
    """Accumulates something of every step's gradient and movement; no second forward pass, nothing leaves the device.

    Either give `optimizer`: its step hooks do the rest, for any torch optimizer. Or call :meth:`before_step` after
    ``loss.backward()`` and :meth:`after_step` after ``optimizer.step()``.

    The gradient that counts is the task's own. Use :meth:`add_gradients`, which notes it before adding the penalty's;
    with :meth:`penalty` in the loss the two can no longer be told apart.
    """

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
        self._before: dict[str, tuple[Tensor, Tensor]] | None = None  # parameter and task gradient before the step
        if optimizer is not None:
            self.attach(optimizer)

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        """Watches every step of `optimizer` from now on."""
        me = weakref.ref(self)  # the optimizer's hooks must not keep the regulariser alive

        def before(*_: Any) -> None:
            if (regulariser := me()) is not None and regulariser._before is None:
                regulariser.before_step()

        def after(*_: Any) -> None:
            if (regulariser := me()) is not None:
                regulariser.after_step()

        optimizer.register_step_pre_hook(before)
        optimizer.register_step_post_hook(after)

    @torch.no_grad()
    def before_step(self) -> None:
        """Notes where the parameters are and the task's gradient; call it before `add_gradients`."""
        self._before = {
            n: (p.detach().clone(), p.grad.clone()) for n, p in self._params().items() if p.grad is not None
        }

    @torch.no_grad()
    def add_gradients(self) -> Tensor:
        """Notes the task's gradient if `before_step` has not, then adds the penalty's; returns the penalty."""
        if self._before is None:
            self.before_step()
        return super().add_gradients()

    @torch.no_grad()
    def after_step(self) -> None:
        """Accumulates this step. RuntimeError without a `before_step`."""
        if self._before is None:
            raise RuntimeError("after_step: call before_step (or add_gradients) before optimizer.step()")
        params = self._params()
        for name, (old, grad) in self._before.items():
            self._step(name, grad, params[name].detach() - old)
        self._before = None

    def _step(self, name: str, grad: Tensor, moved: Tensor) -> None:
        """One parameter's share of one step: its task gradient and how far it moved."""
        raise TypeError(f"{type(self).__name__} must say what it accumulates")

    def _restart(self) -> None:
        self.start = {name: p.detach().clone() for name, p in self._params().items()}

    def _zeros(self) -> dict[str, Tensor]:
        return {
            n: torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32)) for n, p in self._params().items()
        }

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "start": dict(self.start)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.start = {name: t.clone() for name, t in state["start"].items()}
        self._before = None
