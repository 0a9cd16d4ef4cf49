"""Proximal steps of sparsity terms (DEN)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..._ops import call, call_in_place, define, not_differentiable
from . import reference

_soft_threshold_ = define("soft_threshold_(Tensor(a!)[] tensors, float threshold) -> ()", reference.soft_threshold_)

_group_soft_threshold_ = define(
    "group_soft_threshold_(Tensor(a!)[] tensors, float threshold, int dim) -> ()", reference.group_soft_threshold_
)
_drift_norms = define("drift_norms(Tensor[] tensors, Tensor[] anchors, int dim) -> Tensor[]", reference.drift_norms)


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


def group_soft_threshold_(tensors: Sequence[Tensor], threshold: float, dim: int) -> None:
    r"""The proximal step of a group lasso, in place: :math:`w_g \leftarrow w_g \max(1 - t / \lVert w_g\rVert_2, 0)`.

    DEN (Yoon et al. 2018, eq. 5): a group is one unit's weights, so that useless units become exactly zero.

    Args:
        tensors: weights, float32, float64, bfloat16 or float16; mutated. A NaN makes its whole group NaN.
        threshold: t >= 0; t = lr * gamma after an optimizer step.
        dim: the groups are the slices along it: 0 a unit's incoming weights (Linear, Conv), 1 its outgoing ones.

    Raises:
        ValueError: a negative or NaN threshold, a dim that a tensor lacks, a tensor that is not floating point or
            overlaps itself or another. Nothing has been written then.
        RuntimeError: a tensor that requires grad, outside ``torch.no_grad()``.

    Cost: two reads and a write, 12 bytes a float32 weight; norms are summed in float64 in a fixed order.

    Example:
        >>> w = torch.tensor([[3.0, 4.0], [0.3, 0.4]]); fastcl.ops.group_soft_threshold_([w], 1.0, dim=0); w
        tensor([[2.4000, 3.2000],
                [0.0000, 0.0000]])
    """
    call_in_place(_group_soft_threshold_, tensors, threshold, dim)


def drift_norms(tensors: Sequence[Tensor], anchors: Sequence[Tensor], dim: int) -> list[Tensor]:
    r"""How far each unit's weights moved: :math:`\rho_g = \lVert w_g - a_g\rVert_2` for every slice along `dim`.

    DEN (Yoon et al. 2018, algorithm 4): units with :math:`\rho > \sigma` are split.

    Args:
        tensors: weights, float32, float64, bfloat16 or float16.
        anchors: what they were, the same shapes and dtypes.
        dim: as in :func:`group_soft_threshold_`.

    Returns:
        One vector for each tensor, float32 (float64 for float64).

    Raises:
        ValueError: lists of different lengths, wrong shape, dtype, device or dim.

    Cost: reads both once, 8 bytes a float32 weight.

    Example:
        >>> fastcl.ops.drift_norms([torch.tensor([[3.0, 4.0], [0.0, 0.0]])], [torch.zeros(2, 2)], dim=0)
        [tensor([5., 0.])]
    """
    return call(_drift_norms, tensors, anchors, dim)


not_differentiable("drift_norms", "norms of drift are compared, not trained through")
