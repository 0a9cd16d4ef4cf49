"""Synaptic intelligence."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .path import PathRegulariser


class SI(PathRegulariser):
    r"""Synaptic intelligence (Zenke et al. 2017), penalty :math:`c\sum_i\Omega_i(\theta_i-\theta^*_i)^2`.

    Each step :math:`\omega_i \mathrel{+}= -g_i\,\Delta\theta_i` with the task's own gradient (no penalty in it); at a
    task's end :math:`\Omega_i \mathrel{+}= \max(\omega_i, 0) / ((\theta_i-\theta_i^{start})^2 + \xi)`.

    Args:
        model: its trainable parameters are protected.
        strength: c >= 0. There is no factor 1/2 in the paper's penalty, and none here.
        optimizer: watched by hooks; or None, and call `before_step` / `add_gradients` and `after_step` yourself.
        xi: damping, > 0.
        dtype: store importances in torch.float32 (default) or torch.bfloat16.

    Example:
        >>> si = fastcl.SI(model, 1.0, optimizer)
        >>> loss.backward(); si.add_gradients(); optimizer.step()    # after each task: si.consolidate()
    """

    def __init__(
        self,
        model: nn.Module,
        strength: float,
        optimizer: torch.optim.Optimizer | None = None,
        xi: float = 0.1,
        *,
        dtype: torch.dtype | None = None,
    ) -> None:
        if not xi > 0:
            raise ValueError(f"xi is {xi} but must be positive")
        super().__init__(model, strength, optimizer, dtype=dtype)
        self.strength *= 2  # the shared penalty has 1/2
        self.xi = xi
        self.omega = self._zeros()

    def _step(self, name: str, grad: Tensor, moved: Tensor) -> None:
        self.omega[name].addcmul_(grad.to(self.omega[name].dtype), moved.to(self.omega[name].dtype), value=-1)

    @torch.no_grad()
    def consolidate(self, batches: Any = None) -> None:
        """Ends a task; `batches` are not needed and may be left out."""
        wide = {name: t.dtype for name, t in self.omega.items()}
        new = {}
        for name, p in self._params().items():
            travelled = (p.detach() - self.start[name]).to(wide[name])
            new[name] = self.omega[name].clamp(min=0) / (travelled.square() + self.xi)
        self._accumulate(new)
        self.omega = self._zeros()
        self._restart()

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "omega": dict(self.omega)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.omega = {name: t.clone() for name, t in state["omega"].items()}
