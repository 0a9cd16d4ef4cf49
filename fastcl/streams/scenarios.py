"""Streams of tasks: split, permuted and rotated data in the task, domain and class settings.

The settings (van de Ven and Tolias 2019) differ in what a test asks. ``task``: which of this task's classes, the task
being given; ``domain``: which class within its task, the task not given; ``class``: which of all classes seen.
One output layer serves all: a task names the output units (`classes`) that belong to it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from .data import Data

SCENARIOS = ("split", "permuted", "rotated", "variation")
SETTINGS = ("task", "domain", "class")
Split = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Task:
    """One task: its output units and, made when asked for, its tensors (ten permuted MNISTs need not fit at once).

    Example:
        >>> [t.shape for t in stream.tasks[0].test()]
        [torch.Size([73, 1, 8, 8]), torch.Size([73])]
    """

    index: int
    classes: tuple[int, ...]
    load_train: Callable[[], Split] = field(repr=False)
    load_test: Callable[[], Split] = field(repr=False)

    def train(self) -> Split:
        """x [N, ...] float32 and y [N] int64, labels among `classes`."""
        return self.load_train()

    def test(self) -> Split:
        return self.load_test()


@dataclass(frozen=True)
class Stream:
    """Tasks in order, with what a network for them needs to know.

    Example:
        >>> stream.n_outputs, stream.input_shape, len(stream.tasks)
        (10, (1, 8, 8), 5)
    """

    name: str
    scenario: str
    setting: str
    tasks: tuple[Task, ...]
    n_outputs: int
    input_shape: tuple[int, ...]
    seed: int


def make(
    data: Data, scenario: str = "split", setting: str = "class", tasks: int | None = None, seed: int = 0
) -> Stream:
    """Cuts `data` into a stream.

    Args:
        scenario: ``split`` classes shared out over the tasks in label order; ``permuted`` all classes, every task with
            its own pixel permutation (the first with none); ``rotated`` all classes, task t turned by 90 t / T degrees;
            ``variation`` DEN's MNIST-Variation: every image turned by an angle of its own, noise in the background, up
            to 1,000 images a class; task t asks whether it is class t, as many others as there are of it.
        setting: ``task``, ``domain`` or ``class``.
        tasks: number of tasks; default 5.
        seed: of permutations, angles and noise.

    Raises:
        ValueError: unknown scenario or setting, a number of tasks that is not positive or does not divide the classes.

    Example:
        >>> stream = make(streams.load("digits"), "split", "task")
        >>> [t.classes for t in stream.tasks]
        [(0, 1), (2, 3), (4, 5), (6, 7), (8, 9)]
    """
    if scenario not in SCENARIOS:
        raise ValueError(f"scenario is {scenario!r} but must be one of {', '.join(SCENARIOS)}")
    if setting not in SETTINGS:
        raise ValueError(f"setting is {setting!r} but must be one of {', '.join(SETTINGS)}")
    n = 5 if tasks is None else tasks
    if n < 1:
        raise ValueError(f"tasks is {n} but must be at least 1")
    if scenario == "variation":
        if n > data.n_classes:
            raise ValueError(f"tasks is {n} but {data.name} has only {data.n_classes} classes, one for each task")
        made, n_outputs = _variation(data, setting, n, seed)
    elif scenario == "split":
        if data.n_classes % n:
            raise ValueError(f"tasks is {n} but must divide the {data.n_classes} classes of {data.name}")
        made, n_outputs = _split(data, setting, n)
    else:
        made, n_outputs = _transformed(data, scenario, setting, n, seed)
    return Stream(data.name, scenario, setting, made, n_outputs, data.input_shape, seed)


def _split(data: Data, setting: str, n: int) -> tuple[tuple[Task, ...], int]:
    size = data.n_classes // n
    made = []
    for t in range(n):
        offset = t * size if setting == "domain" else 0

        def chosen(x: Tensor, y: Tensor, t: int = t, offset: int = offset) -> Split:
            mine = (y >= t * size) & (y < (t + 1) * size)
            return x[mine], y[mine] - offset

        classes = tuple(range(size)) if setting == "domain" else tuple(range(t * size, (t + 1) * size))
        made.append(
            Task(t, classes, partial(chosen, data.x_train, data.y_train), partial(chosen, data.x_test, data.y_test))
        )
    return tuple(made), size if setting == "domain" else data.n_classes


def _transformed(data: Data, scenario: str, setting: str, n: int, seed: int) -> tuple[tuple[Task, ...], int]:
    generator = torch.Generator().manual_seed(seed)
    pixels = data.x_train[0].numel()
    made = []
    for t in range(n):
        if scenario == "permuted":
            order = torch.arange(pixels) if t == 0 else torch.randperm(pixels, generator=generator)
            change: Callable[[Tensor], Tensor] = partial(_permute, order)
        else:
            change = partial(_rotate, 90.0 * t / n)
        offset = 0 if setting == "domain" else t * data.n_classes

        def changed(x: Tensor, y: Tensor, change: Callable[[Tensor], Tensor] = change, offset: int = offset) -> Split:
            return change(x), y + offset

        classes = tuple(range(offset, offset + data.n_classes))
        made.append(
            Task(t, classes, partial(changed, data.x_train, data.y_train), partial(changed, data.x_test, data.y_test))
        )
    return tuple(made), data.n_classes if setting == "domain" else n * data.n_classes


def _permute(order: Tensor, x: Tensor) -> Tensor:
    return x.flatten(1)[:, order].view_as(x)


def _rotate(degrees: float, x: Tensor) -> Tensor:
    if degrees == 0:
        return x
    angle = torch.deg2rad(torch.tensor(degrees))
    cos, sin = angle.cos(), angle.sin()
    matrix = torch.stack([torch.stack([cos, -sin, cos * 0]), torch.stack([sin, cos, cos * 0])])
    grid = F.affine_grid(matrix[None], [1, *x.shape[1:]], align_corners=False)
    return torch.cat(
        [F.grid_sample(part, grid.expand(len(part), -1, -1, -1), align_corners=False) for part in x.split(4096)]
    )


def _variation(data: Data, setting: str, n: int, seed: int) -> tuple[tuple[Task, ...], int]:
    generator = torch.Generator().manual_seed(seed)
    parts = []
    for x, y in ((data.x_train, data.y_train), (data.x_test, data.y_test)):
        chosen = torch.cat([(y == c).nonzero().flatten()[:1000] for c in range(data.n_classes)])
        parts.append((_vary(x[chosen], generator), y[chosen]))
    orders = [[torch.randperm(len(y), generator=generator) for _, y in parts] for _ in range(n)]
    made = []
    for t in range(n):
        offset = 0 if setting == "domain" else 2 * t

        def one_against_rest(x: Tensor, y: Tensor, order: Tensor, t: int = t, offset: int = offset) -> Split:
            mine = (y == t).nonzero().flatten()
            rest = order[y[order] != t][: len(mine)]
            picked = torch.cat([mine, rest])
            return x[picked], (y[picked] == t).long() + offset

        train, test = (partial(one_against_rest, x, y, order) for (x, y), order in zip(parts, orders[t], strict=True))
        made.append(Task(t, (offset, offset + 1), train, test))
    return tuple(made), 2 if setting == "domain" else 2 * n


def _vary(x: Tensor, generator: torch.Generator) -> Tensor:
    """Each image turned by an angle of its own, and uniform noise up to 0.4 wherever it is darker than that."""
    angle = torch.rand(len(x), generator=generator) * 2 * torch.pi
    cos, sin, zero = angle.cos(), angle.sin(), torch.zeros_like(angle)
    matrix = torch.stack([torch.stack([cos, -sin, zero], 1), torch.stack([sin, cos, zero], 1)], 1)
    turned = torch.cat(
        [
            F.grid_sample(part, F.affine_grid(m, list(part.shape), align_corners=False), align_corners=False)
            for part, m in zip(x.split(4096), matrix.split(4096), strict=True)
        ]
    )
    return torch.maximum(turned, 0.4 * torch.rand(x.shape, generator=generator))
