from __future__ import annotations

import math

import pytest

from fastcl import metrics

R = [[0.9, 0.5, 0.4], [0.7, 0.8, 0.6], [0.6, 0.75, 1.0]]


def test_by_hand() -> None:
    assert metrics.average_accuracy(R) == pytest.approx((0.6 + 0.75 + 1.0) / 3)
    assert metrics.forgetting(R) == pytest.approx((0.3 + 0.05) / 2)
    assert metrics.backward_transfer(R) == pytest.approx((-0.3 - 0.05) / 2)
    assert metrics.forward_transfer(R, [0.1, 0.2, 0.3]) == pytest.approx((0.3 + 0.3) / 2)


def test_forgetting_takes_the_best_past_accuracy() -> None:
    """Not the accuracy right after learning: later tasks may have helped first."""
    assert metrics.forgetting([[0.5, 0, 0], [0.9, 0.5, 0], [0.4, 0.5, 0.5]]) == pytest.approx((0.5 + 0.0) / 2)


def test_one_task() -> None:
    assert metrics.average_accuracy([[0.5]]) == 0.5
    assert metrics.forgetting([[0.5]]) == metrics.backward_transfer([[0.5]]) == 0.0
    assert metrics.forward_transfer([[0.5]], [0.1]) == 0.0


@pytest.mark.parametrize("wrong", [[], [[0.1, 0.2]], [[0.1], [0.2]], [0.1], [[1.5]], [[-0.1]], [[math.nan]]])
def test_bad_matrix(wrong: list) -> None:
    with pytest.raises(ValueError, match="accuracy has"):
        metrics.average_accuracy(wrong)


def test_bad_baseline() -> None:
    with pytest.raises(ValueError, match="untrained has shape"):
        metrics.forward_transfer(R, [0.1])
    with pytest.raises(ValueError, match="3 numbers in"):
        metrics.forward_transfer(R, [0.1, 2.0, 0.3])
