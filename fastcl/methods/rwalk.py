"""RWalk as a learner."""

from __future__ import annotations

from typing import Any

from torch import nn

from .. import importance
from .method import Batches, Regularised


class RWalk(Regularised):
    r"""Riemannian walk (Chaudhry et al. 2018): the loss gains :math:`\lambda\sum_i(F_i+s_i)(\theta_i-\theta_i^*)^2`.

    `strength`, `alpha` and `delta_t` are the arguments of :class:`fastcl.RWalk`, which watches the optimizer's steps.

    Example:
        >>> learner = RWalk.build(stream, strength=10.0); learner.begin_task(stream.tasks[0])
        >>> learner.observe(*batch) > 0
        True
    """

    name = "rwalk"
    paper = "Chaudhry et al. 2018, Riemannian walk for incremental learning"
    seed = "dynamic-generative-memory"

    def __init__(
        self, model: nn.Module, *, strength: float = 1.0, alpha: float = 0.9, delta_t: int = 10, **options: Any
    ) -> None:
        super().__init__(model, **options)
        self.regulariser = importance.RWalk(model, strength, self.optimizer, alpha, delta_t)

    def consolidate(self, batches: Batches) -> None:
        self.regulariser.consolidate()
