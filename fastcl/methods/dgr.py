"""DGR as a learner."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..nn import VAE, WGAN, Replay, distillation
from .method import Replaying

if TYPE_CHECKING:
    from ..streams import Task


class DGR(Replaying):
    r"""Deep generative replay (Shin et al. 2017).

    A generator and a solver learn together; the loss of task t is
    :math:`r\,L(C(x), y) + (1-r)\,L(C(x'), C_{prev}(x'))` with :math:`x' \sim G_{prev}`, the generator's likewise on x
    and x'. No old image is read.

    Args:
        model: the solver, an output unit for each class of the stream.
        generator: of images, as for :class:`fastcl.nn.Replay`.
        r: the new task's share; None: 1 / t, every task alike.
        labels: ``hard`` (the previous solver's class) or ``soft`` (its probabilities at temperature 2, distilled).
        replay: ``generated``; or ``noise``, the seed's baseline: uniform random images instead.
        generator_lr: Adam's, of the generator. critic_steps: of a WGAN's critic for one of its generator.
        lr, optimizer: of the solver, as for :class:`Method`.
        precision: of the generator's steps, as for :func:`fastcl.nn.mixed`.

    Raises:
        ValueError: unknown `labels` or `replay`, r outside (0, 1].

    Example:
        >>> learner = DGR.build(stream, generator="cvae"); learner.begin_task(stream.tasks[0])
        >>> learner.observe(*batch) > 0
        True
    """

    name = "dgr"
    paper = "Shin et al. 2017, Continual learning with deep generative replay"
    seed = "generative-memory"
    epochs: ClassVar[dict[str, int]] = {"digits": 40, "mnist": 16}  # its generator learns slowly
    TEMPERATURE = 2.0

    def __init__(
        self,
        model: nn.Module,
        generator: VAE | WGAN,
        *,
        r: float | None = None,
        labels: str = "soft",
        replay: str = "generated",
        generator_lr: float = 1e-3,
        critic_steps: int = 1,
        **options: Any,
    ) -> None:
        if labels not in ("hard", "soft") or replay not in ("generated", "noise"):
            raise ValueError("labels must be hard or soft, and replay generated or noise")
        if r is not None and not 0 < r <= 1:
            raise ValueError(f"r is {r} but must lie in (0, 1]")
        super().__init__(model, **options)
        self.r, self.labels, self.replay = r, labels, replay
        self.memory_of = Replay(generator, generator_lr, critic_steps, self.precision)
        self.solver: nn.Module | None = None  # as the last task left it
        self.shown: list[Tensor] = []

    def begin_task(self, task: Task) -> None:
        super().begin_task(task)
        if len(self.tasks) > 1:
            self.solver = copy.deepcopy(self.model).eval()

    def observe(self, x: Tensor, y: Tensor) -> float:
        self.check_batch(x, y)
        share = 1.0 if self.solver is None else self.r or 1 / len(self.tasks)
        loss = share * super().loss(x, y)
        old = None
        if self.solver is not None:
            if self.replay == "generated":
                old = self.memory_of.sample(len(x))
            loss = loss + (1 - share) * self._remembered(torch.rand_like(x) if old is None else old[0])
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.memory_of.learn(x, y, old, share)
        return loss.item()

    def _remembered(self, x: Tensor) -> Tensor:
        """What the solver makes of replayed images against what it made of them before."""
        with torch.no_grad():
            before = self.solver(x)
        now = self.model(x)
        if self.setting == "task":  # an image may be of any past task: each head is held to what it said
            groups = [(list(task), list(task)) for task in self.tasks[:-1]]
        else:  # classes of later tasks had no say yet
            groups = [(self.past, self.classes)]
        losses = []
        for known, competing in groups:
            if self.labels == "hard":
                right = torch.tensor([competing.index(c) for c in known], device=x.device)
                losses.append(F.cross_entropy(now[:, competing], right[before[:, known].argmax(1)]))
            else:
                losses.append(distillation(now, before, known, competing, self.TEMPERATURE))
        return torch.stack(losses).mean()

    def extra_state(self) -> dict[str, Any]:
        return {**super().extra_state(), "solver": None if self.solver is None else dict(self.solver.state_dict())}

    def load_extra_state(self, state: dict[str, Any]) -> None:
        super().load_extra_state(state)
        self.solver = None
        if state["solver"] is not None:
            self.solver = copy.deepcopy(self.model).eval()
            self.solver.load_state_dict(state["solver"])
