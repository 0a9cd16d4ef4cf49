from __future__ import annotations

import math

import pytest
import torch

from fastcl.nn import jitter


def test_nothing_moves_by_nothing() -> None:
    x = torch.rand(3, 2, 7, 9)
    torch.testing.assert_close(jitter(x, 0, 0, 0), x)


def test_every_image_moves_by_an_amount_of_its_own_within_the_limits() -> None:
    x = torch.zeros(500, 1, 41, 41)
    x[:, :, 20, 20] = 1.0
    moved = jitter(x, 0, 0.1, 0)
    at = torch.arange(41.0)
    rows, columns = ((moved.sum((1, axis)) * at).sum(1) - 20 for axis in (3, 2))
    for offset in (rows, columns):
        assert offset.abs().max() <= 4.1 + 1e-4  # 0.1 of 41 pixels
        assert offset.min() < -3.5
        assert offset.max() > 3.5
        assert offset.unique().numel() > 490
    assert torch.corrcoef(torch.stack([rows, columns]))[0, 1].abs() < 0.2


def test_turns_by_degrees_and_scales_by_a_share() -> None:
    x = torch.zeros(400, 1, 41, 41)
    x[:, :, 20, 35] = 1.0  # 15 pixels to the right of the middle
    at = torch.arange(41.0) - 20

    def where(moved: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mass = moved.sum((1, 2, 3))
        return (moved.sum((1, 3)) * at).sum(1) / mass, (moved.sum((1, 2)) * at).sum(1) / mass

    down, right = where(jitter(x, 30, 0, 0))
    angle = torch.atan2(down, right).rad2deg()
    assert 27 < angle.max() < 31
    assert -31 < angle.min() < -27
    torch.testing.assert_close(torch.hypot(down, right), torch.full((400,), 15.0), rtol=0.03, atol=0)
    down, right = where(jitter(x, 0, 0, 0.2))
    assert down.abs().max() < 0.01
    assert 17 < right.max() < 18.5
    assert 11.5 < right.min() < 13


def test_what_comes_in_is_zero_and_a_seed_repeats() -> None:
    x = torch.ones(50, 1, 8, 8)
    torch.manual_seed(1)
    moved = jitter(x, shift=0.5)
    assert moved.min() == 0
    assert moved.max() <= 1 + 1e-6
    torch.manual_seed(1)
    assert torch.equal(jitter(x, shift=0.5), moved)
    assert jitter(x.half().bfloat16()).dtype == torch.bfloat16
    assert jitter(x[:0]).shape == (0, 1, 8, 8)


def test_differentiable() -> None:
    x = torch.rand(2, 1, 5, 5, dtype=torch.float64, requires_grad=True)

    def moved(x: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(3)
        return jitter(x)

    assert torch.autograd.gradcheck(moved, (x,))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.rand(3, 28, 28),), r"x is torch.float32 \[3, 28, 28\]"),
        ((torch.zeros(1, 1, 8, 8, dtype=torch.uint8),), "x is torch.uint8"),
        ((torch.rand(1, 1, 8, 8), -1.0), "degrees is -1.0"),
        ((torch.rand(1, 1, 8, 8), 1.0, math.nan), "shift is nan"),
        ((torch.rand(1, 1, 8, 8), 1.0, 0.1, 1.0), "scale is 1.0 but must be at least 0 and below 1.0"),
    ],
)
def test_bad_input(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        jitter(*arguments)
