"""What EWC, MAS, SI and RWalk share: anchors, importances and their quadratic penalty."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from .distributed import local, over_shards


class Regulariser:
    r"""Holds :math:`F` and :math:`\theta^*` of a model's trainable parameters and applies
    :math:`\frac{\lambda}{2}\sum_i F_i(\theta_i-\theta_i^*)^2`.

    Two ways to apply it: add :meth:`penalty` to the loss (autograd), or call :meth:`add_gradients` after
    ``loss.backward()`` (one fused pass, faster). Memory does not grow with the number of tasks.

    A parameter that has grown since (a wider head) keeps its importances in its leading corner; new entries are free.
    """

    def __init__(self, model: nn.Module, strength: float, *, dtype: torch.dtype | None = None) -> None:
        if not (isinstance(strength, (int, float)) and strength >= 0 and math.isfinite(strength)):
            raise ValueError(f"strength is {strength} but must be a finite number, not negative")
        if dtype not in (None, torch.float32, torch.bfloat16):
            raise ValueError(f"dtype is {dtype} but importances are stored in torch.float32 or torch.bfloat16")
        self.model, self.strength, self.dtype = model, float(strength), dtype
        self.importances: dict[str, Tensor] = {}
        self.anchors: dict[str, Tensor] = {}
        self.constant = 0.0  # of the penalty; not zero only for several anchors collapsed into one
        self.tasks = 0

    def penalty(self) -> Tensor:
        """The penalty as a 0-d tensor, differentiable in the model's parameters; 0 before the first task ends."""
        params, anchors, importances = self._aligned()
        if not params:
            return torch.zeros((), device=next(self.model.parameters()).device)
        shards = map(local, (params, anchors, importances))
        value = over_shards(ops.quadratic_penalty(*shards, self.strength, check=False), params)
        return value + self.strength * self.constant if self.constant else value

    @torch.no_grad()
    def add_gradients(self) -> Tensor:
        """Adds the penalty's gradient to every ``.grad`` in place and returns the penalty's value.

        Call between ``loss.backward()`` and ``optimizer.step()``. A ``.grad`` that is None becomes the penalty's.
        """
        params, anchors, importances = self._aligned()
        if not params:
            return torch.zeros((), device=next(self.model.parameters()).device)
        for p in params:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        shards = map(local, ([p.grad for p in params], params, anchors, importances))
        value = over_shards(ops.quadratic_penalty_grad_(*shards, self.strength, check=False), params)
        return value + self.strength * self.constant if self.constant else value

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to continue; a nested dict of tensors and numbers. `strength` stays the caller's."""
        return {
            "importances": dict(self.importances),
            "anchors": dict(self.anchors),
            "constant": self.constant,
            "tasks": self.tasks,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises ValueError, changing nothing, if `state` does not fit the model or is not a valid state."""
        params = self._params()
        importances, anchors = state["importances"], state["anchors"]
        if set(importances) != set(anchors) or not set(importances) <= set(params):
            raise ValueError(
                f"state is of another model: it has importances for {sorted(set(importances) - set(params))[:3]} ..."
            )
        for name, f in importances.items():
            if any(a > b for a, b in zip(f.shape, params[name].shape, strict=True)) or f.shape != anchors[name].shape:
                raise ValueError(
                    f"state: {name} has shape {list(f.shape)} but the model's has {list(params[name].shape)}"
                )
            self._check(name, f)
        self.importances = {k: v.detach().to(params[k].device, copy=True) for k, v in importances.items()}
        self.anchors = {k: v.detach().to(params[k].device, params[k].dtype, copy=True) for k, v in anchors.items()}
        self.constant, self.tasks = float(state["constant"]), int(state["tasks"])

    def _params(self) -> dict[str, Tensor]:
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def _check(self, name: str, importance: Tensor) -> None:
        (shard,) = local([importance])
        if not (shard >= 0).all() or torch.isinf(shard).any():
            raise ValueError(f"the importance of {name} has NaN, infinite or negative values")

    def _aligned(self) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Parameters with an importance, their anchors and importances, grown to the parameters' shapes."""
        params: list[Tensor] = []
        for name, p in self._params().items():
            if name not in self.importances:
                continue
            if self.importances[name].shape != p.shape:
                self.importances[name] = grown(name, self.importances[name], p, fill=None)
                self.anchors[name] = grown(name, self.anchors[name], p, fill=p)
            params.append(p)
        names = [name for name in self._params() if name in self.importances]
        return params, [self.anchors[n] for n in names], [self.importances[n] for n in names]

    @torch.no_grad()
    def _accumulate(self, new: dict[str, Tensor], old_share: float = 1.0, new_share: float = 1.0) -> None:
        """Importances <- old_share * old + new_share * new (new alone after the first task), anchored here."""
        params = self._params()
        if set(new) != set(params):
            raise ValueError(f"importances are for {sorted(new)[:3]} ... but the model has {sorted(params)[:3]} ...")
        for name, f in new.items():
            self._check(name, f)
        self._aligned()  # old importances take the shape of grown parameters
        known = [name for name in new if name in self.importances]
        lists = (local([values[n] for n in known]) for values in (self.importances, new))
        ops.merge_importances_(*lists, old_share, new_share)
        self._begin(new)
        for name, p in params.items():
            self.anchors[name].copy_(p)
        self.tasks += 1

    def _begin(self, new: dict[str, Tensor]) -> None:
        """Takes over checked importances of parameters that had none, anchored where the parameters are."""
        for name, f in new.items():
            if name not in self.importances:
                self.importances[name] = f.to(self.dtype or f.dtype, copy=True)
                self.anchors[name] = self._params()[name].detach().clone()


@torch.no_grad()
def grown(name: str, old: Tensor, param: Tensor, fill: Tensor | None) -> Tensor:
    """`old` in the leading corner of a tensor of `param`'s shape; the rest is `fill`'s, or zeros."""
    if old.dim() != param.dim() or any(a > b for a, b in zip(old.shape, param.shape, strict=True)):
        raise ValueError(f"{name} had shape {list(old.shape)} and has {list(param.shape)} now: it may grow, not shrink")
    new = old.new_zeros(param.shape) if fill is None else fill.detach().to(old.dtype, copy=True)
    new[tuple(slice(size) for size in old.shape)] = old
    return new
