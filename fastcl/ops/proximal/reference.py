"""Plain torch form of csrc/proximal."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _check
from .._check import Checked


@_check.reference
def soft_threshold_(tensors: list[Tensor], threshold: float) -> Checked[None]:
    op = "soft_threshold_"
    _check.number(op, "threshold", threshold, finite=False)
    for i, w in enumerate(tensors):
        _check.output(op, f"tensors[{i}]", w)
        _check.floating(op, f"tensors[{i}]", w)
    _check.distinct(op, "tensors", tensors)
    yield
    for w in tensors:
        wide = w.to(torch.promote_types(w.dtype, torch.float32))
        shrunk = wide.abs() - threshold
        w.copy_(torch.where(shrunk <= 0, torch.zeros_like(wide), torch.where(wide < 0, -shrunk, shrunk)))


@_check.reference
def group_soft_threshold_(tensors: list[Tensor], threshold: float, dim: int) -> Checked[None]:
    op = "group_soft_threshold_"
    _check.number(op, "threshold", threshold, finite=False)
    for i, w in enumerate(tensors):
        _check.output(op, f"tensors[{i}]", w)
        _check.floating(op, f"tensors[{i}]", w)
        _check_dim(op, f"tensors[{i}]", w, dim)
    _check.distinct(op, "tensors", tensors)
    yield
    for w in tensors:
        norm = _norms(w.double(), dim, keepdim=True)
        scale = torch.where(norm <= threshold, 0, 1 - threshold / norm)
        wide = torch.promote_types(w.dtype, torch.float32)
        w.copy_(w.to(wide) * scale.to(wide))


@_check.reference
def drift_norms(tensors: list[Tensor], anchors: list[Tensor], dim: int) -> Checked[list[Tensor]]:
    op = "drift_norms"
    _check.lengths(op, "anchors", len(anchors), "tensors", len(tensors))
    for i, (w, a) in enumerate(zip(tensors, anchors, strict=True)):
        _check.floating(op, f"tensors[{i}]", w)
        _check_dim(op, f"tensors[{i}]", w, dim)
        _check.like(op, f"anchors[{i}]", a, f"tensors[{i}]", w, dtype=True)
    yield
    return [
        _norms(w.double() - a.double(), dim).to(torch.promote_types(w.dtype, torch.float32))
        for w, a in zip(tensors, anchors, strict=True)
    ]


def _norms(t: Tensor, dim: int, keepdim: bool = False) -> Tensor:
    others = [d for d in range(t.dim()) if d != dim]
    return t.square().sum(others, keepdim=keepdim).sqrt() if others else t.abs()


def _check_dim(op: str, name: str, t: Tensor, dim: int) -> None:
    if not 0 <= dim < t.dim():
        raise ValueError(f"{op}: dim is {dim} but {name} has {t.dim()} dimensions")
