"""What SI and RWalk gather along the optimizer's path, and what becomes of importances at a task's end."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import Tensor

from ..._ops import call_in_place, define
from .._direct import Direct
from . import reference

_accumulate_path_ = define(
    "accumulate_path_(Tensor(a!)[] omegas, Tensor[] grads, Tensor[] params, Tensor[] before) -> ()",
    reference.accumulate_path_,
)
_direct_accumulate_path_ = Direct(
    _accumulate_path_, n_lists=4, n_mutated=1, otherwise=partial(call_in_place, _accumulate_path_)
)
_accumulate_walk_ = define(
    "accumulate_walk_(Tensor(a!)[] fishers, Tensor(b!)[] gains, Tensor(c!)[] moved, Tensor[] grads, Tensor[] params, "
    "Tensor[] before, float alpha) -> ()",
    reference.accumulate_walk_,
)
_score_walk_ = define(
    "score_walk_(Tensor(a!)[] scores, Tensor(b!)[] gains, Tensor(c!)[] moved, Tensor[] fishers, float epsilon) -> ()",
    reference.score_walk_,
)
_consolidate_path_ = define(
    "consolidate_path_(Tensor(a!)[] importances, Tensor(b!)[] omegas, Tensor(c!)[] starts, Tensor[] params, float xi) "
    "-> ()",
    reference.consolidate_path_,
)
_merge_importances_ = define(
    "merge_importances_(Tensor(a!)[] importances, Tensor[] fresh, float old_share, float fresh_share) -> ()",
    reference.merge_importances_,
)
_direct_merge_importances_ = Direct(
    _merge_importances_, n_lists=2, n_mutated=1, otherwise=partial(call_in_place, _merge_importances_)
)
_merge_anchored_ = define(
    "merge_anchored_(Tensor(a!)[] importances, Tensor(b!)[] anchors, Tensor[] fresh, Tensor[] params) -> Tensor",
    reference.merge_anchored_,
)


def accumulate_path_(
    omegas: Sequence[Tensor], grads: Sequence[Tensor], params: Sequence[Tensor], before: Sequence[Tensor]
) -> None:
    r"""SI's path integral of one optimizer step, in place: :math:`\omega \mathrel{-}= g\,(\theta - \theta_{before})`.

    Synaptic intelligence (Zenke et al. 2017, eq. 3).

    Args:
        omegas: float32 (float64 for float64 parameters), one per parameter, its shape; mutated.
        grads: g of the task's own loss, as it was before the step.
        params: theta after the step; float32, float64, bfloat16 or float16.
        before: theta before the step; the dtype of the parameters.

    Raises:
        ValueError: lists, shapes, dtypes or devices that do not fit; omegas that share memory with anything.

    Cost: one pass, 20 bytes a float32 parameter.

    Example:
        >>> w, g, p, b = torch.zeros(1), torch.tensor([2.0]), torch.tensor([0.0]), torch.tensor([1.0])
        >>> fastcl.ops.accumulate_path_([w], [g], [p], [b]); w
        tensor([2.])
    """
    _direct_accumulate_path_(omegas, grads, params, before)


def accumulate_walk_(
    fishers: Sequence[Tensor],
    gains: Sequence[Tensor],
    moved: Sequence[Tensor],
    grads: Sequence[Tensor],
    params: Sequence[Tensor],
    before: Sequence[Tensor],
    alpha: float,
) -> None:
    r"""RWalk's three sums of one optimizer step, in place.

    Riemannian walk (Chaudhry et al. 2018): :math:`F \leftarrow (1-\alpha) F + \alpha g^2`,
    gain :math:`\mathrel{-}= g\,\Delta\theta`, moved :math:`\mathrel{+}= \Delta\theta`.

    Args:
        fishers, gains, moved: float32 (float64 for float64 parameters), one per parameter, its shape; mutated.
        grads, params, before: as for :func:`accumulate_path_`.
        alpha: weight of the newest square, in (0, 1].

    Raises:
        ValueError: alpha out of range; lists, shapes, dtypes or devices that do not fit; shared memory.

    Cost: one pass, 36 bytes a float32 parameter.

    Example:
        >>> f, gain, moved = torch.zeros(1), torch.zeros(1), torch.zeros(1)
        >>> g, p, b = torch.tensor([2.0]), torch.tensor([0.0]), torch.tensor([1.0])
        >>> fastcl.ops.accumulate_walk_([f], [gain], [moved], [g], [p], [b], alpha=0.5); f, gain, moved
        (tensor([2.]), tensor([2.]), tensor([-1.]))
    """
    _direct_accumulate_walk_(fishers, gains, moved, grads, params, before, alpha)


def _dispatched_accumulate_walk_(fishers: Any, gains: Any, moved: Any, *rest: Any) -> None:
    call_in_place(_accumulate_walk_, fishers, gains, moved, *rest, also=(*gains, *moved))


_direct_accumulate_walk_ = Direct(_accumulate_walk_, n_lists=6, n_mutated=3, otherwise=_dispatched_accumulate_walk_)


def score_walk_(
    scores: Sequence[Tensor],
    gains: Sequence[Tensor],
    moved: Sequence[Tensor],
    fishers: Sequence[Tensor],
    epsilon: float,
) -> None:
    r"""Closes one of RWalk's windows: score :math:`\mathrel{+}= \max(0, gain / (\frac12 F\,moved^2 + \epsilon))`.

    Riemannian walk (Chaudhry et al. 2018, eq. 8). `gains` and `moved` start again from 0.

    Args:
        scores, gains, moved: float32 or float64 of one shape each; mutated.
        fishers: F, their shape and dtype.
        epsilon: finite and positive.

    Raises:
        ValueError: epsilon out of range; lists, shapes, dtypes or devices that do not fit; shared memory.

    Cost: one pass, 28 bytes a float32 parameter.

    Example:
        >>> s, gain, moved, f = torch.zeros(1), torch.ones(1), torch.ones(1), torch.ones(1)
        >>> fastcl.ops.score_walk_([s], [gain], [moved], [f], epsilon=0.5); s, gain
        (tensor([1.]), tensor([0.]))
    """
    call_in_place(_score_walk_, scores, gains, moved, fishers, epsilon, also=(*gains, *moved))


def consolidate_path_(
    importances: Sequence[Tensor],
    omegas: Sequence[Tensor],
    starts: Sequence[Tensor],
    params: Sequence[Tensor],
    xi: float,
) -> None:
    r"""Ends a task of SI: :math:`\Omega \mathrel{+}= \max(\omega, 0) / ((\theta - \theta_{start})^2 + \xi)`.

    Synaptic intelligence (Zenke et al. 2017, eq. 5). Then :math:`\omega = 0` and :math:`\theta_{start} = \theta`.

    Args:
        importances: Omega; the parameters' dtype, float32 or bfloat16; mutated.
        omegas: float32 (float64 for float64 parameters); mutated.
        starts: theta where the task began, and then where it ended; the parameters' dtype; mutated.
        params: theta.
        xi: damping, finite and positive.

    Raises:
        ValueError: xi out of range; importances that would be NaN or infinite; lists, shapes, dtypes or devices that
            do not fit; shared memory. Nothing has been written then.

    Cost: two passes (the first one checks), 44 bytes a float32 parameter.

    Example:
        >>> f, w, s, p = torch.zeros(1), torch.ones(1), torch.zeros(1), torch.tensor([0.5])
        >>> fastcl.ops.consolidate_path_([f], [w], [s], [p], xi=0.25); f, w, s
        (tensor([2.]), tensor([0.]), tensor([0.5000]))
    """
    call_in_place(_consolidate_path_, importances, omegas, starts, params, xi, also=(*omegas, *starts))


def merge_importances_(
    importances: Sequence[Tensor], fresh: Sequence[Tensor], old_share: float = 1.0, fresh_share: float = 1.0
) -> None:
    r"""Adds a task's importances to the earlier ones, in place: :math:`F \leftarrow \gamma F + \beta F_{new}`.

    Online EWC (Schwarz et al. 2018, eq. 9); MAS's sum over tasks.

    Args:
        importances: F; the dtype of `fresh`, float32 or bfloat16; mutated.
        fresh: F_new, float32 or float64, finite and not negative.
        old_share, fresh_share: gamma and beta, finite and not negative.

    Raises:
        ValueError: NaN, infinite or negative values in `fresh`, or a share out of range; lists, shapes, dtypes or
            devices that do not fit; shared memory. Nothing has been written then.

    Cost: two reads of F_new (the first one checks), 16 bytes a float32 parameter.

    Example:
        >>> f = torch.ones(1); fastcl.ops.merge_importances_([f], [torch.tensor([2.0])], old_share=0.5); f
        tensor([2.5000])
    """
    _direct_merge_importances_(importances, fresh, old_share, fresh_share)


def merge_anchored_(
    importances: Sequence[Tensor], anchors: Sequence[Tensor], fresh: Sequence[Tensor], params: Sequence[Tensor]
) -> Tensor:
    r"""Adds a task with an anchor of its own, in place, so that one anchor stands exactly for all of them.

    EWC with separate anchors (Kirkpatrick et al. 2017): :math:`F (t-a)^2 + f (t-p)^2 = (F+f)(t-a')^2 + c` with
    :math:`a' = a + \frac{f}{F+f}(p-a)`. Memory and time do not grow with the number of tasks.

    Args:
        importances: F; the parameters' dtype, float32 or bfloat16; mutated.
        anchors: a; the parameters' shape and dtype; mutated.
        fresh: f, float32 (float64 for float64 parameters), finite and not negative.
        params: p, where the task ended.

    Returns:
        The sum of c / 2 over all weights, 0-d float64: what the penalty of the common anchor lacks.

    Raises:
        ValueError: as :func:`merge_importances_`.

    Cost: 28 bytes a float32 parameter, and one more read of f.

    Example:
        >>> f, a = torch.ones(1), torch.zeros(1)
        >>> fastcl.ops.merge_anchored_([f], [a], [torch.ones(1)], [torch.ones(1)]), f, a
        (tensor(0.2500, dtype=torch.float64), tensor([2.]), tensor([0.5000]))
    """
    return call_in_place(_merge_anchored_, importances, anchors, fresh, params, also=anchors)
