"""iCaRL as a learner."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..nn import Exemplars
from .method import Batches, Method

if TYPE_CHECKING:
    from ..streams import Task


class ICaRL(Method):
    """Incremental classifier and representation learning (Rebuffi et al. 2017).

    Trains on the new images and the stored exemplars with one sigmoid for each class: new classes by their labels, old
    ones by what the network said before (sec. 2.3). Predicts the class whose exemplars' mean feature is nearest
    (alg. 1): features of length 1, one matrix product. Exemplars are chosen by herding (:func:`fastcl.nn.herd`).

    Args:
        model: a Sequential whose last layer makes the logits; what comes before makes the features.
        budget: exemplars in all; 2000 in the paper.
        lr, optimizer: as for :class:`Method`.

    Raises:
        ValueError: a negative budget; in `predict` a task that has not begun.

    Example:
        >>> learner = ICaRL.build(stream, budget=200); learner.begin_task(stream.tasks[0])
        >>> learner.observe(*batch) > 0
        True
    """

    name = "icarl"
    paper = "Rebuffi et al. 2017, iCaRL: incremental classifier and representation learning"
    seed = "dynamic-generative-memory"
    settings = ("task", "class")

    def __init__(self, model: nn.Sequential, *, budget: int = 2000, **options: Any) -> None:
        super().__init__(model, **options)
        self.exemplars = Exemplars(budget)
        self.previous: nn.Module | None = None
        # for which versions of the weights; the classes and their mean features
        self._means: tuple[list[int], tuple[list[int], Tensor]] | None = None

    @property
    def classes(self) -> list[int]:
        """All seen: exemplars of every task are among the batches."""
        super().classes  # noqa: B018  raises before the first task
        return self.seen

    def begin_task(self, task: Task) -> None:
        super().begin_task(task)
        self._means = None
        if len(self.tasks) > 1:
            self.previous = copy.deepcopy(self.model).eval()

    def training_data(self, task: Task) -> tuple[Tensor, Tensor]:
        """The task's own and the exemplars."""
        x, y = task.train()
        if len(self.exemplars):
            x, y = torch.cat([x, self.exemplars.x.to(x)]), torch.cat([y, self.exemplars.y.to(y)])
        return x, y

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        known = torch.tensor(self.classes, device=y.device)
        target = (y.unsqueeze(1) == known).to(x.dtype)
        if self.previous is not None:
            old = torch.isin(known, torch.tensor([c for task in self.tasks[:-1] for c in task], device=y.device))
            with torch.no_grad():
                target[:, old] = self.previous(x)[:, known[old]].sigmoid()
        return F.binary_cross_entropy_with_logits(self.model(x)[:, known], target, reduction="sum") / len(x)

    def end_task(self, batches: Batches) -> None:
        x, y = (torch.cat(part) for part in zip(*batches, strict=True))
        own = torch.isin(y, torch.tensor(self.tasks[-1], device=y.device))
        x, y = x[own], y[own]
        self.exemplars.add(x, y, self.features(x))
        self._means = None

    @torch.no_grad()
    def features(self, x: Tensor) -> Tensor:
        """Of length 1, [N, D], in eval mode."""
        training = self.model.training
        self.model.eval()
        try:
            parts = [self.model[:-1](part) for part in x.split(1024)]
        finally:
            self.model.train(training)
        return F.normalize(torch.cat(parts), dim=1)

    @torch.no_grad()
    def predict(self, x: Tensor, task: Task | int | None = None) -> Tensor:
        """The nearest mean of exemplars; among classes without exemplars yet, by the outputs."""
        stored = {c for _, c in self.exemplars.samples}
        if task is None:
            known = {c for begun in self.tasks for c in begun}
        else:
            index = task if isinstance(task, int) else task.index
            if isinstance(task, int) and not 0 <= index < len(self.tasks):
                raise ValueError(f"task is {index} but only {len(self.tasks)} tasks have begun")
            known = set(self.tasks[index]) if index < len(self.tasks) else set(task.classes)
        if not known <= stored:
            return super().predict(x, task)
        classes, means = self._class_means()
        chosen = [i for i, c in enumerate(classes) if c in known]
        nearest = (self.features(x) @ means[chosen].T).argmax(1)
        return torch.tensor(classes, device=x.device)[chosen][nearest]

    def _class_means(self) -> tuple[list[int], Tensor]:
        """Of length 1: then the nearest has the largest product. As they are since the network last changed."""
        versions = [p._version for p in self.model.parameters()]
        if self._means is None or self._means[0] != versions:
            classes = sorted(c for _, c in self.exemplars.samples)
            means = torch.stack([self.features(self.exemplars.samples[0, c]).mean(0) for c in classes])
            self._means = versions, (classes, F.normalize(means, dim=1))
        return self._means[1]

    def extra_state(self) -> dict[str, Any]:
        return {
            "exemplars": self.exemplars.state_dict(),
            "previous": None if self.previous is None else dict(self.previous.state_dict()),
        }

    def load_extra_state(self, state: dict[str, Any]) -> None:
        self.exemplars.load_state_dict(state["exemplars"], next(self.model.parameters()).device)
        self.previous = self._means = None
        if state["previous"] is not None:
            self.previous = copy.deepcopy(self.model).eval()
            self.previous.load_state_dict(state["previous"])
