"""Plain torch form of csrc/annealed_mask."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _check


def annealed_mask(embedding: Tensor, scale: float) -> Tensor:
    _check.number("annealed_mask", "scale", scale)
    _check.floating("annealed_mask", "embedding", embedding)
    wide = torch.promote_types(embedding.dtype, torch.float32)
    # in the embedding's memory order, as the kernel gives it
    return torch.empty_like(embedding).copy_(torch.sigmoid(embedding.to(wide) * scale))


def annealed_mask_backward(grad: Tensor, embedding: Tensor, scale: float) -> Tensor:
    op = "annealed_mask_backward"
    _check.number(op, "scale", scale)
    _check.like(op, "grad", grad, "embedding", embedding, dtype=True)
    _check.floating(op, "embedding", embedding)
    # in the embedding's memory order, as the kernel gives it
    return torch.empty_like(embedding).copy_(grad.to(_wide(embedding)) * slope(embedding, scale))


def slope(embedding: Tensor, scale: float) -> Tensor:
    """dm/de = s q / (1 + q)^2 with q = exp(-|s e|): not zero where m rounds to 1."""
    q = torch.exp(-(embedding.to(_wide(embedding)) * scale).abs())
    return scale * q / ((1 + q) * (1 + q))


def _wide(t: Tensor) -> torch.dtype:
    return torch.promote_types(t.dtype, torch.float32)
