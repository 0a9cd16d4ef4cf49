"""What EWC, MAS, SI and RWalk share: anchors, importances and their quadratic penalty."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..ops._state import check_keys, check_number, check_tensor
from .distributed import local, over_shards

FLOATS = (torch.float32, torch.float64)


class Regulariser:
    r"""Holds :math:`F` and :math:`\theta^*` of a model's trainable parameters and applies
    :math:`\frac{\lambda}{2}\sum_i F_i(\theta_i-\theta_i^*)^2`.

    Two ways to apply it: add :meth:`penalty` to the loss (autograd), or call :meth:`add_gradients` after
    ``loss.backward()`` (one fused pass, faster). Memory does not grow with the number of tasks.

    A parameter that has grown since (a wider head) keeps its importances in its leading corner; new entries are free.

    Raises:
        ValueError: a strength that is negative or not finite, another dtype than those named.

    Example:
        >>> ewc = fastcl.EWC(model, strength=2.0); ewc.consolidate(loader); ewc.tasks, sorted(ewc.importances)
        (1, ['0.bias', '0.weight', '2.bias', '2.weight'])
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
        check_keys(state, self.state_dict())
        vars(self).update(self._read(state))

    def _read(self, state: dict[str, Any]) -> dict[str, Any]:
        """The attributes that a state stands for, all of them checked."""
        params = self._params()
        importances, anchors = state["importances"], state["anchors"]
        for name in ("constant", "tasks"):
            check_number(state[name], f"state.{name}")
        for values in (importances, anchors):
            if not isinstance(values, dict):
                raise ValueError(f"state: importances and anchors must be dicts, got a {type(values).__name__}")
        if set(importances) != set(anchors) or not set(importances) <= set(params):
            raise ValueError(
                f"state is of another model: it has importances for {sorted(set(importances) - set(params))[:3]} ..."
            )
        self._check_sums(importances, "importances", floats=(self.dtype,) if self.dtype else FLOATS, positive=True)
        self._check_sums(anchors, "anchors", like=importances)
        return {
            "importances": {k: v.detach().to(params[k].device, copy=True) for k, v in importances.items()},
            "anchors": {k: v.detach().to(params[k].device, copy=True) for k, v in anchors.items()},
            "constant": float(state["constant"]),
            "tasks": int(state["tasks"]),
        }

    def _check_sums(
        self,
        values: Any,
        where: str,
        *,
        floats: tuple[torch.dtype, ...] = (),
        like: dict[str, Tensor] | None = None,
        positive: bool = False,
    ) -> None:
        """Finite tensors for parameters, in their leading corners; of a dtype of `floats`, or the parameters'."""
        check_keys(values, values if like is None else like, f"state.{where}")
        params = self._params()
        for name, t in values.items():
            p = params[name]
            check_tensor(t, None if like is None else like[name].shape, None, f"state.{where}: {name}")
            if t.dim() != p.dim() or any(a > b for a, b in zip(t.shape, p.shape, strict=True)):
                raise ValueError(f"state: {name} has shape {list(t.shape)} but the model's has {list(p.shape)}")
            if t.dtype not in (floats or (p.dtype,)):
                raise ValueError(f"state.{where}: {name} has dtype {t.dtype} but must have {(floats or (p.dtype,))[0]}")
            if positive:
                self._check(name, t)
            elif not local([t])[0].isfinite().all():
                raise ValueError(f"state.{where}: {name} has NaN or infinite values")

    def _params(self) -> dict[str, Tensor]:
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def _check_new(self, name: str, importance: Tensor) -> None:
        """Importances that come from elsewhere: of the parameter's shape, in the dtype that sums are kept in."""
        p = self._params()[name]
        if not isinstance(importance, Tensor) or importance.shape != p.shape or importance.device != p.device:
            raise ValueError(f"the importance of {name} must be a {p.device} tensor of shape {list(p.shape)}")
        if importance.dtype != torch.promote_types(p.dtype, torch.float32):
            raise ValueError(
                f"the importance of {name} has dtype {importance.dtype} but must have "
                f"{torch.promote_types(p.dtype, torch.float32)}"
            )
        self._check(name, importance)

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
            self._check_new(name, f)
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
