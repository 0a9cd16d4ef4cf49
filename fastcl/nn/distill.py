"""Distillation: what a network said before is what it should say now; and entropy among a task's own outputs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def distillation(
    now: Tensor, before: Tensor, known: Sequence[int], competing: Sequence[int] | None = None, temperature: float = 2.0
) -> Tensor:
    r"""Cross-entropy of softened outputs, times :math:`T^2` (Hinton et al. 2015; LwF, Li & Hoiem 2016).

    .. math:: -T^2\,\frac1N\sum_n\sum_{c\in known}softmax(before/T)_{nc}\log softmax(now/T)_{nc}

    Plain torch: two softmaxes of [N, classes] are nothing beside the network that made them.

    Args:
        now, before: logits [N, outputs]; no gradient flows into `before`.
        known: columns that were trained when `before` was made: its softmax runs over them.
        competing: columns that the softmax of `now` runs over, among them `known`; None: `known`.
        temperature: T > 0.

    Raises:
        ValueError: a known column that does not compete, or a temperature that is not positive.

    Example:
        >>> fastcl.nn.distillation(torch.zeros(1, 4), torch.zeros(1, 4), [0, 1], temperature=1.0)
        tensor(0.6931)
    """
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature} but must be positive")
    among = list(known if competing is None else competing)
    if not set(known) <= set(among):
        raise ValueError(f"known has {sorted(set(known) - set(among))} but must be among competing, {among}")
    places = [among.index(c) for c in known]
    target = (before.detach()[:, list(known)] / temperature).softmax(1)
    found = F.log_softmax(now[:, among] / temperature, 1)[:, places]
    return -(target * found).sum(1).mean() * temperature**2


def entropy_within_tasks(logits: Tensor, y: Tensor, tasks: Sequence[Sequence[int]]) -> Tensor:
    """Cross-entropy where every sample competes among its own task's outputs.

    Args:
        logits: [N, C].
        y: output units [N].
        tasks: the output units of each task; every y is in one.

    Example:
        >>> entropy_within_tasks(torch.zeros(1, 4), torch.tensor([3]), [(0, 1), (2, 3)])
        tensor(0.6931)
    """
    # -inf outside the sample's own task: the softmax then runs over that task's outputs only
    own = torch.zeros(logits.shape[1], logits.shape[1], dtype=torch.bool, device=y.device)
    for task in tasks:
        rows = torch.tensor(list(task), device=y.device)
        own[rows.unsqueeze(1), rows] = True
    return F.cross_entropy(logits.masked_fill(~own[y], float("-inf")), y)
