"""LwF as a learner."""

from __future__ import annotations

import copy
import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..nn import distillation
from .method import Method

if TYPE_CHECKING:
    from ..streams import Task


class LwF(Method):
    r"""Learning without forgetting (Li & Hoiem 2016).

    On the new task's images the network should say of the old classes what it said when the task began: the loss gains
    :math:`\lambda` times the distillation at temperature T. In the setting ``task`` each old head by itself; in
    ``domain`` and ``class`` all outputs trained so far together. Nothing is stored but that network.

    Args:
        model: an output unit for each class of the stream.
        strength: lambda.
        temperature: T, 2 in the paper.
        lr, optimizer: as for :class:`Method`.

    Raises:
        ValueError: a strength or temperature out of range.

    Example:
        >>> learner = LwF.build(stream, temperature=2.0); learner.begin_task(stream.tasks[0])
        >>> learner.observe(*batch) > 0
        True
    """

    name = "lwf"
    paper = "Li & Hoiem 2016, Learning without forgetting"
    seed = "generative-memory"

    def __init__(self, model: nn.Module, *, strength: float = 1.0, temperature: float = 2.0, **options: Any) -> None:
        if not 0 <= strength < math.inf:
            raise ValueError(f"strength is {strength} but must be finite and not negative")
        if not 0 < temperature < math.inf:
            raise ValueError(f"temperature is {temperature} but must be finite and positive")
        super().__init__(model, **options)
        self.strength, self.temperature = strength, temperature
        self.previous: nn.Module | None = None  # the network as the last task left it

    def begin_task(self, task: Task) -> None:
        super().begin_task(task)
        if len(self.tasks) > 1:
            self.previous = copy.deepcopy(self.model).eval()

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        loss = super().loss(x, y)
        if self.previous is None:
            return loss
        now = self.model(x)
        with torch.no_grad():
            before = self.previous(x)
        past = self.tasks[:-1]
        groups = past if self.setting == "task" else [self.past]
        held = [distillation(now, before, known, temperature=self.temperature) for known in groups]
        return loss + self.strength * torch.stack(held).sum()

    def extra_state(self) -> dict[str, Any]:
        return {"previous": None if self.previous is None else dict(self.previous.state_dict())}

    def load_extra_state(self, state: dict[str, Any]) -> None:
        self.previous = None
        if state["previous"] is not None:
            self.previous = copy.deepcopy(self.model).eval()
            self.previous.load_state_dict(state["previous"])
