"""Proximal steps of sparsity terms (DEN)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..._ops import call_in_place, define
from . import reference

_soft_threshold_ = define("soft_threshold_(Tensor(a!)[] tensors, float threshold) -> ()", reference.soft_threshold_)


def soft_threshold_(tensors: Sequence[Tensor], threshold: float) -> None:
    r"""The proximal step of an l1 term, in place: :math:`w \leftarrow \mathrm{sign}(w)\max(|w| - t, 0)`.

    DEN (Yoon et al. 2018, eq. 3 and 5), after an optimizer step with learning rate lr: t = lr * mu.

    Args:
        tensors: weights of any shape, float32, float64, bfloat16 or float16; mutated. NaN stays NaN.
        threshold: t >= 0; infinity sets everything finite to zero.

    Raises:
        ValueError: a negative or NaN threshold, a tensor that is not floating point or overlaps itself or another.
        RuntimeError: a tensor that requires grad, outside ``torch.no_grad()``.

    Cost: one pass, 8 bytes a float32 weight.

    Example:
        >>> w = torch.tensor([-2.0, 0.5]); fastcl.ops.soft_threshold_([w], 1.0); w
        tensor([-1., 0.])
    """
    call_in_place(_soft_threshold_, tensors, threshold)
