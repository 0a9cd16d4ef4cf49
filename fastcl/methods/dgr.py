"""DGR as a learner."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..nn import VAE, mlp, plot_images
from .method import Batches, Method

if TYPE_CHECKING:
    from ..streams import Stream, Task


class DGR(Method):
    r"""Deep generative replay (Shin et al. 2017).

    A generator and a solver learn together; the loss of task t is
    :math:`r\,L(C(x), y) + (1-r)\,L(C(x'), C_{prev}(x'))` with :math:`x' \sim G_{prev}`, the generator's likewise on x
    and x'. No old image is read.

    Args:
        model: the solver, an output unit for each class of the stream.
        generator: maps nothing to images: a :class:`fastcl.nn.VAE`.
        r: the new task's share; None: 1 / t, every task alike.
        labels: ``hard`` (the previous solver's class) or ``soft`` (its probabilities at temperature 2, distilled).
        replay: ``generated``; or ``noise``, the seed's baseline: uniform random images instead.
        generator_lr: Adam's, of the generator.
        lr, optimizer: of the solver, as for :class:`Method`.
    """

    name = "dgr"
    paper = "Shin et al. 2017, Continual learning with deep generative replay"
    seed = "generative-memory"
    TEMPERATURE = 2.0

    def __init__(
        self,
        model: nn.Module,
        generator: VAE,
        *,
        r: float | None = None,
        labels: str = "soft",
        replay: str = "generated",
        generator_lr: float = 1e-3,
        **options: Any,
    ) -> None:
        if labels not in ("hard", "soft") or replay not in ("generated", "noise"):
            raise ValueError("labels must be hard or soft, and replay generated or noise")
        if r is not None and not 0 < r <= 1:
            raise ValueError(f"r is {r} but must lie in (0, 1]")
        super().__init__(model, **options)
        self.generator, self.r, self.labels, self.replay = generator, r, labels, replay
        self.generator_optimizer = torch.optim.Adam(generator.parameters(), generator_lr)
        self.previous: tuple[nn.Module, VAE] | None = None  # solver and generator as the last task left them
        self.shown: list[Tensor] = []  # a few generated images after each task

    @classmethod
    def build(
        cls,
        stream: Stream,
        *,
        hidden: tuple[int, ...] = (400, 400),
        latent: int = 100,
        seed: int = 0,
        **options: Any,
    ) -> Method:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = mlp(stream.input_shape, hidden, stream.n_outputs)
            generator = VAE(stream.input_shape, hidden, latent)
        return cls(model, generator, setting=stream.setting, **options)

    def begin_task(self, task: Task) -> None:
        super().begin_task(task)
        device = next(self.model.parameters()).device
        self.generator.to(device).train()
        if len(self.tasks) > 1:
            self.previous = copy.deepcopy(self.model).eval(), copy.deepcopy(self.generator).eval()

    def observe(self, x: Tensor, y: Tensor) -> float:
        self.check_labels(y)
        share = 1.0 if self.previous is None else self.r or 1 / len(self.tasks)
        old = None if self.previous is None else self._replayed(len(x))
        loss = share * super().loss(x, y)
        generated = share * self.generator.loss(x)
        if old is not None:
            loss = loss + (1 - share) * self._remembered(old)
            if self.replay == "generated":
                generated = generated + (1 - share) * self.generator.loss(old)
        for optimizer, value in ((self.optimizer, loss), (self.generator_optimizer, generated)):
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
        return loss.item()

    def _replayed(self, n: int) -> Tensor:
        _, generator = self.previous
        if self.replay == "noise":
            return torch.rand(n, *generator.input_shape, device=generator.mean.weight.device)
        return generator.sample(n)

    def _remembered(self, x: Tensor) -> Tensor:
        """What the solver makes of replayed images against what it made of them before."""
        solver, _ = self.previous
        with torch.no_grad():
            before = solver(x)
        now = self.model(x)
        past = self.tasks[:-1]
        if self.setting == "task":  # an image may be of any past task: each head is held to what it said
            groups = [list(task) for task in past]
        else:
            groups = [sorted({c for task in past for c in task})]
        losses = []
        for known in groups:
            competing = known if self.setting == "task" else self.classes
            columns = torch.tensor(competing, device=x.device)
            old = torch.full_like(now, float("-inf"))
            old[:, known] = before[:, known]  # classes of later tasks had no say yet
            old = old[:, columns]
            if self.labels == "hard":
                losses.append(F.cross_entropy(now[:, columns], old.argmax(1)))
            else:
                t = self.TEMPERATURE
                losses.append(F.cross_entropy(now[:, columns] / t, (old / t).softmax(1)) * t * t)
        return torch.stack(losses).mean()

    def end_task(self, batches: Batches) -> None:
        self.shown.append(self.generator.sample(100).cpu())

    def plot_generated(self, path: str | Path) -> None:
        """A hundred generated images after each task."""
        plot_images({f"after task {t + 1}": x for t, x in enumerate(self.shown)}, path)

    def extra_state(self) -> dict[str, Any]:
        return {
            "generator": dict(self.generator.state_dict()),
            "generator_optimizer": self.generator_optimizer.state_dict(),
            "previous": None if self.previous is None else [dict(m.state_dict()) for m in self.previous],
            "shown": self.shown,
        }

    def load_extra_state(self, state: dict[str, Any]) -> None:
        self.generator.to(next(self.model.parameters()).device).load_state_dict(state["generator"])
        self.generator_optimizer.load_state_dict(state["generator_optimizer"])
        self.previous, self.shown = None, list(state["shown"])
        if state["previous"] is not None:
            self.previous = copy.deepcopy(self.model).eval(), copy.deepcopy(self.generator).eval()
            for module, saved in zip(self.previous, state["previous"], strict=True):
                module.load_state_dict(saved)
