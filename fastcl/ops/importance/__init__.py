"""Per-parameter importances and their quadratic penalty (EWC, MAS, SI, RWalk)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ..._ops import call, call_in_place, define, differentiable, not_differentiable
from . import reference

_PROBLEM = "Tensor[] params, Tensor[] anchors, Tensor[] importances, float strength"
_quadratic_penalty = define(f"quadratic_penalty({_PROBLEM}, bool check=True) -> Tensor", reference.quadratic_penalty)
_quadratic_penalty_backward = define(
    f"quadratic_penalty_backward(Tensor grad_value, {_PROBLEM}) -> Tensor[]",
    reference.quadratic_penalty_backward,
)
_quadratic_penalty_grad_ = define(
    f"quadratic_penalty_grad_(Tensor(a!)[] grads, {_PROBLEM}, bool check=True) -> Tensor",
    reference.quadratic_penalty_grad_,
)
_accumulate_outer_ = define(
    "accumulate_outer_(Tensor(a!) out, Tensor grad, Tensor activation, int power) -> ()",
    reference.accumulate_outer_,
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


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    params, anchors, importances, strength = inputs[:4]
    if any(t.requires_grad for t in (*anchors, *importances)):
        raise ValueError("quadratic_penalty: anchors and importances are constants: they must not require grad")
    ctx.n, ctx.strength, ctx.constants = len(params), strength, [None] * (len(inputs) - 3)
    ctx.save_for_backward(*params, *anchors, *importances)


def _backward(ctx: Any, grad_value: Tensor) -> tuple[Any, ...]:
    saved, n = ctx.saved_tensors, ctx.n
    grads = _quadratic_penalty_backward(grad_value, saved[:n], saved[n : 2 * n], saved[2 * n :], ctx.strength)
    return grads, [None] * n, [None] * n, *ctx.constants


differentiable("quadratic_penalty", _backward, _setup)
not_differentiable(
    "quadratic_penalty_backward",
    "the penalty's second derivative is the constant strength * importance: use it directly",
)
