"""DEN as a learner."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import ops
from ..nn import grow, plot_growth, reindex, shrink, trace
from ..nn.selection import entries_between, reached_units
from ..ops._state import check_corners
from ..optim import MaskedAdam, proximal
from .by_task import ByTask
from .method import Batches

if TYPE_CHECKING:
    from ..streams import Task


class DEN(ByTask):
    r"""Dynamically expandable networks (Yoon et al. 2018), after the paper's four algorithms.

    Task 1 trains with :math:`\mu\lVert W\rVert_1` (eq. 2). A later task t:

    - *Selective retraining* (alg. 2): its outputs alone are fitted with l1 (eq. 3, in `begin_task`); the units from
      which a path of nonzero weights leads to them are selected, breadth first; these, and nothing else, are retrained
      with l2 (eq. 4, `observe`).
    - *Dynamic expansion* (alg. 3, in `end_task`): if the loss is above tau, k units join every hidden layer; their
      weights alone are trained with l1 and group lasso (eq. 5); those whose incoming weights are all zero go again.
    - *Split* (alg. 4): the network is trained with :math:`\lambda\lVert W-W^{t-1}\rVert^2` (eq. 6); old units that drifted by
      more than sigma are duplicated: the old one gets its weights back, its copy, of task t, keeps the drifted ones; then
      eq. 6 again, on the weights of task t's own units and outputs.
    - *Timestamps*: a unit knows the task that added it; task t is answered by units up to t.

    Weights outside the selection keep every bit (MaskedAdam). `reports` says for every task what each stage did.
    :meth:`finetune` is the paper's DEN-Finetune.

    Args:
        model: Linear layers and ReLUs in order, as :func:`fastcl.nn.mlp` makes them, an output for each class of the
            stream.
        l1: mu. Proximal steps follow Adam's, whose size does not depend on the loss: mu is larger than with SGD.
        l2: of eq. 4. group: gamma of eq. 5. drift: lambda of eq. 6.
        k: units added to each hidden layer. tau: the training loss above which they are. sigma: of the split.
        hold: after the split, old units that drifted less get their weights back as well, so that no old task changes by a
            bit; the task's own units take over what they lost in eq. 6's second pass. False, the paper's: they stay
            where they drifted to, for better (backward transfer) or worse.
        head_epochs, expand_epochs, split_epochs: passes over the task's data in eq. 3, 5 and each of 6's two.
        lr: Adam's.

    Raises:
        ValueError: a model that is not Linear layers in order; numbers out of range.

    Example:
        >>> learner = DEN.build(fastcl.streams.make(fastcl.streams.load("digits"), "split", "task"), hidden=(32,))
        >>> learner.begin_task(stream.tasks[0]); learner.observe(*batch) > 0
        True
    """  # noqa: E501

    name = "den"
    paper = "Yoon et al. 2018, Lifelong learning with dynamically expandable networks"
    seed = "dynamically-expandable-networks"
    settings = ("task",)

    def __init__(
        self,
        model: nn.Module,
        *,
        l1: float = 0.1,
        l2: float = 0.01,
        group: float = 6.0,
        drift: float = 2.0,
        k: int = 10,
        tau: float = 0.01,
        sigma: float = 0.35,
        hold: bool = True,
        head_epochs: int = 2,
        expand_epochs: int = 4,
        split_epochs: int = 10,
        **options: Any,
    ) -> None:
        named = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.Linear)]
        plan = trace(model)
        names = [name for name, _ in named]
        if len(named) < 2 or plan != {a: (b,) for a, b in pairwise(names)} | {names[-1]: ()}:
            raise ValueError("model must be Linear layers one after the other, two or more")
        for name, value in (("l1", l1), ("l2", l2), ("group", group), ("drift", drift), ("tau", tau), ("sigma", sigma)):
            if not 0 <= value < math.inf:
                raise ValueError(f"{name} is {value} but must be finite and not negative")
        if k < 0 or min(head_epochs, expand_epochs, split_epochs) < 0:
            raise ValueError("k and the epochs of the stages must not be negative")
        self.lr = options.get("lr", 1e-3)
        super().__init__(model, **options)
        self.names, self.layers, self.plan = names, [m for _, m in named], plan
        self.l1, self.l2, self.group, self.drift = l1, l2, group, drift
        self.k, self.tau, self.sigma, self.hold = k, tau, sigma, hold
        self.head_epochs, self.expand_epochs, self.split_epochs = head_epochs, expand_epochs, split_epochs
        self.stamps = [torch.zeros(layer.out_features, dtype=torch.int64) for layer in self.layers[:-1]]
        self.reports: list[dict[str, Any]] = []
        self._before: list[Tensor] = []  # W^{t-1}, in the order of parameters()
        self._pull = 0.0
        self._selected: list[Tensor] = []
        self._stage(None, l1=l1)

    # ---- the network ----

    def logits(self, x: Tensor, task: int) -> Tensor:
        """Scores [N, C] of the task's own classes, from the units that the task may see."""
        h = x.flatten(1)
        for layer, stamps in zip(self.layers, self.stamps, strict=False):
            h = F.relu(layer(h))
            if stamps.max() > task:
                h = h * (stamps <= task).to(h.device, h.dtype)
        rows = list(self.tasks[task])
        head = self.layers[-1]
        return F.linear(h, head.weight[rows], None if head.bias is None else head.bias[rows])

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        return self._loss_of(x, y, len(self.tasks) - 1)

    def _loss_of(self, x: Tensor, y: Tensor, task: int) -> Tensor:
        classes = torch.tensor(self.tasks[task], device=y.device)
        return F.cross_entropy(self.logits(x, task), torch.searchsorted(classes, y))

    # ---- one stage of training: which entries move, under which terms ----

    def _stage(
        self, free: list[Tensor] | None, *, l1: float = 0.0, group: float = 0.0, l2: float = 0.0, pull: float = 0.0
    ) -> None:
        """`free`: bool for every parameter, what may move; None: all. A new optimizer: eq. 2 to 6 are new problems."""
        params = list(self.model.parameters())
        masks: Mapping[Tensor, Tensor] = {} if free is None else {p: ~f for p, f in zip(params, free, strict=True)}
        decay = {"weight_decay": 2 * l2, "decoupled_weight_decay": True}
        self.optimizer = MaskedAdam(params, self.lr, reserved=masks, **decay)
        weights = [layer.weight for layer in self.layers]
        if l1 or group:
            hidden = weights[:-1]
            proximal(self.optimizer, l1=dict.fromkeys(weights, l1), group=dict.fromkeys(hidden, group))
        self._pull = pull

    def _fit(self, x: Tensor, y: Tensor, epochs: int) -> None:
        """Passes over the data in an order of its own: what a task ends with may come sorted."""
        for _ in range(epochs):
            for part in torch.randperm(len(x)).split(128):
                self.observe(x[part], y[part])

    def observe(self, x: Tensor, y: Tensor) -> float:
        self.check_batch(x, y)
        self.optimizer.zero_grad()
        loss = self.loss(x, y)
        loss.backward()
        for p in self.model.parameters():
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        self.optimizer.step()
        if self._pull:  # after Adam's step, as its decay is: within it every weight would be pulled at full speed
            with torch.no_grad():
                torch._foreach_lerp_(list(self.model.parameters()), self._before, 2 * self.lr * self._pull)
        return loss.item()

    # ---- algorithm 2 ----

    def begin_task(self, task: Task) -> None:
        super().begin_task(task)
        t = len(self.tasks) - 1
        self.reports.append({"task": t, "selected": [], "added": [], "removed": [], "split": []})
        self._before = [p.detach().clone() for p in self.model.parameters()]
        if t == 0:
            self._stage(None, l1=self.l1)
            return
        nothing = [torch.zeros_like(s, dtype=torch.bool) for s in self.stamps]
        self._stage(self._free(nothing, nothing), l1=self.l1)  # eq. 3: the task's own outputs alone
        device = next(self.model.parameters()).device
        self._fit(*(part.to(device) for part in self.training_data(task)), self.head_epochs)
        self._selected = self._reached()
        self.reports[-1]["selected"] = [int(s.sum()) for s in self._selected]
        self._stage(self._free(self._selected, self._selected), l2=self.l2)  # eq. 4

    def _reached(self) -> list[Tensor]:
        return reached_units(self.layers, list(self.tasks[-1]))

    def _free(self, rows: list[Tensor], columns: list[Tensor]) -> list[Tensor]:
        return entries_between(self.layers, rows, columns, list(self.tasks[-1]))

    # ---- algorithms 3 and 4 ----

    def end_task(self, batches: Batches) -> None:
        batches = list(batches)
        if not batches:
            raise ValueError("batches is empty: DEN looks at the task's data when it ends")
        report, t = self.reports[-1], len(self.tasks) - 1
        if t > 0:
            report["loss"] = self._mean_loss(batches)
            added = [0] * len(self.stamps)
            x, y = (torch.cat(part) for part in zip(*batches, strict=True))
            expand = self.k > 0 and report["loss"] > self.tau
            if expand:
                added = self._expand(x, y, t)
            report["added"] = added
            report["removed"] = [self.k - n if expand else 0 for n in added]
            report["split"] = self._split(x, y, t)
        report["loss_after"] = self._mean_loss(batches)
        report["units"] = [layer.out_features for layer in self.layers[:-1]]
        report["parameters"] = self.parameters_used()
        self._stage(None, l1=self.l1)  # this task's masks and moments end with it

    @torch.no_grad()
    def _mean_loss(self, batches: Batches) -> float:
        total = [(self.loss(x, y).item() * len(y), len(y)) for x, y in batches]
        return sum(loss for loss, _ in total) / sum(n for _, n in total)

    def _expand(self, x: Tensor, y: Tensor, t: int) -> list[int]:
        """k units in every hidden layer, eq. 5 on their weights, and away with those that it sets to zero."""
        hidden = self.names[:-1]
        grow(self.model, dict.fromkeys(hidden, self.k), plan=self.plan)
        new = torch.full((self.k,), t)
        self.stamps = [torch.cat([s, new]) for s in self.stamps]
        fresh = [torch.arange(len(s)) >= len(s) - self.k for s in self.stamps]
        self._stage(self._free(fresh, [torch.ones_like(f) for f in fresh]), l1=self.l1, group=self.group)
        self._fit(x, y, self.expand_epochs)
        useless: dict[str, Tensor] = {}
        kept = []
        for i, layer in enumerate(self.layers[:-1]):
            zero = (layer.weight.detach() == 0).all(1).cpu() & fresh[i]
            kept.append(self.k - int(zero.sum()))
            if zero.any():
                useless[hidden[i]] = zero.nonzero().flatten()
                self.stamps[i] = self.stamps[i][~zero]
        if useless:
            shrink(self.model, useless, plan=self.plan)
        return kept

    def _split(self, x: Tensor, y: Tensor, t: int) -> list[int]:
        """Eq. 6, the drifted units twice, eq. 6 again."""
        self._before = self._padded(self._before)
        old = [s < t for s in self.stamps]
        chosen = [~o for o in old]  # the task's own units, and the old ones that alg. 2 selected
        for c, selected in zip(chosen, self._selected, strict=True):
            c[: len(selected)] |= selected.cpu()
        self._stage(self._free(chosen, chosen), pull=self.drift)
        self._fit(x, y, self.split_epochs)
        weights = [layer.weight.detach() for layer in self.layers[:-1]]
        before = self._weights_of(self._before)[:-1]
        drift = ops.drift_norms(weights, before, 0)
        drifted = [((d > self.sigma).cpu() & o).nonzero().flatten() for d, o in zip(drift, old, strict=True)]
        if self.hold or any(len(d) for d in drifted):
            self._duplicate(drifted, t)
        own = [s == t for s in self.stamps]
        self._before = [p.detach().clone() for p in self.model.parameters()]
        self._stage(self._free(own, [torch.ones_like(o) for o in own]), pull=self.drift)
        self._fit(x, y, self.split_epochs)
        return [len(d) for d in drifted]

    @torch.no_grad()
    def _duplicate(self, drifted: list[Tensor], t: int) -> None:
        sizes = [len(s) for s in self.stamps]
        now = [p.detach().clone() for p in self.model.parameters()]
        units = {
            name: torch.cat([torch.arange(n), d])
            for name, n, d in zip(self.names, sizes, drifted, strict=False)
            if len(d)
        }
        reindex(self.model, units, plan=self.plan)
        self.stamps = [torch.cat([s, torch.full((len(d),), t)]) for s, d in zip(self.stamps, drifted, strict=True)]
        before, after = iter(self._before), iter(now)
        below: Tensor | None = None  # the duplicated inputs of this layer
        for i, layer in enumerate(self.layers):
            width = layer.weight.shape[1] if below is None else layer.weight.shape[1] - len(below)
            for p in [layer.weight] if layer.bias is None else [layer.weight, layer.bias]:
                old, drifted_values = next(before), next(after)
                if i == len(self.layers) - 1:
                    continue
                rows, twins = drifted[i], slice(sizes[i], None)
                back = (self.stamps[i] < t).nonzero().flatten() if self.hold else rows
                if p.dim() == 1:
                    p[back] = old[back]
                    p[twins] = drifted_values[rows]
                else:
                    p[back, :width] = old[back]
                    p[twins, :width] = drifted_values[rows]
            if below is not None and len(below):
                # who reads a twin: units of task t only; they read the twin in the old unit's place
                stamped = self.stamps[i] == t if i < len(self.layers) - 1 else None
                own = (
                    stamped.nonzero().flatten()
                    if stamped is not None
                    else torch.tensor(self.tasks[-1])  # outputs of the task
                )
                moved = layer.weight[own][:, below].clone()
                layer.weight[:, width:] = 0
                layer.weight[own[:, None], torch.arange(width, width + len(below))[None, :]] = moved
                layer.weight[own[:, None], below[None, :]] = 0
            below = drifted[i] if i < len(self.layers) - 1 else None

    def _weights_of(self, values: list[Tensor]) -> list[Tensor]:
        names = [id(p) for p in self.model.parameters()]
        return [values[names.index(id(layer.weight))] for layer in self.layers]

    def _padded(self, values: list[Tensor]) -> list[Tensor]:
        """Values of before an expansion in the parameters' shapes of now; what is new: as it is."""
        found = []
        for old, p in zip(values, self.model.parameters(), strict=True):
            new = p.detach().clone()
            corner = tuple(slice(size) for size in old.shape)
            new[corner] = old
            found.append(new)
        rows = list(self.tasks[-1])  # the task's own outputs have no past to be held to
        for p, value in zip(self.model.parameters(), found, strict=True):
            if any(p is own for own in self.layers[-1].parameters()):
                value[rows] = p.detach()[rows]
        return found

    # ---- what came of it ----

    def finetune(self, tasks: Sequence[Task], epochs: int) -> None:
        """DEN-Finetune: the network that the stream has grown, retrained on every task's data at once.

        What its structure is worth where data may be kept; every weight moves, a task's units stay its own.

        Args:
            tasks: all that have ended, in their order.
            epochs: passes over all their data.

        Raises:
            ValueError: other tasks than those, or no epochs.
        """
        if [tuple(task.classes) for task in tasks] != [tuple(classes) for classes in self.tasks] or epochs < 1:
            raise ValueError(
                f"finetune: {len(tasks)} tasks and {epochs} epochs, but it needs the {len(self.tasks)} that have "
                "ended, in their order, and at least one epoch"
            )
        self._stage(None)
        device = next(self.model.parameters()).device
        data = [tuple(part.to(device) for part in self.training_data(task)) for task in tasks]
        for _ in range(epochs):
            parts = [(t, part) for t, (x, _) in enumerate(data) for part in torch.randperm(len(x)).split(128)]
            for i in torch.randperm(len(parts)).tolist():
                t, part = parts[i]
                x, y = data[t]
                self.optimizer.zero_grad(set_to_none=False)
                self._loss_of(x[part], y[part], t).backward()
                self.optimizer.step()
        self._stage(None, l1=self.l1)

    def parameters_used(self) -> int:
        """Weights and biases of the hidden layers and of the outputs of the tasks so far."""
        hidden = sum(p.numel() for layer in self.layers[:-1] for p in layer.parameters())
        head = self.layers[-1]
        outputs = sum(len(task) for task in self.tasks)
        return hidden + outputs * (head.in_features + (head.bias is not None))

    def plot_growth(self, path: str | Path) -> None:
        """Units of each layer after each task, by the task that added them."""
        rows = {
            name: [[int((s[:n] == u).sum()) for u in range(len(self.reports))] for n in widths]
            for name, s, widths in zip(
                self.names, self.stamps, zip(*(r["units"] for r in self.reports), strict=True), strict=False
            )
        }
        plot_growth(rows, path)

    def extra_state(self) -> dict[str, Any]:
        return {
            "stamps": self.stamps,
            "reports": self.reports,
            "before": self._before,
            "selected": self._selected,
            "pull": self._pull,
        }

    def _load(self, state: dict[str, Any]) -> None:
        sizes = {name: len(s) for name, s in zip(self.names, state["extra"]["stamps"], strict=False)}
        more = {
            name: n - layer.out_features
            for (name, n), layer in zip(sizes.items(), self.layers, strict=False)
            if n > layer.out_features
        }
        if more:
            grow(self.model, more, plan=self.plan)
        for (name, n), layer in zip(sizes.items(), self.layers, strict=False):
            if n < layer.out_features:
                shrink(self.model, {name: range(n, layer.out_features)}, plan=self.plan)
        self.tasks = [tuple(task) for task in state["tasks"]]
        extra = state["extra"]
        self.stamps, self.reports = list(extra["stamps"]), list(extra["reports"])
        self._before, self._selected = list(extra["before"]), list(extra["selected"])
        check_corners(self._before, list(self.model.parameters()), "state.extra.before")
        check_corners(self._selected, [s > 0 for s in self.stamps], "state.extra.selected")
        if self.reports and "units" not in self.reports[-1] and len(self.tasks) > 1:  # within a task
            self._stage(self._free(self._selected, self._selected), l2=self.l2)
        else:
            self._stage(None, l1=self.l1)
        super()._load(state)
