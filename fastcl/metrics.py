"""What an accuracy matrix says. R[i, j] is the test accuracy on task j after learning task i, both from 0; T x T."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

Matrix = np.ndarray | Sequence[Sequence[float]]


def accuracy_matrix(accuracy: Matrix) -> np.ndarray:
    """`accuracy` as a checked float64 array.

    Raises:
        ValueError: not square, empty, or a value outside [0, 1] or NaN.

    Example:
        >>> accuracy_matrix([[0.9, 0.1], [0.8, 0.7]]).shape
        (2, 2)
    """
    r = np.asarray(accuracy, dtype=np.float64)
    if r.ndim != 2 or r.shape[0] != r.shape[1] or r.size == 0:
        raise ValueError(f"accuracy has shape {list(r.shape)} but must be [T, T]")
    if not ((r >= 0) & (r <= 1)).all():
        raise ValueError("accuracy has values outside [0, 1] or NaN")
    return r


def average_accuracy(accuracy: Matrix) -> float:
    r"""ACC :math:`= \frac1T\sum_j R_{T,j}` (Lopez-Paz and Ranzato 2017).

    Example:
        >>> average_accuracy([[1.0, 0.0], [0.5, 0.9]])
        0.7
    """
    return float(accuracy_matrix(accuracy)[-1].mean())


def forgetting(accuracy: Matrix) -> float:
    r""":math:`\frac1{T-1}\sum_{j<T}\max_{i<T} (R_{i,j}-R_{T,j})` over i >= j (Chaudhry et al. 2018); 0 for one task.

    Example:
        >>> forgetting([[1.0, 0.0], [0.5, 0.9]])
        0.5
    """
    r = accuracy_matrix(accuracy)
    t = len(r)
    if t == 1:
        return 0.0
    return float(np.mean([r[j : t - 1, j].max() - r[-1, j] for j in range(t - 1)]))


def lost_per_hop(accuracy: Matrix) -> list[float]:
    r"""Accuracy lost h tasks later, h = 1 to T - 1: the mean of :math:`R_{j,j}-R_{j+h,j}` over j.

    Example:
        >>> lost_per_hop([[1.0, 0.0], [0.75, 0.9]])
        [0.25]
    """
    r = accuracy_matrix(accuracy)
    t = len(r)
    return [float(np.mean([r[j, j] - r[j + h, j] for j in range(t - h)])) for h in range(1, t)]


def backward_transfer(accuracy: Matrix) -> float:
    r"""BWT :math:`= \frac1{T-1}\sum_{j<T} (R_{T,j}-R_{j,j})` (Lopez-Paz and Ranzato 2017); 0 for one task.

    Example:
        >>> backward_transfer([[1.0, 0.0], [0.5, 0.9]])
        -0.5
    """
    r = accuracy_matrix(accuracy)
    return float(np.mean(r[-1, :-1] - np.diag(r)[:-1])) if len(r) > 1 else 0.0


def forward_transfer(accuracy: Matrix, untrained: Sequence[float]) -> float:
    r"""FWT :math:`= \frac1{T-1}\sum_{j>1} (R_{j-1,j}-b_j)`, b the accuracies of the untrained network; 0 for one task.

    Raises:
        ValueError: `untrained` is not T numbers in [0, 1].

    Example:
        >>> forward_transfer([[1.0, 0.75], [0.5, 0.9]], untrained=[0.5, 0.5])
        0.25
    """
    r, b = accuracy_matrix(accuracy), np.asarray(untrained, dtype=np.float64)
    if b.shape != (len(r),) or not ((b >= 0) & (b <= 1)).all():
        raise ValueError(f"untrained has shape {list(b.shape)} but must be {len(r)} numbers in [0, 1]")
    return float(np.mean(np.diag(r, 1) - b[1:])) if len(r) > 1 else 0.0
