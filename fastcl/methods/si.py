"""SI as a learner."""

from __future__ import annotations

from typing import Any

from torch import nn

from .. import importance
from .method import Batches, Regularised


class SI(Regularised):
    r"""Synaptic intelligence (Zenke et al. 2017): the loss gains :math:`c\sum_i\Omega_i(\theta_i-\theta_i^*)^2`.

    `strength` (c) and `xi` are the arguments of :class:`fastcl.SI`, which watches the optimizer's steps.

    Example:
        >>> learner = SI.build(stream, strength=10.0); learner.begin_task(stream.tasks[0])
        >>> learner.observe(*batch) > 0
        True
    """

    name = "si"
    paper = "Zenke et al. 2017, Continual learning through synaptic intelligence"
    seed = "dynamic-generative-memory"

    def __init__(self, model: nn.Module, *, strength: float = 1.0, xi: float = 0.1, **options: Any) -> None:
        super().__init__(model, **options)
        self.regulariser = importance.SI(model, strength, self.optimizer, xi)

    def consolidate(self, batches: Batches) -> None:
        self.regulariser.consolidate()
