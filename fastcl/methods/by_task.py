"""What methods with a network for every task share."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .method import Method

if TYPE_CHECKING:
    from ..streams import Task


class ByTask(Method):
    """A method with a network for every task: :meth:`logits` of one, and by them the predictions.

    Raises:
        ValueError: from `predict`, a task that has not begun.

    Example:
        >>> learner = fastcl.methods.HAT.build(stream); learner.begin_task(stream.tasks[0])
        >>> learner.logits(batch[0], 0).shape
        torch.Size([32, 2])
    """

    def check_own_labels(self, y: Tensor) -> None:
        """As :meth:`check_labels` in the setting ``task``: in training this task's own outputs compete, always."""
        setting, self.setting = self.setting, "task"
        try:
            Method.check_labels(self, y)
        finally:
            self.setting = setting

    def logits(self, x: Tensor, task: int) -> Tensor:
        """The outputs [N, classes of the task]."""
        raise NotImplementedError

    @torch.no_grad()
    def predict(self, x: Tensor, task: Task | int | None = None) -> Tensor:
        """Output units [N]: among the task's, or, the task not given, among those of the task of least entropy.

        Guessing the task so is our addition. A task that has not begun has no trained outputs: all its samples get its
        first class.

        Raises:
            ValueError: an index of a task that has not begun.
        """
        if task is None and not self.tasks:
            raise RuntimeError("begin_task must come first")
        if task is not None:
            index = task if isinstance(task, int) else task.index
            if isinstance(task, int) and not 0 <= index < len(self.tasks):
                raise ValueError(f"task is {index} but only {len(self.tasks)} tasks have begun")
            if index >= len(self.tasks):
                return torch.full((len(x),), task.classes[0], device=x.device)
            return torch.tensor(self.tasks[index], device=x.device)[self.logits(x, index).argmax(1)]
        best = torch.full((len(x),), math.inf, device=x.device)
        found = torch.zeros(len(x), dtype=torch.int64, device=x.device)
        for index, classes in enumerate(self.tasks):
            log_p = self.logits(x, index).log_softmax(1)
            entropy = -(log_p.exp() * log_p).sum(1)
            nearer = entropy < best
            best = torch.where(nearer, entropy, best)
            found = torch.where(nearer, torch.tensor(classes, device=x.device)[log_p.argmax(1)], found)
        return found
