"""Synaptic intelligence."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from .distributed import local
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

    Raises:
        ValueError: a strength or xi out of range.

    Example:
        >>> si = fastcl.SI(model, 1.0, optimizer)
        >>> loss.backward(); value = si.add_gradients(); optimizer.step()    # after each task: si.consolidate()
    """

    _sums = ("omega",)

    def __init__(
        self,
        model: nn.Module,
        strength: float,
        optimizer: torch.optim.Optimizer | None = None,
        xi: float = 0.1,
        *,
        dtype: torch.dtype | None = None,
    ) -> None:
        if not 0 < xi < math.inf:
            raise ValueError(f"xi is {xi} but must be finite and positive")
        super().__init__(model, strength, optimizer, dtype=dtype)
        self.strength *= 2  # the shared penalty has 1/2
        self.xi = xi
        self.omega = self._zeros()

    def _step(self, names: list[str], grads: list[Tensor], params: list[Tensor], before: list[Tensor]) -> None:
        ops.accumulate_path_(local([self.omega[n] for n in names]), grads, params, before)

    @torch.no_grad()
    def consolidate(self, batches: Any = None) -> None:
        """Ends a task; `batches` are not needed and may be left out."""
        self._aligned()  # old importances take the shape of grown parameters
        self._grow()
        params = {name: p.detach() for name, p in self._params().items()}
        importances = {
            name: self.importances.get(name, torch.zeros_like(self.omega[name], dtype=self.dtype)) for name in params
        }
        ops.consolidate_path_(
            *(local([values[n] for n in params]) for values in (importances, self.omega, self.start)),
            local(list(params.values())),
            self.xi,
        )
        self.importances = importances
        self.anchors = {name: start.clone() for name, start in self.start.items()}
        self.tasks += 1

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "omega": dict(self.omega)}
