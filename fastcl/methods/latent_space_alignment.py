"""Latent space alignment as a learner."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..nn import Bridge, compose
from .by_task import ByTask
from .method import Batches

if TYPE_CHECKING:
    from ..streams import Task


class LatentSpaceAlignment(ByTask):
    r"""Latent space alignment (Skorokhodov 2019): old heads read a new embedder through bridges.

    Each task trains the embedder f and its own head h_t, with nothing held. Then a bridge from Z_t to the space before
    is fitted on the task's data, :math:`g_t(f_t(x))\approx f_{t-1}(x)`, and the old embedder is dropped. Task k is
    predicted by :math:`h_k(g_{k+1}(\dots g_t(f_t(x))))`; affine bridges are composed to one product. What a hop costs:
    :func:`fastcl.metrics.lost_per_hop` of the result's accuracy matrix.

    Args:
        model: a Sequential whose last layer is Linear with an output for every class of the stream: the heads.
        bridge: ``affine`` (ridge regression, closed form) or ``mlp`` (one hidden layer of the features' width).
        ridge: relative to the features' mean variance.
        parallel: every task starts from the first initial weights, as if the networks had been trained at the same time
            and aligned afterwards.
        lr, optimizer: as for :class:`Method`; made anew for each task: stale moments would move the old heads.

    Raises:
        ValueError: an unknown bridge, a negative ridge, a model that does not end in a Linear layer.

    Example:
        >>> learner = LatentSpaceAlignment.build(stream, bridge="affine"); learner.begin_task(stream.tasks[0])
        >>> learner.observe(*batch) > 0
        True
    """

    name = "latent-space-alignment"
    paper = "Skorokhodov 2019, Generative memory for continual learning (slides)"
    seed = "generative-memory"
    settings = ("task", "class")

    def __init__(
        self,
        model: nn.Sequential,
        *,
        bridge: str = "affine",
        ridge: float = 1e-3,
        parallel: bool = False,
        **options: Any,
    ) -> None:
        if bridge not in ("affine", "mlp"):
            raise ValueError(f"bridge is {bridge!r} but must be affine or mlp")
        if not ridge >= 0:
            raise ValueError(f"ridge is {ridge} but must not be negative")
        if not isinstance(model, nn.Sequential) or not isinstance(model[-1], nn.Linear):
            raise ValueError("model must be a Sequential that ends in a Linear layer")
        super().__init__(model, **options)
        make, lr = options.get("optimizer"), options.get("lr", 1e-3)
        self._make = make if make is not None else (lambda params: torch.optim.Adam(params, lr))
        self.bridge, self.ridge, self.parallel = bridge, ridge, parallel
        self.initial = copy.deepcopy(model[:-1]) if parallel else None
        self.previous: nn.Module | None = None  # the embedder as the last task left it, until the bridge is there
        self.bridges: list[Bridge] = []  # from task t + 1's space to t's
        self._chains: dict[tuple[int, int], Bridge] = {}

    def begin_task(self, task: Task) -> None:
        super().begin_task(task)
        if len(self.tasks) > 1:
            self.previous = copy.deepcopy(self.model[:-1]).eval()
            if self.initial is not None:
                self.model[:-1].load_state_dict(self.initial.state_dict())
        self.optimizer = self._make(self.model.parameters())

    def check_labels(self, y: Tensor) -> None:
        self.check_own_labels(y)

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        """Cross-entropy over this task's own outputs."""
        own = torch.tensor(self.tasks[-1], device=y.device)
        return nn.functional.cross_entropy(self.model(x)[:, own], torch.searchsorted(own, y))

    def end_task(self, batches: Batches) -> None:
        if self.previous is None:
            return
        x = torch.cat([x for x, _ in batches])
        now, before = self._features(self.model[:-1], x), self._features(self.previous, x)
        width = now.shape[1]
        made = Bridge(width, width, None if self.bridge == "affine" else width).to(x.device)
        self.bridges.append(made.fit(now, before, self.ridge))
        self.previous, self._chains = None, {}

    @staticmethod
    @torch.no_grad()
    def _features(embedder: nn.Module, x: Tensor) -> Tensor:
        training = embedder.training
        embedder.eval()
        try:
            return torch.cat([embedder(part) for part in x.split(1024)])
        finally:
            embedder.train(training)

    @torch.no_grad()
    def logits(self, x: Tensor, task: int) -> Tensor:
        """The outputs [N, classes of the task], through the bridges back to its space."""
        if self.previous is not None and task < len(self.tasks) - 1:  # within a task the old embedder is still there
            z, spaces = self._features(self.previous, x), len(self.tasks) - 2
        else:
            z, spaces = self._features(self.model[:-1], x), len(self.tasks) - 1
        hops = [self.bridges[t] for t in reversed(range(task, spaces))]
        if hops and self.bridge == "affine":
            z = self._chain(task, spaces, hops)(z)
        else:
            for hop in hops:
                z = hop(z)
        return self.model[-1](z)[:, list(self.tasks[task])]

    def _chain(self, task: int, spaces: int, hops: list[Bridge]) -> Bridge:
        if (task, spaces) not in self._chains:
            self._chains[task, spaces] = compose(hops)
        return self._chains[task, spaces]

    def extra_state(self) -> dict[str, Any]:
        return {
            "bridges": [dict(g.state_dict()) for g in self.bridges],
            "previous": None if self.previous is None else dict(self.previous.state_dict()),
            "initial": None if self.initial is None else dict(self.initial.state_dict()),
        }

    def load_extra_state(self, state: dict[str, Any]) -> None:
        device = self.model[-1].weight.device
        width = self.model[-1].in_features
        self.bridges, self._chains, self.previous = [], {}, None
        for saved in state["bridges"]:
            made = Bridge(width, width, None if self.bridge == "affine" else width).to(device)
            made.load_state_dict(saved)
            self.bridges.append(made)
        if state["previous"] is not None:
            self.previous = copy.deepcopy(self.model[:-1]).eval()
            self.previous.load_state_dict(state["previous"])
        if self.initial is not None:
            self.initial.load_state_dict(state["initial"])
