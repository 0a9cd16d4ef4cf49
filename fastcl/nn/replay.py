"""A generator that learns a stream by replaying itself, and stored samples: what methods remember images by."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .gan import WGAN
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

    Raises:
        ValueError: critic_steps below 1.

    Example:
        >>> replay = fastcl.nn.Replay(fastcl.nn.VAE((1, 28, 28))); replay.begin_task([0, 1])
        >>> replay.learn(torch.rand(8, 1, 28, 28), torch.zeros(8, dtype=torch.int64))
        >>> replay.begin_task([2, 3]); replay.sample(5)[0].shape   # from the snapshot
        torch.Size([5, 1, 28, 28])
    """

    def __init__(self, generator: VAE | WGAN, lr: float = 1e-3, critic_steps: int = 1) -> None:
        if critic_steps < 1:
            raise ValueError(f"critic_steps is {critic_steps} but must be at least 1")
        self.generator, self.critic_steps = generator, critic_steps
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
            torch.stack([weight * loss(images, classes) for weight, images, classes in parts]).sum().backward()
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
        self.generator.load_state_dict(state["generator"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.previous = None
        if state["previous"] is not None:
            self.previous = copy.deepcopy(self.generator).eval()
            self.previous.load_state_dict(state["previous"])
        self.classes, self.past, self.learned = list(state["classes"]), list(state["past"]), state["learned"]


def herd(features: Tensor, n: int) -> Tensor:
    r"""iCaRL's exemplars (Rebuffi et al. 2017, algorithm 4): places of n samples whose mean follows that of all.

    Step k takes the sample that brings the mean of the chosen nearest to :math:`\mu`: with features of length 1 that is
    the largest product with :math:`k\mu-\sum`, one matrix-vector product; nothing is deleted.

    Args:
        features: [N, D], made length 1 here.
        n: at most N.

    Returns:
        int64 [n], in order of choice: the first m of them are the choice for m.

    Raises:
        ValueError: n out of range.

    Example:
        >>> fastcl.nn.herd(torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0]]), 1)
        tensor([1])
    """
    if not 0 <= n <= len(features):
        raise ValueError(f"n is {n} but must be from 0 to the number of samples, {len(features)}")
    phi = nn.functional.normalize(features.detach(), dim=1)
    mean, total = phi.mean(0), torch.zeros_like(phi[0])
    free = torch.zeros(len(phi), dtype=phi.dtype, device=phi.device)
    chosen = torch.empty(n, dtype=torch.int64, device=phi.device)
    for k in range(n):
        at = torch.mv(phi, (k + 1) * mean - total).add_(free).argmax()
        chosen[k] = at
        total += phi[at]
        free[at] = -torch.inf
    return chosen


class Exemplars:
    """Stored samples, at most `budget` in all and every class (of a task, if tasks share classes) alike many.

    Args:
        budget: how many; 2000 in iCaRL.

    Raises:
        ValueError: a negative budget.

    Example:
        >>> stored = fastcl.nn.Exemplars(4); stored.add(torch.rand(9, 2), torch.arange(9) % 3); stored.y
        tensor([0, 1, 2])
    """

    def __init__(self, budget: int) -> None:
        if budget < 0:
            raise ValueError(f"budget is {budget} but must not be negative")
        self.budget = budget
        self.samples: dict[tuple[int, int], Tensor] = {}  # of every task and class, the most telling first

    def add(self, x: Tensor, y: Tensor, features: Tensor | None = None, task: int = 0) -> None:
        """Takes samples of new classes, herded by features [N, D] or at random, and drops the last of the old ones."""
        new = [int(c) for c in y.unique() if (task, int(c)) not in self.samples]
        each = self.budget // max(1, len(self.samples) + len(new))
        self.samples = {key: kept[:each].clone() for key, kept in self.samples.items()}
        for c in new:
            mine = (y == c).nonzero().flatten()
            n = min(each, len(mine))
            order = herd(features[mine], n) if features is not None else torch.randperm(len(mine))[:n].to(mine.device)
            self.samples[task, c] = x[mine[order]].clone()

    def __len__(self) -> int:
        return sum(map(len, self.samples.values()))

    @property
    def x(self) -> Tensor:
        return torch.cat([*self.samples.values()])

    @property
    def y(self) -> Tensor:
        return torch.cat([torch.full((len(s),), c, device=s.device) for (_, c), s in self.samples.items()])

    def draw(self, n: int) -> tuple[Tensor, Tensor]:
        """n of them at random, with repetition."""
        x, y = self.x, self.y
        at = torch.randint(len(y), (n,)).to(y.device)
        return x[at], y[at]

    def state_dict(self) -> dict[str, Any]:
        return {f"{task} {c}": kept for (task, c), kept in self.samples.items()}

    def load_state_dict(self, state: dict[str, Any], device: torch.device | None = None) -> None:
        keys = [tuple(map(int, key.split())) for key in state]
        self.samples = {(task, c): kept.to(device) for (task, c), kept in zip(keys, state.values(), strict=True)}
