"""Joint training: all data so far, every task."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..nn import Discriminator
from .method import Method, entropy_within_tasks

if TYPE_CHECKING:
    from ..streams import Stream, Task


class Joint(Method):
    """Trains on the union of all tasks' data so far; the upper bound, which a continual learner may not do.

    In the setting ``task`` every sample competes among its own task's outputs.

    Example:
        >>> learner = Joint.build(stream); learner.begin_task(stream.tasks[0]); learner.begin_task(stream.tasks[1])
        >>> learner.training_data(stream.tasks[1])[1].unique()
        tensor([0, 1, 2, 3])
    """

    name = "joint"
    paper = "baseline: joint (offline) training"
    seed = "generative-memory"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._past: list[Task] = []

    @classmethod
    def build(
        cls,
        stream: Stream,
        *,
        network: str = "mlp",
        hidden: tuple[int, ...] = (400, 400),
        discriminator_width: int = 16,
        seed: int = 0,
        **options: Any,
    ) -> Method:
        """`network`: mlp with layers `hidden`; discriminator, the classifier of DGM, `discriminator_width` wide.

        Raises:
            ValueError: another network.
        """
        if network == "mlp":
            return super().build(stream, hidden=hidden, seed=seed, **options)
        if network != "discriminator":
            raise ValueError(f"network is {network!r} but must be mlp or discriminator")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = Discriminator(stream.input_shape, stream.n_outputs, discriminator_width)
        return cls(model, setting=stream.setting, **options)

    @property
    def classes(self) -> list[int]:
        super().classes  # noqa: B018  raises before the first task
        return self.seen

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
        return entropy_within_tasks(self.model(x), y, self.tasks)
