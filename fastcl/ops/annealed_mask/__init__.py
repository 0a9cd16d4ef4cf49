"""Annealed attention masks over units or weights (HAT, DGM)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..._ops import call, define, differentiable, not_differentiable, vmap_rule
from .._direct import direct
from . import reference

_annealed_mask = define("annealed_mask(Tensor embedding, float scale) -> Tensor", reference.annealed_mask)
_annealed_mask_backward = define(
    "annealed_mask_backward(Tensor grad, Tensor embedding, float scale) -> Tensor",
    reference.annealed_mask_backward,
)
_compensated_mask = define(
    "compensated_mask(Tensor embedding, float scale, float s_max, bool literal) -> Tensor", reference.compensated_mask
)
_compensated_mask_backward = define(
    "compensated_mask_backward(Tensor grad, Tensor embedding, float scale, float s_max, bool literal) -> Tensor",
    reference.compensated_mask_backward,
)
_WEIGHT = "Tensor weight, Tensor embedding, float scale, Tensor? reserved=None, float s_max=0., int compensation=0"
_masked_weight = define(f"masked_weight({_WEIGHT}) -> Tensor", reference.masked_weight)
_masked_weight_kept = define(f"masked_weight_kept({_WEIGHT}) -> (Tensor, Tensor)", reference.masked_weight_kept)
_masked_weight_backward = define(
    f"masked_weight_backward(Tensor grad, Tensor? grad_kept, {_WEIGHT}) -> (Tensor, Tensor)",
    reference.masked_weight_backward,
)
_mask_sparsity = define("mask_sparsity(Tensor[] masks, Tensor[] reserved) -> Tensor", reference.mask_sparsity)
_mask_sparsity_backward = define(
    "mask_sparsity_backward(Tensor grad, Tensor[] masks, Tensor[] reserved) -> Tensor[]",
    reference.mask_sparsity_backward,
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
    return call(_annealed_mask_backward, grad, embedding, ctx.scale), None


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


def compensated_mask(embedding: Tensor, scale: float, s_max: float, *, literal: bool = False) -> Tensor:
    r"""The mask :math:`\sigma(s\,e)` whose gradient in ``e`` is HAT's compensated one.

    HAT (Serra et al. 2018, sec. 2.5) multiplies the embedding's gradient by
    :math:`\frac{s_{max}}{s}\frac{\cosh(s e)+1}{\cosh(e)+1}`. Together with the mask's own slope that is exactly
    :math:`s_{max}\,\sigma'(e)`, which is computed here: right in every dtype, also where the mask rounds to 1 and where
    cosh overflows.

    Args:
        embedding: e, as in :func:`annealed_mask`.
        scale: s, finite and not negative.
        s_max: finite and positive.
        literal: the authors' product instead, s e clamped to 50: in float32 it is 6 % off at s e = 16 and exactly 0
            beyond 17, so that a unit that is on can never be turned off. For parity only; computed in float32 or
            float64, so that float16 does not overflow. Needs scale > 0.

    Returns:
        m, of e's shape, dtype and memory order. Differentiable once: the gradient is not that of a function.

    Raises:
        ValueError: scale or s_max out of range; embedding not floating point.

    Example:
        >>> e = torch.zeros(1, requires_grad=True); fastcl.ops.compensated_mask(e, 1.0, 400.0).sum().backward(); e.grad
        tensor([100.])
    """
    return call(_compensated_mask, embedding, scale, s_max, literal)


def masked_weight(
    weight: Tensor,
    embedding: Tensor,
    scale: float,
    *,
    reserved: Tensor | None = None,
    s_max: float | None = None,
    literal: bool = False,
) -> Tensor:
    r"""The weight under its annealed mask, :math:`W \circ \sigma(s\,e)`, differentiable in both.

    DGM (Ostapenko et al. 2019, eq. 1-2). Backward is one pass that writes both gradients and nothing else.

    Args:
        weight: W, float32, float64, bfloat16 or float16, any dense layout (one with gaps is copied).
        embedding: e, of W's shape and dtype (DGMw: brought to W's memory order if it has another, one copy a call); or
            1 in every dimension but one of W's, a mask for each unit (DGMa, HAT): W is then taken contiguous.
        scale: s, finite and not negative.
        reserved: r of W's shape, bool, floating point in [0, 1] or packed bits: W's gradient comes out as g (1 - r)
            (eq. 4). The embedding's does not: a task may still choose whether to use a reserved weight.
        s_max: given, the embedding's gradient is HAT's compensated one, see :func:`compensated_mask`; `literal` too.

    Returns:
        W o m, in W's dtype and memory order. Twice differentiable without `s_max` and `reserved`.

    Raises:
        ValueError: shapes or dtypes that do not fit, scale or s_max out of range, a mask outside [0, 1] or NaN.

    Cost: 12 bytes a float32 weight forward, 20 backward (and the mask's), no temporary. With an embedding for every
    unit 8 and 12, and backward for columns sums in double, at most a quarter of the weight.

    Example:
        >>> fastcl.ops.masked_weight(torch.ones(2), torch.tensor([-1.0, 1.0]), scale=2.0)
        tensor([0.1192, 0.8808])
    """
    return call(_masked_weight, weight, embedding, scale, reserved, *_compensation("masked_weight", s_max, literal))


def masked_weight_kept(
    weight: Tensor,
    embedding: Tensor,
    scale: float,
    *,
    reserved: Tensor | None = None,
    s_max: float | None = None,
    literal: bool = False,
) -> tuple[Tensor, Tensor]:
    r""":func:`masked_weight` together with :math:`\sum m\,(1-r)`, the numerator of DGM's eq. (5).

    The regulariser then costs nothing: its value falls out of the forward pass, its gradient joins the backward pass.
    Divide by :math:`\sum(1-r)`, which is constant during a task.

    Args: as :func:`masked_weight`; the embedding has the weight's shape.

    Returns:
        (W o m, the sum as a 0-d tensor of float32, or float64 for float64 weights), both differentiable.

    Example:
        >>> fastcl.ops.masked_weight_kept(torch.ones(2), torch.zeros(2), scale=1.0)
        (tensor([0.5000, 0.5000]), tensor(1.))
    """
    numbers = _compensation("masked_weight_kept", s_max, literal)
    return call(_masked_weight_kept, weight, embedding, scale, reserved, *numbers)


def mask_sparsity(masks: Sequence[Tensor], reserved: Sequence[Tensor] = ()) -> Tensor:
    r"""The share of free capacity in use, :math:`R = \sum m\,(1-r) / \sum (1-r)` over all layers; differentiable.

    HAT (Serra et al. 2018, eq. 6), DGM (Ostapenko et al. 2019, eq. 5). Where nothing is free R is 0.

    Args:
        masks: m, any shapes; float32, float64, bfloat16 or float16.
        reserved: r, one per mask: bool, floating point in [0, 1], packed bits; empty: nothing is reserved.

    Returns:
        0-d tensor, float32 (float64 if a mask is): summed in a fixed order, so the thread count does not matter.

    Raises:
        ValueError: lists of different lengths, wrong shape, dtype or device, reserved outside [0, 1] or NaN.

    Cost: reads masks and reserved once; backward reads reserved twice and writes the gradients. For masks of weights
    use :func:`masked_weight_kept`.

    Example:
        >>> fastcl.ops.mask_sparsity([torch.tensor([1.0, 0.5])], [torch.tensor([True, False])])
        tensor(0.5000)
    """
    return call(_mask_sparsity, masks, reserved)


def _compensation(op: str, s_max: float | None, literal: bool) -> tuple[float, int]:
    if s_max is None:
        if literal:
            raise ValueError(f"{op}: literal needs s_max")
        return 0.0, reference.NONE
    return float(s_max), reference.LITERAL if literal else reference.ANALYTIC


def _setup_compensated(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[0])
    ctx.numbers = inputs[1:]


def _backward_compensated(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    (embedding,) = ctx.saved_tensors
    return call(_compensated_mask_backward, grad, embedding, *ctx.numbers), None, None, None


def _setup_weight(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    weight, embedding, scale, reserved, s_max, compensation = (*inputs, None, 0.0, 0)[:6] if len(inputs) < 6 else inputs
    if reserved is not None and reserved.requires_grad:
        raise ValueError("masked_weight: reserved is a constant: it must not require grad")
    ctx.save_for_backward(weight, embedding, reserved)
    ctx.numbers = scale, s_max, compensation
    ctx.n_inputs = len(inputs)


def _backward_weight(ctx: Any, grad: Tensor, grad_kept: Tensor | None = None) -> tuple[Any, ...]:
    weight, embedding, reserved = ctx.saved_tensors
    scale, s_max, compensation = ctx.numbers
    found = call(_masked_weight_backward, grad, grad_kept, weight, embedding, scale, reserved, s_max, compensation)
    return *found, *[None] * (ctx.n_inputs - 2)


def _setup_weight_backward(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs[:4])
    ctx.rest = inputs[4:]


def _double_backward_weight(ctx: Any, up_weight: Tensor, up_embedding: Tensor) -> tuple[Any, ...]:
    # d(g m)/de = g m', d(g w m')/dw = g m', d(g w m')/de = g w m'': rare, so in plain torch
    grad, grad_kept, weight, embedding = ctx.saved_tensors
    scale, reserved, _, compensation = (*ctx.rest, None, 0.0, 0)[:4]
    if compensation or reserved is not None:
        raise RuntimeError(
            "masked_weight_backward is not differentiable with reserved or s_max: its result is no function's gradient"
        )
    inputs = [t.detach().requires_grad_() if t is not None else None for t in (grad, grad_kept, weight, embedding)]
    with torch.enable_grad():
        g, gk, w, e = inputs
        slope = reference.slope(e, scale)
        through = g * w if e.shape == w.shape else (g * w).sum_to_size(e.shape)
        outputs = (g * torch.sigmoid(scale * e), (through if gk is None else through + gk) * slope)
        found = torch.autograd.grad(outputs, [t for t in inputs if t is not None], (up_weight, up_embedding))
    found = list(found)
    if grad_kept is None:
        found.insert(1, None)
    return *found, *[None] * len(ctx.rest)


def _setup_sparsity(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    masks, reserved = inputs
    ctx.n = len(masks)
    ctx.n_reserved = len(reserved)
    ctx.save_for_backward(*masks, *reserved)


def _backward_sparsity(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    saved = ctx.saved_tensors
    return call(_mask_sparsity_backward, grad, saved[: ctx.n], saved[ctx.n :]), [None] * ctx.n_reserved


_COMPENSATED = "the compensated gradient is not the gradient of a function"
differentiable("compensated_mask", _backward_compensated, _setup_compensated)
not_differentiable("compensated_mask_backward", _COMPENSATED)
differentiable("masked_weight", _backward_weight, _setup_weight)
differentiable("masked_weight_kept", _backward_weight, _setup_weight)
differentiable("masked_weight_backward", _double_backward_weight, _setup_weight_backward)
differentiable("mask_sparsity", _backward_sparsity, _setup_sparsity)
not_differentiable("mask_sparsity_backward", "the sparsity is linear in the masks")

direct(_annealed_mask, "embedding")
direct(_annealed_mask_backward, "embedding")
direct(_masked_weight, "weight")
direct(_masked_weight_kept, "weight", None)
direct(_masked_weight_backward, "weight", "embedding")
