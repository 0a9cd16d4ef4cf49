"""Plain torch form of csrc/masked_grad."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _check

OP = "masked_grad_"


def masked_grad_(grads: list[Tensor], reserved: list[Tensor]) -> None:
    _check.lengths(OP, "reserved", len(reserved), "grads", len(grads))
    for i, (g, r) in enumerate(zip(grads, reserved, strict=True)):
        _check.output(OP, f"grads[{i}]", g)
        _check.floating(OP, f"grads[{i}]", g)
        _check.like(OP, f"reserved[{i}]", r, f"grads[{i}]", g)
        if r.dtype != torch.bool and r.dtype not in _check.FLOATS:
            raise ValueError(f"{OP}: reserved[{i}] must be bool, float32, float64, bfloat16 or float16")
    _check.distinct(OP, "grads", grads, reserved=reserved)
    for i, r in enumerate(reserved):
        _check.in_unit_interval(OP, f"reserved[{i}]", r)
    for g, r in zip(grads, reserved, strict=True):
        if r.dtype == torch.bool:
            g.masked_fill_(r, 0)
        else:
            wide = torch.promote_types(g.dtype, torch.float32)
            free = g.to(wide) * (1 - r.to(wide))
            g.copy_(torch.where(r == 1, torch.zeros((), dtype=wide, device=g.device), free))
