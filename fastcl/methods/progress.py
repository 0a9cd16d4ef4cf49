"""How far a task's training has come, counted in samples: for what changes within it."""

from __future__ import annotations

import math

import torch


def check_training(epochs: int, finish: int, cooling: float) -> None:
    if epochs < 1 or finish < 0:
        raise ValueError(f"epochs is {epochs} and finish {finish} but must be at least 1 and 0")
    if not 0 <= cooling <= 1:
        raise ValueError(f"cooling is {cooling} but must be in [0, 1]")


class Progress:
    """Epoch and batch of a task, from the samples that were shown; beyond the epochs it was told it stays at the end.

    Args:
        epochs: over a task's data.

    Example:
        >>> progress = Progress(2); progress.begin(96); progress.advance(64); progress.at(32)
        (0, 1, 2)
    """

    def __init__(self, epochs: int = 1) -> None:
        self.epochs = epochs
        self.begin(0)

    def begin(self, samples: int) -> None:
        """A task of so many samples."""
        self.samples, self.seen, self.epoch, self.batch = samples, 0, 0, 0

    def at(self, n: int) -> tuple[int, int, int]:
        """(epoch, batch, batches of an epoch), from 0, of the next n samples. The first batch tells all sizes."""
        size = self.batch or n
        batches = max(1, math.ceil(self.samples / size))
        return min(self.epoch, self.epochs - 1), min(self.seen // size, batches - 1), batches

    def cool(self, n: int, share: float, *optimizers: torch.optim.Optimizer) -> None:
        """The optimizers' rates for the next n samples: what they were made with falls to 0 over the last `share`."""
        epoch, batch, batches = self.at(n)
        left = 1 - (epoch * batches + batch) / (self.epochs * batches)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = optimizer.defaults["lr"] * (left / share if left < share else 1.0)

    def advance(self, n: int) -> None:
        """n samples were shown."""
        self.batch = self.batch or n
        self.seen += n
        if self.seen >= self.samples:
            self.seen, self.epoch = 0, self.epoch + 1

    def state(self) -> list[int]:
        return [self.samples, self.seen, self.epoch, self.batch]

    def load(self, state: list[int]) -> None:
        self.samples, self.seen, self.epoch, self.batch = state
