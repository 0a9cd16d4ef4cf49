"""MAS as a learner."""

from __future__ import annotations

from typing import Any

from torch import nn

from .. import importance
from .method import Batches, Regularised


class MAS(Regularised):
    r"""Memory aware synapses (Aljundi et al. 2018).

    The loss gains :math:`\frac\lambda2\sum_i\Omega_i(\theta_i-\theta_i^*)^2`. `strength`, `merge`, `half` and
    `output` are the arguments of :class:`fastcl.MAS`. Importances need no labels, so all outputs count.

    Example:
        >>> learner = MAS.build(stream, strength=10.0); learner.begin_task(stream.tasks[0])
        >>> learner.observe(*batch) > 0
        True
    """

    name = "mas"
    paper = "Aljundi et al. 2018, Memory aware synapses: learning what (not) to forget"
    seed = "ewc-and-mas"

    def __init__(
        self,
        model: nn.Module,
        *,
        strength: float = 0.1,
        merge: str = "sum",
        half: bool = True,
        output: str = "norm",
        **options: Any,
    ) -> None:
        super().__init__(model, **options)
        self.regulariser = importance.MAS(model, strength, merge, half=half, output=output)

    def consolidate(self, batches: Batches) -> None:
        self.regulariser.consolidate(batches)
