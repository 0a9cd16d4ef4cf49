"""Riemannian walk."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..ops._state import check_number
from .distributed import largest, local
from .path import PathRegulariser


class RWalk(PathRegulariser):
    r"""Riemannian walk (Chaudhry et al. 2018), penalty :math:`\lambda\sum_i(F_i+s_i)(\theta_i-\theta^*_i)^2`.

    Every step the Fisher is a moving average of the task gradient's square,
    :math:`F \leftarrow \alpha g^2 + (1-\alpha)F`; every `delta_t` steps the path score grows by
    :math:`\max(0, -\sum g\,\Delta\theta / (\frac12 F\Delta\theta^2+\epsilon))`. Between tasks both are normalised to
    maximum 1 and the score is the mean of old and new. The paper's moving average squares batch gradients; that is
    the method's definition, not an estimate of the exact Fisher.

    Args:
        model: its trainable parameters are protected.
        strength: lambda >= 0, without a factor 1/2 as in the paper.
        optimizer: watched by hooks; or None, and call `before_step` / `add_gradients` and `after_step` yourself.
        alpha: weight of the newest gradient, in (0, 1].
        delta_t: steps between score updates.
        epsilon: > 0.
        dtype: store importances in torch.float32 (default) or torch.bfloat16.

    Raises:
        ValueError: a strength, alpha, delta_t or epsilon out of range.

    Example:
        >>> rwalk = fastcl.RWalk(model, 1.0, optimizer)
        >>> loss.backward(); value = rwalk.add_gradients(); optimizer.step()   # after each task: rwalk.consolidate()
    """

    _sums = ("fisher", "gain", "moved", "score", "old_score")
    _optional = ("old_score",)

    def __init__(
        self,
        model: nn.Module,
        strength: float,
        optimizer: torch.optim.Optimizer | None = None,
        alpha: float = 0.9,
        delta_t: int = 10,
        epsilon: float = 1e-3,
        *,
        dtype: torch.dtype | None = None,
    ) -> None:
        if not 0 < alpha <= 1:
            raise ValueError(f"alpha is {alpha} but must lie in (0, 1]")
        if not isinstance(delta_t, int) or delta_t < 1:
            raise ValueError(f"delta_t is {delta_t} but must be a whole number, at least 1")
        if not 0 < epsilon < math.inf:
            raise ValueError(f"epsilon is {epsilon} but must be finite and positive")
        super().__init__(model, strength, optimizer, dtype=dtype)
        self.strength *= 2  # the shared penalty has 1/2
        self.alpha, self.delta_t, self.epsilon = alpha, delta_t, epsilon
        self.fisher, self.gain, self.moved, self.score = (self._zeros() for _ in range(4))
        self.old_score: dict[str, Tensor] = {}
        self.steps = 0

    @torch.no_grad()
    def after_step(self) -> None:
        super().after_step()
        self.steps += 1
        if self.steps % self.delta_t == 0:
            self._close_window()

    def _step(self, names: list[str], grads: list[Tensor], params: list[Tensor], before: list[Tensor]) -> None:
        sums = (local([values[n] for n in names]) for values in (self.fisher, self.gain, self.moved))
        ops.accumulate_walk_(*sums, grads, params, before, self.alpha)

    def _close_window(self) -> None:
        sums = (local([*values.values()]) for values in (self.score, self.gain, self.moved, self.fisher))
        ops.score_walk_(*sums, self.epsilon)

    @torch.no_grad()
    def consolidate(self, batches: Any = None) -> None:
        """Ends a task; `batches` are not needed and may be left out."""
        self._grow()
        if self.steps % self.delta_t:
            self._close_window()
        fisher, score = _to_maximum_1(self.fisher), _to_maximum_1(self.score)
        if self.old_score:
            score = {name: 0.5 * (s + self.old_score[name]) for name, s in score.items()}
        self._accumulate({name: fisher[name] + score[name] for name in fisher}, old_share=0.0)
        self.old_score = score
        self.score, self.gain, self.moved = self._zeros(), self._zeros(), self._zeros()
        self.steps = 0
        self._restart()

    def state_dict(self) -> dict[str, Any]:
        kept = {key: dict(getattr(self, key)) for key in ("fisher", "gain", "moved", "score", "old_score")}
        return {**super().state_dict(), **kept, "steps": self.steps}

    def _read(self, state: dict[str, Any]) -> dict[str, Any]:
        check_number(state["steps"], "state.steps")
        return {**super()._read(state), "steps": int(state["steps"])}


def _to_maximum_1(values: dict[str, Tensor]) -> dict[str, Tensor]:
    top = largest(list(values.values()))
    return {name: v / top if top > 0 else v.clone() for name, v in values.items()}
