"""DGR as a learner."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..nn import VAE, WGAN, ConditionalVAE, mlp
from .method import Batches, Generative, Method

if TYPE_CHECKING:
    from ..streams import Stream, Task


class DGR(Generative):
    r"""Deep generative replay (Shin et al. 2017).

    A generator and a solver learn together; the loss of task t is
    :math:`r\,L(C(x), y) + (1-r)\,L(C(x'), C_{prev}(x'))` with :math:`x' \sim G_{prev}`, the generator's likewise on x
    and x'. No old image is read.

    Args:
        model: the solver, an output unit for each class of the stream.
        generator: a :class:`fastcl.nn.VAE`, a :class:`fastcl.nn.ConditionalVAE` with a class for each output unit (old
            classes are then asked for alike often) or a :class:`fastcl.nn.WGAN`.
        r: the new task's share; None: 1 / t, every task alike.
        labels: ``hard`` (the previous solver's class) or ``soft`` (its probabilities at temperature 2, distilled).
        replay: ``generated``; or ``noise``, the seed's baseline: uniform random images instead.
        generator_lr: Adam's, of the generator. critic_steps: of a WGAN's critic for one of its generator.
        lr, optimizer: of the solver, as for :class:`Method`.
    """

    name = "dgr"
    paper = "Shin et al. 2017, Continual learning with deep generative replay"
    seed = "generative-memory"
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
        if critic_steps < 1:
            raise ValueError(f"critic_steps is {critic_steps} but must be at least 1")
        super().__init__(model, **options)
        self.critic_steps, self._observed = critic_steps, 0
        self.generator, self.r, self.labels, self.replay = generator, r, labels, replay
        betas = (0.5, 0.9) if isinstance(generator, WGAN) else (0.9, 0.999)
        self.generator_optimizer = torch.optim.Adam(generator.parameters(), generator_lr, betas)
        self.previous: tuple[nn.Module, VAE | WGAN] | None = None  # solver and generator as the last task left them
        self.shown: list[Tensor] = []  # a few generated images after each task

    @classmethod
    def build(
        cls,
        stream: Stream,
        *,
        hidden: tuple[int, ...] = (400, 400),
        latent: int = 100,
        generator: str = "vae",
        seed: int = 0,
        **options: Any,
    ) -> Method:
        """`generator`: vae, cvae (conditional) or gan (WGAN-GP)."""
        if generator not in ("vae", "cvae", "gan"):
            raise ValueError(f"generator is {generator!r} but must be vae, cvae or gan")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = mlp(stream.input_shape, hidden, stream.n_outputs)
            made: VAE | WGAN
            if generator == "vae":
                made = VAE(stream.input_shape, hidden, latent)
            elif generator == "cvae":
                made = ConditionalVAE(stream.input_shape, stream.n_outputs, hidden, latent)
            else:
                made = WGAN(stream.input_shape)
        return cls(model, made, setting=stream.setting, **options)

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
        if old is not None:
            loss = loss + (1 - share) * self._remembered(old[0])
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self._learn_images(x, y, None if self.replay == "noise" else old, share)
        return loss.item()

    def _learn_images(self, x: Tensor, y: Tensor, old: tuple[Tensor, Tensor] | None, share: float) -> None:
        """A step of the generator on the new images and the replayed ones."""
        self._observed += 1
        seen = [(share if old else 1.0, x, y), *([(1 - share, *old)] if old else [])]
        for step in self._generator_losses():
            self.generator_optimizer.zero_grad()
            torch.stack([weight * step(images, labels) for weight, images, labels in seen]).sum().backward()
            self.generator_optimizer.step()

    def _generator_losses(self) -> list[Callable[[Tensor, Tensor], Tensor]]:
        """What the generator descends, one step after the other."""
        g = self.generator
        if isinstance(g, ConditionalVAE):
            return [g.loss]
        if isinstance(g, VAE):
            return [lambda x, _: g.loss(x)]
        steps: list[Callable[[Tensor, Tensor], Tensor]] = [lambda x, _: g.critic_loss(x)]
        if self._observed % self.critic_steps == 0:
            steps.append(lambda x, _: g.generator_loss(len(x)))
        return steps

    def _replayed(self, n: int) -> tuple[Tensor, Tensor]:
        """Images of the previous generator, and the classes it was asked for (of no meaning where it knows none)."""
        _, generator = self.previous
        device = next(generator.parameters()).device
        if self.replay == "noise":
            return torch.rand(n, *generator.input_shape, device=device), torch.zeros(n, dtype=torch.int64)
        if isinstance(generator, ConditionalVAE):
            past = torch.tensor(sorted({c for task in self.tasks[:-1] for c in task}), device=device)
            y = past[torch.randint(len(past), (n,)).to(device)]
            return generator.sample(y), y
        return generator.sample(n), torch.zeros(n, dtype=torch.int64)

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
        self.shown.append(self.generate(100)[0].cpu())

    def generate(self, n: int) -> tuple[Tensor, Tensor]:
        """As :meth:`Generative.generate`; what an image is meant to be is, of a generator without classes, what the
        solver takes it for."""
        if isinstance(self.generator, ConditionalVAE):
            y = self._evenly(n)
            return self.generator.sample(y), y
        x = self.generator.sample(n)
        return x, self.predict(x)

    def extra_state(self) -> dict[str, Any]:
        return {
            "generator": dict(self.generator.state_dict()),
            "generator_optimizer": self.generator_optimizer.state_dict(),
            "previous": None if self.previous is None else [dict(m.state_dict()) for m in self.previous],
            "shown": self.shown,
            "observed": self._observed,
        }

    def load_extra_state(self, state: dict[str, Any]) -> None:
        self.generator.to(next(self.model.parameters()).device).load_state_dict(state["generator"])
        self.generator_optimizer.load_state_dict(state["generator_optimizer"])
        self.previous, self.shown, self._observed = None, list(state["shown"]), state["observed"]
        if state["previous"] is not None:
            self.previous = copy.deepcopy(self.model).eval(), copy.deepcopy(self.generator).eval()
            for module, saved in zip(self.previous, state["previous"], strict=True):
                module.load_state_dict(saved)
