"""Trains a learner on a stream and measures it: what `fastcl run` does, for use from Python too."""

from __future__ import annotations

import inspect
import json
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import __version__, checkpoint, metrics, streams
from .checkpoint import CheckpointError
from .methods import METHODS, Generative, Method
from .nn import mlp

# epochs, batch size and hidden widths that suit each data set; MNIST's are Hsu et al. 2018's
DEFAULTS: dict[str, dict[str, Any]] = {
    "digits": {"epochs": 15, "batch_size": 32, "hidden": (128, 128)},
    "mnist": {"epochs": 4, "batch_size": 128, "hidden": (400, 400)},
}
Report = Callable[[int, int, int, int, float], None]  # task, epoch, batch, batches, loss


@dataclass(frozen=True)
class Config:
    """One run. None takes the data set's default.

    Example:
        >>> Config("ewc", setting="task", options={"strength": 100.0}).resolved().epochs
        15
    """

    method: str
    data: str = "digits"
    data_root: str | None = None
    scenario: str = "split"
    setting: str = "class"
    tasks: int | None = None
    epochs: int | None = None
    batch_size: int | None = None
    lr: float | None = None
    seed: int = 0
    device: str = "cpu"
    options: dict[str, Any] = field(default_factory=dict)

    def resolved(self) -> Config:
        """With defaults filled in and every value checked.

        Raises:
            ValueError: unknown method, data, device, or numbers out of range.
        """
        if self.method not in METHODS:
            raise ValueError(f"method is {self.method!r} but must be one of {', '.join(METHODS)}")
        if self.data not in DEFAULTS:
            raise ValueError(f"data is {self.data!r} but must be one of {', '.join(DEFAULTS)}")
        default = DEFAULTS[self.data]
        usual = METHODS[self.method].epochs.get(self.data, default["epochs"])
        epochs = usual if self.epochs is None else self.epochs
        lr = METHODS[self.method].usual_lr if self.lr is None else self.lr
        batch_size = default["batch_size"] if self.batch_size is None else self.batch_size
        for name, value in (("epochs", epochs), ("batch_size", batch_size)):
            if value < 1:
                raise ValueError(f"{name} is {value} but must be at least 1")
        if not -(2**63) <= self.seed < 2**63:
            raise ValueError(f"seed is {self.seed} but must fit 64 bits")
        try:
            torch.empty(0, device=self.device)
        except (RuntimeError, AssertionError) as error:
            reason = str(error).split("\n", 1)[0]
            raise ValueError(f"device is {self.device!r} but cannot be used here: {reason}") from None
        return Config(**{**asdict(self), "epochs": epochs, "batch_size": batch_size, "lr": lr})


class Run:
    """A learner on its stream, ready to train.

    Args:
        config: what to run.
        folder: keep a checkpoint there, written after every epoch.
        resume: continue from it.
        previous: with `resume`: from the checkpoint before the last one.

    Raises:
        ValueError, FileNotFoundError: whatever is wrong with `config`, the data or the checkpoint, before training.

    Example:
        >>> result = Run(Config("ewc", setting="task", epochs=1)).train()
        >>> sorted(result)[:3]
        ['acc_generated', 'accuracy', 'average_accuracy']
    """

    def __init__(
        self, config: Config, folder: str | Path | None = None, *, resume: bool = False, previous: bool = False
    ) -> None:
        self.config = config.resolved()
        c = self.config
        self.stream = streams.make(streams.load(c.data, c.data_root), c.scenario, c.setting, c.tasks, c.seed)
        method = METHODS[c.method]
        options = {"seed": c.seed, "lr": c.lr, **c.options}
        taken = {**inspect.signature(method.__init__).parameters, **inspect.signature(method.build).parameters}
        own = {"hidden": DEFAULTS[c.data]["hidden"], "epochs": c.epochs}
        options = {**{name: value for name, value in own.items() if name in taken}, **options}
        self.learner: Method = method.build(self.stream, **options)
        self.learner.model.to(c.device)
        self.shuffle = torch.Generator().manual_seed(c.seed)
        self.accuracy: list[list[float]] = []
        self.task, self.epoch, self.seconds = 0, 0, 0.0
        self.untrained: list[float] | None = None
        self.folder = None if folder is None else Path(folder)
        if resume:
            if self.folder is None:
                raise ValueError("resume needs checkpoint: the folder to continue from")
            self._restore(checkpoint.load(self.folder, previous=previous))

    def train(self, report: Report | None = None) -> dict[str, Any]:
        """Trains what is left and returns the result, the dict that `fastcl run` writes as result.json."""
        c, start = self.config, time.perf_counter()
        if not self.accuracy and self.task == 0 and self.epoch == 0:
            torch.manual_seed(c.seed)
            self.untrained = [self._accuracy(task, restrict=True) for task in self.stream.tasks]
        while self.task < len(self.stream.tasks):
            task = self.stream.tasks[self.task]
            if len(self.learner.tasks) == self.task:
                self.learner.begin_task(task)
            x, y = self.learner.training_data(task)
            while self.epoch < c.epochs:
                n_batches = -(-len(x) // c.batch_size)
                for i, (a, b) in enumerate(self._batches(x, y, shuffle=True)):
                    loss = self.learner.observe(a, b)
                    if report is not None:
                        report(self.task, self.epoch, i, n_batches, loss)
                self.epoch += 1
                self._save(start)
            self.learner.end_task(list(self._batches(*task.train(), shuffle=False)))
            self.accuracy.append([self._accuracy(t, restrict=c.setting == "task") for t in self.stream.tasks])
            self.task, self.epoch = self.task + 1, 0
            self._save(start)
        return self._result(self.seconds + time.perf_counter() - start)

    def _batches(self, x: Tensor, y: Tensor, *, shuffle: bool) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.randperm(len(x), generator=self.shuffle) if shuffle else torch.arange(len(x))
        for part in order.split(self.config.batch_size):
            yield x[part].to(self.config.device), y[part].to(self.config.device)

    def _accuracy(self, task: streams.Task, *, restrict: bool) -> float:
        x, y = task.test()
        right = 0
        for a, b in zip(x.split(1024), y.split(1024), strict=True):
            found = self.learner.predict(a.to(self.config.device), task if restrict else None)
            right += int((found.cpu() == b).sum())
        return right / len(x)

    def _identity(self) -> dict[str, Any]:
        """What must be the same for a checkpoint to be continued; where the data lies and the device may change."""
        kept = {k: v for k, v in asdict(self.config).items() if k not in ("data_root", "device")}
        return json.loads(json.dumps(kept))  # tuples become the lists that a checkpoint gives back

    def _save(self, start: float) -> None:
        if self.folder is None:
            return
        checkpoint.save(
            self.folder,
            {
                "config": self._identity(),
                "learner": self.learner.state_dict(),
                "task": self.task,
                "epoch": self.epoch,
                "shuffle": self.shuffle.get_state(),
                "rng": torch.get_rng_state(),
                "accuracy": self.accuracy,
                "untrained": self.untrained,
                "seconds": self.seconds + time.perf_counter() - start,
            },
        )

    def _restore(self, state: dict[str, Any]) -> None:
        wrong = f"the checkpoint in {self.folder}"
        missing = {"config", "learner", "task", "epoch", "shuffle", "rng", "accuracy", "untrained", "seconds"} - set(
            state
        )
        if missing or not isinstance(state["config"], dict):
            raise CheckpointError(f"{wrong} is not of a run: it has no {', '.join(sorted(missing)) or 'config'}")
        mine, its = self._identity(), state["config"]
        for key, value in mine.items():
            theirs = its.get(key)
            if value != theirs:
                raise ValueError(f"{key} is {value!r} but {wrong} was made with {theirs!r}")
        task, epoch = state["task"], state["epoch"]
        if not (
            type(task) is type(epoch) is int and 0 <= task <= len(self.stream.tasks) and 0 <= epoch <= mine["epochs"]
        ):
            raise CheckpointError(f"{wrong} is of task {task!r}, epoch {epoch!r}, which this run does not have")
        if not isinstance(state["accuracy"], list) or len(state["accuracy"]) != task:
            raise CheckpointError(f"{wrong} is of task {task} but its accuracies are {state['accuracy']!r:.60}")
        rng = torch.get_rng_state()
        try:
            self.learner.load_state_dict(state["learner"])
            self.shuffle.set_state(state["shuffle"])
            torch.set_rng_state(state["rng"])
        except (ValueError, RuntimeError, TypeError) as error:
            torch.set_rng_state(rng)
            raise CheckpointError(f"{wrong} does not fit: {error}") from None
        self.learner.resume_tasks(self.stream.tasks)
        self.learner.model.train()
        self.task, self.epoch, self.seconds = task, epoch, state["seconds"]
        self.accuracy, self.untrained = state["accuracy"], state["untrained"]

    def _acc_generated(self, images: int = 1000) -> float | None:
        """How often a classifier trained on the stream's real data names the generated images as they are meant.

        The evaluator's own: an MLP trained on all tasks at once. None for methods that generate nothing, and in streams
        where one image has several right answers.
        """
        if not isinstance(self.learner, Generative) or self.config.scenario != "split":
            return None
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            x, y = (torch.cat(part) for part in zip(*(task.train() for task in self.stream.tasks), strict=True))
            judge = mlp(self.stream.input_shape, (256,), self.stream.n_outputs)
            optimizer = torch.optim.Adam(judge.parameters(), 1e-3)
            for _ in range(max(2, 60_000 // len(x))):
                for part in torch.randperm(len(x)).split(128):
                    optimizer.zero_grad()
                    torch.nn.functional.cross_entropy(judge(x[part]), y[part]).backward()
                    optimizer.step()
            made, meant = (t.cpu() for t in self.learner.generate(images))
            with torch.no_grad():
                return float((judge(made).argmax(1) == meant).float().mean())

    def _result(self, seconds: float) -> dict[str, Any]:
        c = self.config
        return {
            "method": c.method,
            "setting": c.setting,
            "scenario": c.scenario,
            "data": c.data,
            "seed": c.seed,
            "accuracy": self.accuracy,
            "average_accuracy": metrics.average_accuracy(self.accuracy),
            "forgetting": metrics.forgetting(self.accuracy),
            "backward_transfer": metrics.backward_transfer(self.accuracy),
            # before its classes are known to compete, a task in the class setting has no accuracy to transfer
            "forward_transfer": None
            if c.setting == "class"
            else metrics.forward_transfer(self.accuracy, self.untrained),
            "acc_generated": self._acc_generated(),
            "parameters": sum(p.numel() for p in self.learner.model.parameters()),
            "memory": self.learner.memory(),
            "seconds": seconds,
            "epochs": c.epochs,
            "batch_size": c.batch_size,
            "options": c.options,
            "versions": {
                "fastcl": __version__,
                "torch": torch.__version__,
                "numpy": np.__version__,
                "python": platform.python_version(),
            },
        }
