"""Stored samples of earlier tasks, and how to choose them."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn

from ..ops._state import check_tensor


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
        """Raises ValueError, changing nothing, if `state` is not of samples, or of more than the budget."""
        samples: dict[tuple[int, int], Tensor] = {}
        for key, kept in state.items():
            if not isinstance(key, str) or not re.fullmatch(r"\d+ \d+", key):
                raise ValueError(f"state has the key {key!r} but must have a task and a class, like '0 3'")
            first = next(iter(samples.values()), kept)
            check_tensor(kept, None, getattr(first, "dtype", None), f"state: {key}")
            check_tensor(kept, (len(kept), *first.shape[1:]) if kept.dim() else [0], None, f"state: {key}")
            task, c = map(int, key.split())
            samples[task, c] = kept.to(device)
        if sum(map(len, samples.values())) > self.budget:
            raise ValueError(f"state has {sum(map(len, samples.values()))} samples but the budget is {self.budget}")
        self.samples = samples
