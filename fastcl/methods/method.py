"""The protocol of a learner, and the loop body that most methods share.

In anybody's loop: ``begin_task(task)``, ``loss = observe(x, y)`` for every batch, ``end_task(batches)``, and at any
time ``predict(x, task=None)``. ``state_dict()`` holds everything needed to continue.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..importance import Regulariser
from ..nn import Exemplars, Replay, class_loss, jitter, make_generator, mixed, mlp, plot_images
from ..nn.distill import entropy_within_tasks
from ..nn.precision import check_precision
from ..ops._state import check_keys, check_like, check_method, load_optimizer, load_whole, tasks_of

if TYPE_CHECKING:
    from ..streams import Stream, Task

Batches = Iterable[tuple[Tensor, Tensor]]
MakeOptimizer = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]


class Method:
    """A learner; subclasses override :meth:`loss`, :meth:`regularise`, :meth:`end_task` and `extra_state`.

    Args:
        model: maps x to one output unit for every class of the stream.
        setting: ``task``, ``domain`` or ``class``: which outputs compete in training and in :meth:`predict`.
        lr: of the default optimizer, Adam.
        optimizer: makes another one from the parameters; it lives through all tasks.

    Raises:
        ValueError: a setting that is not the method's, a learning rate that is not positive.

    Example:
        >>> learner = fastcl.methods.Finetune.build(stream); learner.begin_task(stream.tasks[0])
        >>> loss = learner.observe(*batch); learner.end_task([batch]); learner.predict(batch[0]).shape
        torch.Size([32])
    """

    name: ClassVar[str]
    paper: ClassVar[str]
    seed: ClassVar[str]  # the document that names it
    settings: ClassVar[tuple[str, ...]] = ("task", "domain", "class")
    usual_lr: ClassVar[float] = 1e-3
    epochs: ClassVar[Mapping[str, int]] = {}  # of data sets on which the usual number is not the method's

    def __init__(
        self, model: nn.Module, *, setting: str = "class", lr: float = 1e-3, optimizer: MakeOptimizer | None = None
    ) -> None:
        if setting not in self.settings:
            raise ValueError(f"setting is {setting!r} but {self.name} works in {', '.join(self.settings)}")
        if not lr > 0:
            raise ValueError(f"lr is {lr} but must be positive")
        self.model, self.setting = model, setting
        self.optimizer = (
            torch.optim.Adam(model.parameters(), lr) if optimizer is None else optimizer(model.parameters())
        )
        self.tasks: list[tuple[int, ...]] = []  # output units of every task begun

    @classmethod
    def build(cls, stream: Stream, *, hidden: tuple[int, ...] = (400, 400), seed: int = 0, **options: Any) -> Method:
        """The method with the network that suits the stream; `seed` sets its initial weights."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = mlp(stream.input_shape, hidden, stream.n_outputs)
        return cls(model, setting=stream.setting, **options)

    @property
    def classes(self) -> list[int]:
        """The output units that compete now: this task's, or all seen so far."""
        if not self.tasks:
            raise RuntimeError("begin_task must come first")
        return list(self.tasks[-1]) if self.setting == "task" else self.seen

    @property
    def seen(self) -> list[int]:
        """The output units of all tasks begun, sorted."""
        return sorted({c for task in self.tasks for c in task})

    @property
    def past(self) -> list[int]:
        """The output units of the tasks before the one that runs, sorted."""
        return sorted({c for task in self.tasks[:-1] for c in task})

    def begin_task(self, task: Task) -> None:
        self.tasks.append(tuple(task.classes))
        self.model.train()

    def training_data(self, task: Task) -> tuple[Tensor, Tensor]:
        """What the loop should iterate over; only joint training asks for more than the task's own data."""
        return task.train()

    def observe(self, x: Tensor, y: Tensor) -> float:
        """One step on a batch; returns its loss with the regulariser's value.

        Raises:
            RuntimeError: before the first `begin_task`.
            ValueError: an empty batch, x with NaN or infinity or of another length than y, a label that is not one of
                the current classes; nothing has been learned.
        """
        self.check_batch(x, y)
        self.optimizer.zero_grad()
        loss = self.loss(x, y)
        loss.backward()
        value = loss.detach() + self.regularise()
        self.optimizer.step()
        return value.item()

    def resume_tasks(self, tasks: Sequence[Task]) -> None:
        """Called after `load_state_dict` with the stream's tasks, for methods whose data is not in the state."""

    def check_batch(self, x: Tensor, y: Tensor) -> None:
        """What :meth:`observe` asks of a batch: a NaN would end in every weight."""
        self.check_labels(y)
        if len(x) != len(y):
            raise ValueError(f"x has {len(x)} samples but y has {len(y)} labels")
        if x.is_floating_point() and not x.isfinite().all():
            raise ValueError("x has NaN or infinite values")

    def check_labels(self, y: Tensor) -> None:
        known = torch.tensor(self.classes, device=y.device)
        if y.numel() == 0:
            raise ValueError("y is empty: a batch must have at least one sample")
        unknown = y[~torch.isin(y, known)]
        if len(unknown):
            raise ValueError(f"y has the unknown label {unknown[0].item()} but must be one of {known.tolist()}")

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        """Cross-entropy over the competing outputs."""
        known = torch.tensor(self.classes, device=y.device)
        return F.cross_entropy(self.model(x)[:, known], torch.searchsorted(known, y))

    def regularise(self) -> Tensor | float:
        """Adds to the gradients between backward and step; returns the value added to the loss."""
        return 0.0

    def end_task(self, batches: Batches) -> None:
        """Ends the task that began last; `batches` iterate over its training data."""

    @torch.no_grad()
    def predict(self, x: Tensor, task: Task | int | None = None) -> Tensor:
        """Output units [N]. With `task` (or its index) among its classes only; else among all seen so far.

        Raises:
            ValueError: a task that has not begun.
        """
        if task is None and not self.tasks:
            raise RuntimeError("begin_task must come first")
        if task is None:
            known = self.seen
        else:
            index = task if isinstance(task, int) else task.index
            if isinstance(task, int) and not 0 <= index < len(self.tasks):
                raise ValueError(f"task is {index} but only {len(self.tasks)} tasks have begun")
            known = list(self.tasks[index]) if index < len(self.tasks) else list(task.classes)
        columns = torch.tensor(known, device=x.device)
        training = self.model.training
        self.model.eval()
        try:
            return columns[self.model(x)[:, columns].argmax(1)]
        finally:
            self.model.train(training)

    def state_dict(self) -> dict[str, Any]:
        """Nested dicts and lists of tensors, numbers and strings; no other types."""
        return {
            "method": self.name,
            "model": dict(self.model.state_dict()),
            "optimizer": self.optimizer.state_dict(),
            "tasks": [list(task) for task in self.tasks],
            "extra": self.extra_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over what :meth:`state_dict` gave. Raises ValueError, nothing having changed, if it is another method's
        or network's, incomplete, or has a tensor of another shape or dtype: a copy of the learner tries it first."""
        check_method(state, self.name)
        load_whole(self, type(self)._load, state)

    def _load(self, state: dict[str, Any]) -> None:
        check_keys(state, ("method", "model", "optimizer", "tasks", "extra"))
        self.model.load_state_dict(state["model"])
        load_optimizer(self.optimizer, state["optimizer"], "state.optimizer")
        self.tasks = tasks_of(state)
        check_like(state["extra"], self.extra_state(), "state.extra")
        self.load_extra_state(state["extra"])

    def memory(self) -> int:
        """Bytes kept of the past beside the network (masks are in it): importances, anchors, samples, old networks."""
        return _bytes({k: v for k, v in self.extra_state().items() if k not in ("shown", "reports")})

    def extra_state(self) -> dict[str, Any]:
        return {}

    def load_extra_state(self, state: dict[str, Any]) -> None:
        pass


class Regularised(Method):
    """A method that is its regulariser: `self.regulariser` adds its gradients in every step and keeps its state.

    Args:
        budget: of stored samples, at random and every class alike many; with any, each step trains on as many of them
            as there are new ones (EWC-S, SI-S, RWalk-S in the tables of Chaudhry et al. 2018 and DGM).

    Raises:
        ValueError: a negative budget.

    Example:
        >>> learner = fastcl.methods.EWC.build(stream, strength=10.0, budget=100)
        >>> learner.regulariser.strength, learner.exemplars.budget
        (10.0, 100)
    """

    regulariser: Regulariser

    def __init__(self, model: nn.Module, *, budget: int = 0, **options: Any) -> None:
        super().__init__(model, **options)
        self.exemplars = Exemplars(budget)

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        if not len(self.exemplars):
            return super().loss(x, y)
        old, classes = self.exemplars.draw(len(x))
        x, y = torch.cat([x, old]), torch.cat([y, classes])
        if self.setting == "task":
            return entropy_within_tasks(self.model(x), y, self.tasks)
        known = torch.tensor(self.classes, device=y.device)
        return F.cross_entropy(self.model(x)[:, known], torch.searchsorted(known, y))

    def regularise(self) -> Tensor:
        return self.regulariser.add_gradients()

    def consolidate(self, batches: Batches) -> None:
        """The regulariser's, at the end of a task."""
        raise NotImplementedError

    def end_task(self, batches: Batches) -> None:
        if not self.exemplars.budget:
            self.consolidate(batches)
            return
        batches = list(batches)
        self.consolidate(batches)
        x, y = (torch.cat(part) for part in zip(*batches, strict=True))
        self.exemplars.add(x, y, task=len(self.tasks) - 1)

    def extra_state(self) -> dict[str, Any]:
        return {"regulariser": self.regulariser.state_dict(), "exemplars": self.exemplars.state_dict()}

    def load_extra_state(self, state: dict[str, Any]) -> None:
        self.regulariser.load_state_dict(state["regulariser"])
        self.exemplars.load_state_dict(state["exemplars"], next(self.model.parameters()).device)


class Generative(Method):
    """A method that can show what it remembers; :meth:`generate` is also what `acc_generated` is measured on.

    Args:
        precision: of the generator's steps, as for :func:`fastcl.nn.mixed`; what is generated is made in float32.

    Raises:
        ValueError: an unknown precision.

    Example:
        >>> learner = fastcl.methods.DGR.build(stream); learner.begin_task(stream.tasks[0])
        >>> loss = learner.observe(*batch); [t.shape for t in learner.generate(10)]
        [torch.Size([10, 1, 8, 8]), torch.Size([10])]
    """

    shown: list[Tensor]  # a few generated images after each task

    def __init__(self, model: nn.Module, *, precision: str = "auto", **options: Any) -> None:
        super().__init__(model, **options)
        self.precision = check_precision(precision)

    def mixed(self) -> torch.autocast:
        """Around the losses of generator and critic."""
        return mixed(next(self.model.parameters()).device, self.precision, self.model)

    def generate(self, n: int) -> tuple[Tensor, Tensor]:
        """n images in [0, 1] of what was seen so far, and the output unit that each is meant to be [n]."""
        raise NotImplementedError

    def plot_generated(self, path: str | Path) -> None:
        """The generated images after each task."""
        plot_images({f"after task {t + 1}": x.float() for t, x in enumerate(self.shown)}, path)

    def learn_alone(
        self,
        x: Tensor,
        y: Tensor,
        images: Tensor,
        labels: Tensor,
        optimizer: torch.optim.Optimizer,
        passes: int,
        size: int,
    ) -> None:
        """The classifier without the critic, `passes` over the task: the rate falls to 0, images are moved a little.

        Every class alike often, `images` (bytes) generated of `labels`; of the task's own classes half are real,
        (x, y), once there are others.
        """
        steps = passes * -(-len(x) // size)
        own, share = y.unique(), 0.5 if self.past else 1.0
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
        for _ in range(steps):
            picked = torch.randint(len(labels), (size,)).to(y.device)
            seen, told = images[picked].to(x.dtype) / 255, labels[picked]
            real = torch.isin(told, own) & (torch.rand(size).to(y.device) < share)
            chosen = torch.randint(len(y), (int(real.sum()),)).to(y.device)
            seen[real], told[real] = x[chosen], y[chosen]
            optimizer.zero_grad()
            with self.mixed():
                loss = class_loss(self.model(jitter(seen)), told, self.classes)
            loss.backward()
            optimizer.step()
            schedule.step()

    def _evenly(self, n: int) -> Tensor:
        """n output units, all seen so far alike often, sorted."""
        seen = torch.tensor(self.seen)
        return seen[torch.arange(n) * len(seen) // n]


class Replaying(Generative):
    """A perceptron beside a generator that replays itself, `self.memory_of`: how both are built, and what they show."""

    memory_of: Replay

    @classmethod
    def build(
        cls,
        stream: Stream,
        *,
        hidden: tuple[int, ...] = (400, 400),
        latent: int = 100,
        generator: str = "vae",
        beta: float | None = None,
        seed: int = 0,
        **options: Any,
    ) -> Method:
        """`generator`: vae, cvae (conditional) or gan (WGAN-GP); `beta` as for :func:`fastcl.nn.make_generator`."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = mlp(stream.input_shape, hidden, stream.n_outputs)
            made = make_generator(generator, stream.input_shape, stream.n_outputs, hidden, latent, beta)
        return cls(model, made, setting=stream.setting, **options)  # type: ignore[call-arg]

    @property
    def generator(self) -> nn.Module:
        return self.memory_of.generator

    def begin_task(self, task: Task) -> None:
        super().begin_task(task)
        self.generator.to(next(self.model.parameters()).device)
        self.memory_of.begin_task(task.classes)

    def end_task(self, batches: Batches) -> None:
        self.shown.append(self.generate(100)[0].cpu())

    def generate(self, n: int) -> tuple[Tensor, Tensor]:
        """As :meth:`Generative.generate`; what an image is meant to be is, of a generator without classes, what the
        network takes it for."""
        x, y = self.memory_of.show(n)
        return x, self.predict(x) if y is None else y

    def extra_state(self) -> dict[str, Any]:
        return {"replay": self.memory_of.state_dict(), "shown": self.shown}

    def load_extra_state(self, state: dict[str, Any]) -> None:
        self.generator.to(next(self.model.parameters()).device)
        self.memory_of.load_state_dict(state["replay"])
        self.shown = list(state["shown"])


def _bytes(state: Any) -> int:
    """Of all tensors in nested dicts and lists, but for optimizers' states."""
    if isinstance(state, Tensor):
        return state.numel() * state.element_size()
    if isinstance(state, dict):
        return sum(_bytes(v) for k, v in state.items() if "optimizer" not in str(k))
    return sum(map(_bytes, state)) if isinstance(state, (list, tuple)) else 0
