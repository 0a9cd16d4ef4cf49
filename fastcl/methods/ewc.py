"""EWC as a learner."""

from __future__ import annotations

from typing import Any

from torch import nn

from .. import importance
from .method import Batches, Regularised


class EWC(Regularised):
    r"""Elastic weight consolidation (Kirkpatrick et al. 2017).

    The loss gains :math:`\frac\lambda2\sum_iF_i(\theta_i-\theta_i^*)^2`. `strength`, `form`, `kind` and `gamma` are the
    arguments of :class:`fastcl.EWC`. The Fisher's softmax runs over the outputs that competed in training.

    Example:
        >>> learner = EWC.build(stream, strength=100.0); learner.begin_task(stream.tasks[0])
        >>> learner.observe(*batch) > 0
        True
    """

    name = "ewc"
    paper = "Kirkpatrick et al. 2017, Overcoming catastrophic forgetting in neural networks"
    seed = "ewc-and-mas"

    def __init__(
        self,
        model: nn.Module,
        *,
        strength: float = 1000.0,
        form: str = "online",
        kind: str = "empirical",
        gamma: float = 1.0,
        **options: Any,
    ) -> None:
        super().__init__(model, **options)
        self.regulariser = importance.EWC(model, strength, form, kind, gamma)

    def consolidate(self, batches: Batches) -> None:
        self.regulariser.consolidate(batches, classes=self.classes)
