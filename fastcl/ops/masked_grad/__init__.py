"""Gradients of weights that earlier tasks have reserved (HAT, DGM, DEN, CLN)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..._ops import call, call_in_place, define, not_differentiable
from .._direct import Direct
from . import reference

_masked_grad_ = define("masked_grad_(Tensor(a!)[] grads, Tensor[] reserved) -> ()", reference.masked_grad_)
_masked_grad_any_ = define(
    "masked_grad_any_(Tensor(a!)[] grads, Tensor[] reserved, Tensor[] columns) -> ()", reference.masked_grad_any_
)
_pack_mask = define("pack_mask(Tensor mask) -> Tensor", reference.pack_mask)
_unpack_mask = define("unpack_mask(Tensor packed, Tensor like) -> Tensor", reference.unpack_mask)
_masked_sgd_ = define(
    "masked_sgd_(Tensor(a!)[] params, Tensor(b!)[] momentum_buffers, Tensor[] grads, Tensor[] reserved, "
    "Tensor[] columns, float lr, float momentum, float dampening, float weight_decay, bool nesterov, bool maximize, "
    "bool first, bool check) -> ()",
    reference.masked_sgd_,
)
_masked_adam_ = define(
    "masked_adam_(Tensor(a!)[] params, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, Tensor(d!)[] max_exp_avg_sqs, "
    "Tensor(e!)[] steps, Tensor[] grads, Tensor[] reserved, Tensor[] columns, float lr, float beta1, float beta2, "
    "float eps, float weight_decay, bool decoupled, bool maximize, bool check) -> ()",
    reference.masked_adam_,
)


def masked_grad_(grads: Sequence[Tensor], reserved: Sequence[Tensor]) -> None:
    r"""Multiplies every gradient by one minus its reserved mask, in place: :math:`g \leftarrow g\,(1 - r)`.

    HAT (Serra et al. 2018, eq. 2) and DGM (Ostapenko et al. 2019, eq. 4). Where ``r`` is 1 the result is exactly 0,
    also for an infinite or NaN gradient. This alone does not freeze a weight: momentum and weight decay still move
    it; :class:`fastcl.optim.MaskedSGD` and ``MaskedAdam`` are for that.

    Args:
        grads: float32, float64, bfloat16 or float16 tensors of any dense layout; mutated.
        reserved: one mask per gradient, of its shape: bool, or floating point in [0, 1]; or packed bits
            (:func:`pack_mask`); or a pair (rows, columns), see :func:`masked_grad_any_`.

    Raises:
        ValueError: lists of different lengths, wrong shape, dtype or device, a mask outside [0, 1] or NaN, a gradient
            that overlaps itself, another gradient or a mask. Nothing has been written then.
        RuntimeError: a gradient that requires grad, outside ``torch.no_grad()``.

    Cost: one pass, 9 bytes a float32 weight with a bool mask (12 with a float mask, plus 4 for its range check).

    Example:
        >>> g = torch.tensor([1.0, 2.0]); fastcl.ops.masked_grad_([g], [torch.tensor([True, False])]); g
        tensor([0., 2.])
    """
    _direct_masked_grad_(grads, reserved)


def _dispatched_masked_grad_(grads: Sequence[Tensor], reserved: Sequence[Tensor]) -> None:
    if isinstance(reserved, (list, tuple)) and tuple in map(type, reserved):
        pairs = [r if type(r) is tuple else (r, r.new_empty(0)) for r in reserved]
        return masked_grad_any_(grads, [rows for rows, _ in pairs], [columns for _, columns in pairs])
    return call_in_place(_masked_grad_, grads, reserved)


_direct_masked_grad_ = Direct(_masked_grad_, n_lists=2, n_mutated=1, otherwise=_dispatched_masked_grad_)


def masked_grad_any_(grads: Sequence[Tensor], reserved: Sequence[Tensor], columns: Sequence[Tensor]) -> None:
    r""":func:`masked_grad_` for masks in every stored form, two vectors among them.

    HAT (Serra et al. 2018, eq. 2) reserves :math:`r_{ij} = \min(r^{post}_i, r^{pre}_j)`: here the matrix never exists.

    Args:
        grads: as in :func:`masked_grad_`; mutated.
        reserved: one mask per gradient: bool or floating point of its shape; packed bits (:func:`pack_mask`); bool of
            shape [0], nothing reserved; or, where ``columns[i]`` is not empty, one value in [0, 1] for each index of
            dimension 0.
        columns: an empty list, or per gradient an empty tensor or one value for each index of dimension 1. The minimum
            of the two is taken, so which dimension is "post" (Linear, Conv: 0; ConvTranspose: 1) does not matter.

    Raises:
        ValueError, RuntimeError: as :func:`masked_grad_`. Nothing has been written then.

    Cost: one pass, 8 bytes a float32 weight and 1/8 for packed bits; for vectors one row of floats.

    Example:
        >>> g = torch.ones(2, 2); fastcl.ops.masked_grad_any_([g], [torch.tensor([1.0, 0.0])], [torch.tensor([1.0, 0.5])]); g
        tensor([[0.0000, 0.5000], [1.0000, 1.0000]])
    """  # noqa: E501
    call_in_place(_masked_grad_any_, grads, reserved, columns)


def pack_mask(mask: Tensor) -> Tensor:
    """A bool mask as bits, one an element: bit i % 8 of byte i // 8, i counted in the mask's memory order.

    Args:
        mask: bool, any shape and layout (one with gaps: in the order that torch.empty_like gives it). Where it is for
            a weight in another layout (channels_last), bring it to that layout first.

    Returns:
        uint8 [ceil(n / 8)], the last byte filled up with zeros.

    Raises:
        ValueError: a mask that is not bool.

    Cost: reads 1 byte an element, writes 1/8.

    Example:
        >>> fastcl.ops.pack_mask(torch.tensor([True, False, False, True]))
        tensor([9], dtype=torch.uint8)
    """
    return call(_pack_mask, mask)


def unpack_mask(packed: Tensor, like: Tensor) -> Tensor:
    """The bool mask of :func:`pack_mask` again, in the shape and memory order of `like` (any dtype).

    Raises:
        ValueError: packed is not uint8 of one dimension with a bit for every element of like.

    Example:
        >>> fastcl.ops.unpack_mask(torch.tensor([9], dtype=torch.uint8), torch.zeros(4))
        tensor([ True, False, False,  True])
    """
    return call(_unpack_mask, packed, like)


def masked_sgd_(
    params: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor],
    grads: Sequence[Tensor],
    reserved: Sequence[Tensor],
    columns: Sequence[Tensor],
    lr: float,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    maximize: bool = False,
    first: bool = False,
    check: bool = True,
) -> None:
    r"""One step of SGD that leaves every bit of reserved weights and of their momentum as it was.

    :class:`torch.optim.SGD` with the gradients :math:`g\,(1 - r)`, in one pass over all tensors, where entries with
    r = 1 are not written: neither stale momentum nor weight decay moves them. :class:`fastcl.optim.MaskedSGD` is the
    optimizer on it.

    Args:
        params: theta, any dense layout; float32, float64, bfloat16 or float16 (arithmetic in float32 or float64); mutated.
        momentum_buffers: one per parameter, its shape and dtype, mutated; an empty list without a momentum.
        grads: one per parameter, its shape and dtype.
        reserved, columns: an empty list, or as in :func:`masked_grad_any_`.
        lr, momentum, dampening, weight_decay, nesterov, maximize: torch.optim.SGD's.
        first: start the momentum with the gradient, whatever the buffers hold (torch's first step).
        check: look for mask values outside [0, 1]; leave it out only for masks checked before.

    Raises:
        ValueError: bad numbers, lists of different lengths, wrong shapes, dtypes or devices, a mask outside [0, 1] or
            NaN, tensors that overlap. Nothing has been written then.
        RuntimeError: a parameter that requires grad, outside ``torch.no_grad()``.

    Cost: one pass, 20 bytes a float32 parameter with momentum (12 without), and the mask's (bool 1, packed 1/8, float 4).

    Example:
        >>> p, g, r = torch.ones(2), torch.ones(2), torch.tensor([True, False])
        >>> fastcl.ops.masked_sgd_([p], [], [g], [r], [], lr=0.5); p
        tensor([1.0000, 0.5000])
    """  # noqa: E501
    buffers = list(momentum_buffers)
    options = (lr, momentum, dampening, weight_decay, nesterov, maximize, first, check)
    call_in_place(_masked_sgd_, params, buffers, grads, reserved, columns, *options, also=buffers)


def masked_adam_(
    params: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    max_exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    grads: Sequence[Tensor],
    reserved: Sequence[Tensor],
    columns: Sequence[Tensor],
    lr: float,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    decoupled: bool = False,
    maximize: bool = False,
    check: bool = True,
) -> None:
    r"""One step of Adam (AdamW with `decoupled`) that leaves every bit of reserved weights and moments as it was.

    :class:`torch.optim.Adam` with the gradients :math:`g\,(1 - r)`, in one pass over all tensors, where entries with
    r = 1 are not written. Adam divides a constant factor out again: soft values 0 < r < 1 slow a weight down much less
    than under SGD. :class:`fastcl.optim.MaskedAdam` is the optimizer on it.

    Args:
        params, grads, reserved, columns, check: as in :func:`masked_sgd_`.
        exp_avgs, exp_avg_sqs: the moments, one per parameter, its shape and dtype; mutated.
        max_exp_avg_sqs: amsgrad's, likewise; an empty list without.
        steps: the counts, one number each, float32 or float64; incremented here.
        lr, beta1, beta2, eps, weight_decay, maximize: torch.optim.Adam's.

    Raises:
        ValueError, RuntimeError: as :func:`masked_sgd_`. Nothing has been written then.

    Cost: one pass, 28 bytes a float32 parameter (36 with amsgrad), and the mask's (bool 1, packed 1/8, float 4).

    Example:
        >>> p, m, v, g = torch.ones(2), torch.zeros(2), torch.zeros(2), torch.ones(2)
        >>> fastcl.ops.masked_adam_([p], [m], [v], [], [torch.zeros(1)], [g], [torch.tensor([True, False])], [], lr=0.5); p
        tensor([1.0000, 0.5000])
    """  # noqa: E501
    also = [*exp_avgs, *exp_avg_sqs, *max_exp_avg_sqs, *steps]
    options = (lr, beta1, beta2, eps, weight_decay, decoupled, maximize, check)
    lists = (exp_avgs, exp_avg_sqs, max_exp_avg_sqs, steps, grads, reserved, columns)
    call_in_place(_masked_adam_, params, *lists, *options, also=also)


not_differentiable("pack_mask", "bits have no gradient")
not_differentiable("unpack_mask", "bits have no gradient")
