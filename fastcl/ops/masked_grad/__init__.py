"""Gradients of weights that earlier tasks have reserved (HAT, DGM, DEN, CLN)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..._ops import call_in_place, define
from . import reference

_masked_grad_ = define("masked_grad_(Tensor(a!)[] grads, Tensor[] reserved) -> ()", reference.masked_grad_)


def masked_grad_(grads: Sequence[Tensor], reserved: Sequence[Tensor]) -> None:
    r"""Multiplies every gradient by one minus its reserved mask, in place: :math:`g \leftarrow g\,(1 - r)`.

    HAT (Serra et al. 2018, eq. 2) and DGM (Ostapenko et al. 2019, eq. 4). Where ``r`` is 1 the result is exactly 0,
    also for an infinite or NaN gradient. This alone does not freeze a weight: momentum and weight decay still move
    it; :class:`fastcl.optim.MaskedSGD` and ``MaskedAdam`` are for that.

    Args:
        grads: float32, float64, bfloat16 or float16 tensors of any dense layout; mutated.
        reserved: one mask per gradient, of its shape: bool, or floating point in [0, 1].

    Raises:
        ValueError: lists of different lengths, wrong shape, dtype or device, a mask outside [0, 1] or NaN, a gradient
            that overlaps itself, another gradient or a mask. Nothing has been written then.
        RuntimeError: a gradient that requires grad, outside ``torch.no_grad()``.

    Cost: one pass, 9 bytes a float32 weight with a bool mask (12 with a float mask, plus 4 for its range check).

    Example:
        >>> g = torch.tensor([1.0, 2.0]); fastcl.ops.masked_grad_([g], [torch.tensor([True, False])]); g
        tensor([0., 2.])
    """
    call_in_place(_masked_grad_, grads, reserved)
