"""Joint training: all data so far, every task."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .method import Method

if TYPE_CHECKING:
    from ..streams import Task


class Joint(Method):
    """Trains on the union of all tasks' data so far; the upper bound, which a continual learner may not do.

    In the setting ``task`` every sample competes among its own task's outputs.
    """

    name = "joint"
    paper = "baseline: joint (offline) training"
    seed = "generative-memory"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._past: list[Task] = []

    @property
    def classes(self) -> list[int]:
        super().classes  # noqa: B018  raises before the first task
        return sorted({c for task in self.tasks for c in task})

    def begin_task(self, task: Task) -> None:
        super().begin_task(task)
        self._past.append(task)

    def resume_tasks(self, tasks: Sequence[Task]) -> None:
        self._past = list(tasks[: len(self.tasks)])

    def training_data(self, task: Task) -> tuple[Tensor, Tensor]:
        xs, ys = zip(*(past.train() for past in self._past), strict=True)
        return torch.cat(xs), torch.cat(ys)

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        if self.setting != "task":
            return super().loss(x, y)
        logits = self.model(x)
        # -inf outside the sample's own task: the softmax then runs over that task's outputs only
        own = torch.zeros(logits.shape[1], logits.shape[1], dtype=torch.bool, device=x.device)
        for task in self.tasks:
            rows = torch.tensor(task, device=x.device)
            own[rows.unsqueeze(1), rows] = True
        return F.cross_entropy(logits.masked_fill(~own[y], float("-inf")), y)
