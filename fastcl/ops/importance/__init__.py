"""Per-parameter importances and their quadratic penalty (EWC, MAS, SI, RWalk)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ..._ops import call, call_in_place, define, differentiable, not_differentiable
from . import reference
from .path import (
    accumulate_path_,
    accumulate_walk_,
    consolidate_path_,
    merge_anchored_,
    merge_importances_,
    score_walk_,
)

__all__ = [
    "accumulate_affine_",
    "accumulate_conv_",
    "accumulate_outer_",
    "accumulate_path_",
    "accumulate_walk_",
    "consolidate_path_",
    "merge_anchored_",
    "merge_importances_",
    "quadratic_penalty",
    "quadratic_penalty_grad_",
    "score_walk_",
]

_PROBLEM = "Tensor[] params, Tensor[] anchors, Tensor[] importances, float strength"
_quadratic_penalty = define(f"quadratic_penalty({_PROBLEM}, bool check) -> Tensor", reference.quadratic_penalty)
_quadratic_penalty_backward = define(
    f"quadratic_penalty_backward(Tensor grad_value, {_PROBLEM}) -> Tensor[]",
    reference.quadratic_penalty_backward,
)
_quadratic_penalty_grad_ = define(
    f"quadratic_penalty_grad_(Tensor(a!)[] grads, {_PROBLEM}, bool check) -> Tensor",
    reference.quadratic_penalty_grad_,
)
_accumulate_outer_ = define(
    "accumulate_outer_(Tensor(a!) out, Tensor grad, Tensor activation, int power) -> ()",
    reference.accumulate_outer_,
)
_accumulate_conv_ = define(
    "accumulate_conv_(Tensor(a!) out, Tensor grad, Tensor input, int[] stride, int[] padding, int[] dilation, "
    "int groups, int power) -> ()",
    reference.accumulate_conv_,
)
_accumulate_affine_ = define(
    "accumulate_affine_(Tensor(a!)[] weights, Tensor(b!)[] biases, Tensor grad, Tensor[] normalised, int power) -> ()",
    reference.accumulate_affine_,
)


def quadratic_penalty(
    params: Sequence[Tensor],
    anchors: Sequence[Tensor],
    importances: Sequence[Tensor],
    strength: float,
    *,
    check: bool = True,
) -> Tensor:
    r""":math:`\frac{\lambda}{2} \sum_i F_i (\theta_i - \theta^*_i)^2`, differentiable in ``params``.

    EWC (Kirkpatrick et al. 2017, eq. 3) and, with their importances, MAS, SI and RWalk.

    Args:
        params: theta, any shapes; float32, float64, bfloat16 or float16.
        anchors: theta*, one per parameter, same shape and dtype.
        importances: F >= 0, one per parameter, same shape; the parameter's dtype, float32 or bfloat16.
        strength: lambda, finite and not negative.
        check: look for NaN and negative importances first (one extra read of F); leave it out only for importances
            checked before.

    Returns:
        0-d tensor, float32 (float64 if a parameter is): summed in a fixed order, so the thread count does not matter.

    Raises:
        ValueError: lists of different lengths, wrong shape, dtype or device, NaN or negative importance or strength.

    Cost: 12 bytes a float32 parameter (16 with ``check``), and 16 more in backward; see
    :func:`quadratic_penalty_grad_` for both in one pass.

    Example:
        >>> p, a, f = torch.ones(2), torch.zeros(2), torch.tensor([1.0, 3.0])
        >>> fastcl.ops.quadratic_penalty([p], [a], [f], strength=2.0)
        tensor(4.)
    """
    return call(_quadratic_penalty, params, anchors, importances, strength, check)


def quadratic_penalty_grad_(
    grads: Sequence[Tensor],
    params: Sequence[Tensor],
    anchors: Sequence[Tensor],
    importances: Sequence[Tensor],
    strength: float,
    *,
    check: bool = True,
) -> Tensor:
    r"""Adds :math:`\lambda F (\theta - \theta^*)` to the gradients in place and returns the penalty's value.

    The fused form of :func:`quadratic_penalty` and its backward, for use between ``loss.backward()`` and
    ``optimizer.step()``: one pass over memory instead of autograd's ten.

    Args:
        grads: one per parameter, its shape and dtype; mutated. Must share memory with nothing else here.
        params, anchors, importances, strength, check: as in :func:`quadratic_penalty`.

    Returns:
        The penalty, 0-d float32 (float64 if a parameter is), not differentiable.

    Raises:
        ValueError: as :func:`quadratic_penalty`, or gradients that overlap; nothing has been written then.

    Cost: 20 bytes a float32 parameter (24 with ``check``).

    Example:
        >>> g = torch.zeros(2); p, a, f = torch.ones(2), torch.zeros(2), torch.tensor([1.0, 3.0])
        >>> fastcl.ops.quadratic_penalty_grad_([g], [p], [a], [f], strength=2.0), g
        (tensor(4.), tensor([2., 6.]))
    """
    return call_in_place(_quadratic_penalty_grad_, grads, params, anchors, importances, strength, check)


def accumulate_outer_(out: Tensor, grad: Tensor, activation: Tensor, power: int) -> None:
    r"""Adds every sample's weight gradient, to a power, in place:
    :math:`\Omega_{oi} \mathrel{+}= \sum_n |\sum_p g_{npo}\, a_{npi}|^{power}`.

    The exact diagonal Fisher (power 2: Kirkpatrick et al. 2017) or MAS importance (power 1: Aljundi et al. 2018) of
    a linear map, without the [N, O, I] per-sample gradients. The sum over positions p comes before the power.

    Args:
        out: Omega [O, I], float32 or float64; mutated.
        grad: g, the loss gradients at the layer's output, one loss per sample: [N, O] or [N, P, O].
        activation: a, the layer's input: [N, I] or [N, P, I]; the dtype of grad (any float; summed in out's).
        power: 1 or 2.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, another power, out overlapping itself or an input.

    Cost: 2 N P O I FLOPs, those of the ordinary weight gradient; temporary memory for packed panels only.

    Example:
        >>> out = torch.zeros(1, 2); g, a = torch.tensor([[2.0], [1.0]]), torch.tensor([[1.0, 0.0], [3.0, 1.0]])
        >>> fastcl.ops.accumulate_outer_(out, g, a, power=2); out
        tensor([[13., 1.]])
    """
    call_in_place(_accumulate_outer_, out, grad, activation, power)


def accumulate_conv_(
    out: Tensor,
    grad: Tensor,
    input: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    power: int,
) -> None:
    r"""Adds every sample's convolution weight gradient, to a power, in place.

    :math:`\Omega_w \mathrel{+}= \sum_n |\partial \ell_n / \partial w|^{power}`, exactly, with no im2col matrix and no
    per-sample gradient in memory. 1-d, 2-d and 3-d; for a transposed convolution pass its input as `grad` and its
    output's gradient as `input` (its weight gradient is that convolution's).

    Args:
        out: [O, C / groups, kernel...], the weight's shape, float32 or float64; mutated.
        grad: gradients at the convolution's output, [N, O, positions...]; any strides.
        input: its input, [N, C, sizes...]; any strides (channels_last is the fastest), the dtype of grad.
        stride, padding, dilation: one number a spatial dimension; zeros are padded.
        groups: as in torch.
        power: 2 (Fisher) or 1 (MAS).

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, another power, out overlapping itself or an input.

    Cost: the FLOPs of the ordinary weight gradient, 2 N P O C k / groups; temporary memory: a block of samples with
    channels last, packed panels, and one copy of the weight.

    Example:
        >>> out, g, x = torch.zeros(1, 1, 1), torch.tensor([[[2.0, 1.0]]]), torch.tensor([[[1.0, 3.0]]])
        >>> fastcl.ops.accumulate_conv_(out, g, x, [1], [0], [1], groups=1, power=2); out
        tensor([[[25.]]])
    """
    call_in_place(_accumulate_conv_, out, grad, input, stride, padding, dilation, groups, power)


def accumulate_affine_(
    weight: Tensor | None,
    bias: Tensor | None,
    grad: Tensor,
    normalised: tuple[Tensor, Tensor, Tensor] | None,
    power: int,
) -> None:
    r"""Adds every sample's gradients of an element-wise weight and bias, to a power, in place.

    :math:`\Omega_c \mathrel{+}= \sum_n |\sum_p g_{npc}\,\hat a_{npc}|^{power}` with
    :math:`\hat a = (x - shift) \cdot scale` for the weight and 1 for the bias: BatchNorm in eval mode, LayerNorm,
    GroupNorm, RMSNorm, and any layer's bias.

    Args:
        weight, bias: [C], float32 or float64; mutated. None leaves it out.
        grad: gradients at the layer's output as [N, P, C], any strides (a permuted view of [N, C, H, W] will do).
        normalised: (x, shift, scale), each [N, P, C] of grad's dtype; shift and scale may be expanded. None for a
            bias alone.
        power: 2 (Fisher) or 1 (MAS).

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, another power, outputs that overlap anything.

    Cost: one read of grad and x.

    Example:
        >>> bias = torch.zeros(2)
        >>> fastcl.ops.accumulate_affine_(None, bias, torch.tensor([[[1.0, 2.0]], [[3.0, 0.0]]]), None, power=2); bias
        tensor([10.,  4.])
    """
    weights, biases = [] if weight is None else [weight], [] if bias is None else [bias]
    call_in_place(
        _accumulate_affine_, weights, biases, grad, [] if normalised is None else normalised, power, also=biases
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    params, anchors, importances, strength, _ = inputs
    if any(t.requires_grad for t in (*anchors, *importances)):
        raise ValueError("quadratic_penalty: anchors and importances are constants: they must not require grad")
    ctx.n, ctx.strength = len(params), strength
    ctx.save_for_backward(*params, *anchors, *importances)


def _backward(ctx: Any, grad_value: Tensor) -> tuple[Any, ...]:
    saved, n = ctx.saved_tensors, ctx.n
    grads = call(_quadratic_penalty_backward, grad_value, saved[:n], saved[n : 2 * n], saved[2 * n :], ctx.strength)
    return grads, [None] * n, [None] * n, None, None


differentiable("quadratic_penalty", _backward, _setup)
not_differentiable(
    "quadratic_penalty_backward",
    "the penalty's second derivative is the constant strength * importance: use it directly",
)
