"""HAT as a learner."""

from __future__ import annotations

import math
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..nn import (
    MaskedLinear,
    begin_task,
    capacity,
    end_task,
    hat_scale,
    masked_layers,
    plot_capacity,
    reserved_masks,
    set_scale,
    sparsity,
    use_task,
)
from ..optim import MaskedAdam, MaskedSGD, protect
from .by_task import ByTask
from .method import Batches, Method
from .progress import Progress

if TYPE_CHECKING:
    from ..streams import Stream, Task


class HAT(ByTask):
    r"""Hard attention to the task (Serra et al. 2018).

    Every unit has a gate :math:`\sigma(s\,e_t)` (eq. 1); s rises within each epoch (eq. 3); gradients are scaled by
    :math:`1-\min(r_i, r_j)` (eq. 2); the loss gains :math:`\lambda R` (eq. 5-6); embedding gradients are compensated
    (sec. 2.5, in closed form). The optimizer holds reserved entries to the bit, which the paper's masked gradients
    alone do not, so with binary masks (the default) an old task's outputs never change.

    A task has its own outputs and its own loss. In the setting ``class``, or when `predict` is not given the task, it
    is inferred: each sample goes to the task whose softmax has the least entropy. That is our addition: the paper is
    given the task.

    Args:
        model: masked unit layers (``fastcl.nn.MaskedLinear(..., mask="unit")`` and the convolutions) in order, ending
            in a plain Linear with an output for every class of the stream.
        s_max: 400 in the paper.
        strength: lambda, 0.75 in the paper.
        embedding_lr: learning rate of the embeddings, as a multiple of `lr`.
        clamp: embeddings are kept in [-clamp, clamp]; 6 in the paper.
        lr, optimizer: as for :class:`Method`; the default optimizer is MaskedAdam (the paper's: SGD, lr 0.05).

    Raises:
        ValueError: a model without unit masks or with other than one plain Linear; numbers out of range.

    Example:
        >>> learner = HAT.build(stream, s_max=400.0); learner.begin_task(stream.tasks[0])
        >>> learner.observe(*batch) > 0
        True
    """

    name = "hat"
    paper = "Serra et al. 2018, Overcoming catastrophic forgetting with hard attention to the task"
    seed = "generative-memory"
    settings = ("task", "class")

    def __init__(
        self,
        model: nn.Module,
        *,
        s_max: float = 400.0,
        strength: float = 0.75,
        embedding_lr: float = 10.0,
        clamp: float = 6.0,
        **options: Any,
    ) -> None:
        self.layers = [layer for _, layer in masked_layers(model)]
        heads = [m for m in model.modules() if type(m) is nn.Linear]
        if not self.layers or any(layer.mask != "unit" for layer in self.layers) or len(heads) != 1:
            raise ValueError("model must have layers with unit masks and one plain Linear, the outputs")
        for name, value in (("s_max", s_max), ("strength", strength), ("embedding_lr", embedding_lr), ("clamp", clamp)):
            if not 0 <= value < math.inf or (value < 1 and name == "s_max"):
                raise ValueError(f"{name} is {value} but must be finite and {'>= 1' if name == 's_max' else '>= 0'}")
        self.head = heads[0]
        embeddings = [layer.embedding for layer in self.layers]
        for layer in self.layers:
            layer.s_max = float(s_max)

        def default(params: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
            chosen = {id(e) for e in embeddings}
            lr = options.get("lr", 1e-3)
            rest = [p for p in params if id(p) not in chosen]
            return MaskedAdam([{"params": rest}, {"params": embeddings, "lr": embedding_lr * lr}], lr)

        options.setdefault("optimizer", None)
        options["optimizer"] = options["optimizer"] or default
        super().__init__(model, **options)
        self.s_max, self.strength, self.clamp = s_max, strength, clamp
        masked = isinstance(self.optimizer, (MaskedSGD, MaskedAdam))
        self._reserve = self.optimizer.reserve if masked else protect(self.optimizer, {}).reserve
        self.progress = Progress()

    @classmethod
    def build(
        cls, stream: Stream, *, hidden: tuple[int, ...] = (400, 400), seed: int = 0, binary: bool = True, **options: Any
    ) -> Method:
        """The literature's MLP with a gate on every hidden unit; `binary` masks or the paper's soft ones."""
        sizes = [math.prod(stream.input_shape), *hidden]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            body = [MaskedLinear(a, b, mask="unit", activation=torch.relu, binary=binary) for a, b in pairwise(sizes)]
            model = nn.Sequential(nn.Flatten(), *body, nn.Linear(sizes[-1], stream.n_outputs))
        return cls(model, setting=stream.setting, **options)

    def begin_task(self, task: Task) -> None:
        super().begin_task(task)
        if len(self.tasks) > 1:
            begin_task(self.model)
            for layer in self.layers:
                self.optimizer.state.pop(layer.embedding, None)  # moments of another embedding
        self._reserve(self._reserved())
        self.progress.begin(len(self.training_data(task)[1]))

    def _reserved(self) -> dict[Tensor, Any]:
        """Everything that earlier tasks use: the body by unit masks, the head by its rows."""
        rows = torch.zeros(self.head.out_features, device=self.head.weight.device)
        for task in self.tasks[:-1]:
            rows[list(task)] = 1.0
        found: dict[Tensor, Any] = reserved_masks(self.model)
        found[self.head.weight] = (rows, None)
        if self.head.bias is not None:
            found[self.head.bias] = rows.bool()
        return found

    def observe(self, x: Tensor, y: Tensor) -> float:
        self.check_batch(x, y)
        _, batch, batches = self.progress.at(len(y))
        set_scale(self.model, hat_scale(batch, batches, self.s_max))
        try:
            loss = super().observe(x, y)
        finally:
            set_scale(self.model, self.s_max)
        self.progress.advance(len(y))
        with torch.no_grad():
            for layer in self.layers:
                layer.embedding.clamp_(-self.clamp, self.clamp)
        return loss

    def check_labels(self, y: Tensor) -> None:
        self.check_own_labels(y)

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        """Cross-entropy over this task's own outputs, and lambda R."""
        own = torch.tensor(self.tasks[-1], device=y.device)
        entropy = F.cross_entropy(self.model(x)[:, own], torch.searchsorted(own, y))
        return entropy + self.strength * sparsity(self.model)

    def end_task(self, batches: Batches) -> None:
        end_task(self.model)

    @torch.no_grad()
    def logits(self, x: Tensor, task: int) -> Tensor:
        """The outputs [N, classes of the task] under the task's mask; the running task's as it would be recorded."""
        training = self.model.training
        self.model.eval()
        recorded = all(task < layer.tasks for layer in self.layers)
        saved = None if recorded else [layer.masks for layer in self.layers]
        try:
            if saved is not None:
                end_task(self.model)
            with use_task(self.model, task if recorded else self.layers[0].tasks - 1):
                return self.model(x)[:, list(self.tasks[task])]
        finally:
            if saved is not None:
                for layer, masks in zip(self.layers, saved, strict=True):
                    layer.masks = masks
            self.model.train(training)

    def occupancy(self) -> dict[str, Any]:
        """What each task uses of every layer: :func:`fastcl.nn.capacity`."""
        return capacity(self.model)

    def plot_occupancy(self, path: str | Path) -> None:
        """The picture of :meth:`occupancy` over tasks."""
        plot_capacity(self.model, path)

    def extra_state(self) -> dict[str, Any]:
        return {"counts": self.progress.state()}

    def load_extra_state(self, state: dict[str, Any]) -> None:
        self.progress.load(state["counts"])
        if self.tasks:
            self._reserve(self._reserved())
