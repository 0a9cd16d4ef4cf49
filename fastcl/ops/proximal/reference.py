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
