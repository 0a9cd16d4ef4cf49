"""EWC as a learner."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..importance import EWC as Regulariser
from .method import Batches, Method


class EWC(Method):
    r"""Elastic weight consolidation (Kirkpatrick et al. 2017).

    The loss gains :math:`\frac\lambda2\sum_iF_i(\theta_i-\theta_i^*)^2`.

    The regulariser is :class:`fastcl.EWC`; `strength`, `form`, `kind` and `gamma` are its arguments. The Fisher's
    softmax runs over the outputs that competed in training.
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
        self.regulariser = Regulariser(model, strength, form, kind, gamma)

    def regularise(self) -> Tensor:
        return self.regulariser.add_gradients()

    def end_task(self, batches: Batches) -> None:
        self.regulariser.consolidate(batches, classes=self.classes)

    def extra_state(self) -> dict[str, Any]:
        return self.regulariser.state_dict()

    def load_extra_state(self, state: dict[str, Any]) -> None:
        self.regulariser.load_state_dict(state)
