"""Sparsity terms as proximal steps after an optimizer's own."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..ops import group_soft_threshold_, soft_threshold_

Strengths = float | Mapping[Tensor, float]


def proximal(
    optimizer: torch.optim.Optimizer, *, l1: Strengths = 0.0, group: Strengths = 0.0, dim: int = 0
) -> Proximal:
    r"""Adds :math:`\mu\lVert W\rVert_1 + \gamma\sum_g\lVert W_g\rVert_2` to what any torch optimizer minimises.

    DEN (Yoon et al. 2018, eq. 2, 3 and 5). After each step, with the learning rate lr of the parameter's group, the
    exact proximal operators of lr mu and lr gamma: weights and whole units become exactly zero, which a gradient of
    the terms would never reach. Entries that a MaskedSGD or MaskedAdam has reserved keep every bit.

    Args:
        optimizer: any.
        l1: mu, for all parameters, or parameter to mu.
        group: gamma, likewise; a number is for parameters of two and more dimensions, whose slices along `dim` are the
            groups.
        dim: 0, a unit's incoming weights; 1, its outgoing ones.

    Returns:
        A :class:`Proximal`: ``remove()`` ends it.

    Raises:
        ValueError: a strength that is negative, NaN or infinite; a parameter that is not the optimizer's or lacks `dim`.

    Cost: one pass of :func:`fastcl.ops.soft_threshold_` (8 bytes a float32 weight), 12 more for groups.

    Example:
        >>> w = torch.nn.Parameter(torch.tensor([0.5, -3.0])); w.grad = torch.zeros(2); optimizer = torch.optim.SGD([w], 0.1)
        >>> term = fastcl.optim.proximal(optimizer, l1=10.0); optimizer.step(); w.data
        tensor([ 0., -2.])
    """  # noqa: E501
    return Proximal(optimizer, l1, group, dim)


class Proximal:
    """What :func:`proximal` returns.

    Raises:
        ValueError: as :func:`proximal`.

    Example:
        >>> steps = proximal(optimizer, l1=100.0); loss.backward(); optimizer.step(); model[0].weight.any().item()
        False
        >>> steps.remove()
    """

    def __init__(self, optimizer: torch.optim.Optimizer, l1: Strengths, group: Strengths, dim: int) -> None:
        params = [p for g in optimizer.param_groups for p in g["params"]]
        self.l1 = _strengths("l1", l1, params)
        self.group = _strengths("group", group, [p for p in params if p.dim() >= 2])
        for p in self.group:
            if not 0 <= dim < p.dim():
                raise ValueError(f"dim is {dim} but a parameter of group has {p.dim()} dimensions")
        self.dim = dim
        self._hook = optimizer.register_step_post_hook(self._step)

    def remove(self) -> None:
        """Takes the hook off."""
        self._hook.remove()

    @torch.no_grad()
    def _step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        rates = {p: float(g["lr"]) for g in optimizer.param_groups for p in g["params"]}
        masks = getattr(optimizer, "_masks", {})
        stepped = [p for p in rates if p.grad is not None]
        kept = [(p, p.clone()) for p in stepped if p in masks and (p in self.l1 or p in self.group)]
        for strengths, step in ((self.l1, soft_threshold_), (self.group, group_soft_threshold_)):
            by_threshold: dict[float, list[Tensor]] = {}
            for p in stepped:
                if strengths.get(p):
                    by_threshold.setdefault(rates[p] * strengths[p], []).append(p)
            for threshold, tensors in by_threshold.items():
                if step is soft_threshold_:
                    soft_threshold_(tensors, threshold)
                else:
                    group_soft_threshold_(tensors, threshold, self.dim)
        for p, before in kept:
            p.copy_(torch.where(masks[p].frozen(p), before, p))


def _strengths(name: str, given: Strengths, params: list[Tensor]) -> dict[Tensor, float]:
    if isinstance(given, Mapping):
        known = {id(p) for p in params}
        if any(id(p) not in known for p in given):
            raise ValueError(f"{name} has a key that is not one of the optimizer's parameters (of enough dimensions)")
        found = dict(given)
    else:
        found = dict.fromkeys(params, given)
    for value in found.values():
        if not (isinstance(value, (int, float)) and value >= 0 and math.isfinite(value)):
            raise ValueError(f"{name} is {value} but must be finite and not negative")
    return found
