"""Annealed attention masks over units or weights (HAT, DGM)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..._ops import call, define, differentiable, vmap_rule
from . import reference

_annealed_mask = define("annealed_mask(Tensor embedding, float scale) -> Tensor", reference.annealed_mask)
_annealed_mask_backward = define(
    "annealed_mask_backward(Tensor grad, Tensor embedding, float scale) -> Tensor",
    reference.annealed_mask_backward,
)


def annealed_mask(embedding: Tensor, scale: float) -> Tensor:
    r"""The mask :math:`m = \sigma(s\,e)`, differentiable twice in ``embedding``.

    HAT (Serra et al. 2018, eq. 1), DGM (Ostapenko et al. 2019, eq. 2). The gradient
    :math:`s\,m\,(1-m)` is computed from ``e``, not from the rounded mask, so it does not vanish where m rounds to 1.

    Args:
        embedding: e, any shape; float32, float64, bfloat16 or float16 (arithmetic in float32 or float64).
        scale: s, finite and not negative; from 1/s_max up to s_max during training.

    Returns:
        m, of e's shape, dtype and memory order.

    Raises:
        ValueError: scale negative, infinite or NaN; embedding not floating point. A NaN embedding gives a NaN mask.

    Cost: one pass each way (8 bytes a float32 element forward, 12 backward).

    Example:
        >>> fastcl.ops.annealed_mask(torch.tensor([0.0, 1.0]), scale=400.0)
        tensor([0.5000, 1.0000])
    """
    return call(_annealed_mask, embedding, scale)


def _setup(ctx: Any, inputs: tuple[Tensor, float], output: Tensor) -> None:
    ctx.save_for_backward(inputs[0])
    ctx.scale = inputs[1]


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    (embedding,) = ctx.saved_tensors
    return _annealed_mask_backward(grad.to(embedding.dtype), embedding, ctx.scale), None


def _setup_backward(ctx: Any, inputs: tuple[Tensor, Tensor, float], output: Tensor) -> None:
    ctx.save_for_backward(inputs[0], inputs[1])
    ctx.scale = inputs[2]


def _double_backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, Tensor, None]:
    # d2m/de2 = s^2 m (1-m) (1-2m); rare, so in plain torch, and differentiable further
    grad, embedding = ctx.saved_tensors
    slope = reference.slope(embedding, ctx.scale)
    curvature = ctx.scale * slope * (1 - 2 * torch.sigmoid(ctx.scale * embedding))
    return upstream * slope, upstream * grad * curvature, None


def _vmap_mask(info: Any, in_dims: tuple[int | None, None], embedding: Tensor, scale: float) -> tuple[Tensor, Any]:
    return _annealed_mask(embedding, scale), in_dims[0]  # element-wise: the batch dimension stays where it is


def _vmap_backward(info: Any, in_dims: tuple[Any, ...], grad: Tensor, embedding: Tensor, scale: float) -> Any:
    def front(t: Tensor, dim: int | None) -> Tensor:
        return t.expand(info.batch_size, *t.shape) if dim is None else t.movedim(dim, 0)

    return _annealed_mask_backward(front(grad, in_dims[0]), front(embedding, in_dims[1]), scale), 0


differentiable("annealed_mask", _backward, _setup)
differentiable("annealed_mask_backward", _double_backward, _setup_backward)
vmap_rule("annealed_mask", _vmap_mask)
vmap_rule("annealed_mask_backward", _vmap_backward)
