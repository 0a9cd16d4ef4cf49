"""A generator that learns a stream by replaying itself."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..ops._state import check_keys, check_module, check_number, check_optimizer
from .gan import WGAN
from .precision import check_precision, mixed
from .vae import VAE, ConditionalVAE

GENERATORS = ("vae", "cvae", "gan")


def make_generator(
    kind: str,
    input_shape: Sequence[int],
    n_classes: int,
    hidden: Sequence[int] = (400, 400),
    latent: int = 100,
    beta: float | None = None,
) -> VAE | WGAN:
    """A new generator of images: ``vae``, ``cvae`` (conditional) or ``gan`` (WGAN-GP; has its own widths).

    `beta` as for :class:`VAE`; None: 1, or for images of less than 256 pixels 0.1.

    Raises:
        ValueError: another kind.

    Example:
        >>> type(make_generator("cvae", (1, 8, 8), 10)).__name__
        'ConditionalVAE'
    """
    if beta is None:
        beta = 1.0 if math.prod(input_shape) >= 256 else 0.1
    if kind == "vae":
        return VAE(input_shape, hidden, latent, beta)
    if kind == "cvae":
        return ConditionalVAE(input_shape, n_classes, hidden, latent, beta)
    if kind == "gan":
        return WGAN(input_shape)
    raise ValueError(f"generator is {kind!r} but must be one of {', '.join(GENERATORS)}")


class Replay:
    """A generator in a stream: it learns the new images and those of its own snapshot from the last task.

    Args:
        generator: a :class:`VAE`, a :class:`ConditionalVAE` with a class for each output unit, or a :class:`WGAN`.
        lr: Adam's.
        critic_steps: of a WGAN's critic for one of its generator.
        precision: of :meth:`learn`, as for :func:`mixed`.

    Raises:
        ValueError: critic_steps below 1, an unknown precision.

    Example:
        >>> replay = fastcl.nn.Replay(fastcl.nn.VAE((1, 28, 28))); replay.begin_task([0, 1])
        >>> replay.learn(torch.rand(8, 1, 28, 28), torch.zeros(8, dtype=torch.int64))
        >>> replay.begin_task([2, 3]); replay.sample(5)[0].shape   # from the snapshot
        torch.Size([5, 1, 28, 28])
    """

    def __init__(self, generator: VAE | WGAN, lr: float = 1e-3, critic_steps: int = 1, precision: str = "auto") -> None:
        if critic_steps < 1:
            raise ValueError(f"critic_steps is {critic_steps} but must be at least 1")
        self.generator, self.critic_steps, self.precision = generator, critic_steps, check_precision(precision)
        betas = (0.5, 0.9) if isinstance(generator, WGAN) else (0.9, 0.999)
        self.optimizer = torch.optim.Adam(generator.parameters(), lr, betas)
        self.previous: VAE | WGAN | None = None  # as the last task left it
        self.classes: list[int] = []
        self.past: list[int] = []
        self.learned = 0

    def begin_task(self, classes: Sequence[int]) -> None:
        """From now on :meth:`sample` gives what was learned before."""
        self.generator.train()
        if self.classes:
            self.previous = copy.deepcopy(self.generator).eval()
        self.past = self.classes
        self.classes = sorted({*self.classes, *classes})

    def sample(self, n: int) -> tuple[Tensor, Tensor]:
        """n images of earlier tasks, and their classes: zeros from a generator that knows none.

        Raises:
            RuntimeError: in the first task.
        """
        if self.previous is None:
            raise RuntimeError("sample: there is no earlier task yet")
        return self._sample(self.previous, n, self.past)

    def _sample(self, generator: VAE | WGAN, n: int, classes: list[int]) -> tuple[Tensor, Tensor]:
        device = next(generator.parameters()).device
        if isinstance(generator, ConditionalVAE):
            y = torch.tensor(classes)[torch.randint(len(classes), (n,))].to(device)
            return generator.sample(y), y
        return generator.sample(n), torch.zeros(n, dtype=torch.int64, device=device)

    def show(self, n: int) -> tuple[Tensor, Tensor | None]:
        """n images as the generator makes them now, and their classes, all alike often, if it knows any."""
        if isinstance(self.generator, ConditionalVAE):
            y = torch.tensor(self.classes)[torch.arange(n) * len(self.classes) // n]
            return self.generator.sample(y), y
        return self.generator.sample(n), None

    def learn(self, x: Tensor, y: Tensor, old: tuple[Tensor, Tensor] | None = None, share: float = 1.0) -> None:
        """A step on new images x of classes y, of weight `share`, and on `old` from :meth:`sample`."""
        self.learned += 1
        parts = [(share, x, y), (1 - share, *old)] if old is not None else [(1.0, x, y)]
        for loss in self._losses():
            self.optimizer.zero_grad()
            with mixed(x.device, self.precision, self.generator):
                total = torch.stack([weight * loss(images, classes) for weight, images, classes in parts]).sum()
            total.backward()
            self.optimizer.step()

    def _losses(self) -> list[Callable[[Tensor, Tensor], Tensor]]:
        """What one step descends, one after the other."""
        g = self.generator
        if isinstance(g, ConditionalVAE):
            return [g.loss]
        if isinstance(g, VAE):
            return [lambda x, _: g.loss(x)]
        steps: list[Callable[[Tensor, Tensor], Tensor]] = [lambda x, _: g.critic_loss(x)]
        if self.learned % self.critic_steps == 0:
            steps.append(lambda x, _: g.generator_loss(len(x)))
        return steps

    def state_dict(self) -> dict[str, Any]:
        return {
            "generator": dict(self.generator.state_dict()),
            "optimizer": self.optimizer.state_dict(),
            "previous": None if self.previous is None else dict(self.previous.state_dict()),
            "classes": self.classes,
            "past": self.past,
            "learned": self.learned,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises ValueError, changing nothing, if `state` is of another generator."""
        check_keys(state, self.state_dict())
        check_module(self.generator, state["generator"], "state.generator")
        check_optimizer(self.optimizer, state["optimizer"], "state.optimizer")
        if state["previous"] is not None:
            check_module(self.generator, state["previous"], "state.previous")
        for name in ("classes", "past"):
            if not isinstance(state[name], (list, tuple)) or not all(type(c) is int for c in state[name]):
                raise ValueError(f"state.{name} is {state[name]!r:.60} but must be a list of classes")
        check_number(state["learned"], "state.learned")
        self.generator.load_state_dict(state["generator"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.previous = None
        if state["previous"] is not None:
            self.previous = copy.deepcopy(self.generator).eval()
            self.previous.load_state_dict(state["previous"])
        self.classes, self.past, self.learned = list(state["classes"]), list(state["past"]), state["learned"]
