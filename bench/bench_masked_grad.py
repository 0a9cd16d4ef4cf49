"""g *= 1 - reserved over a whole model, and optimizer steps under a mask, against torch's own ways of writing them."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from fastcl.bench import workloads


@pytest.mark.parametrize("mask", ["bool", "units", "float"])
def test_masked_grad(play: Callable, compiled: Callable, device, shapes, mask: str) -> None:
    play(workloads.masked_grad(device, compiled, shapes, mask))


@pytest.mark.parametrize("kind", ["Adam", "SGD momentum"])
def test_masked_step(play: Callable, device, shapes, kind: str) -> None:
    play(workloads.masked_step(device, shapes, kind))


@pytest.mark.parametrize("kind", ["Adam", "SGD momentum"])
@pytest.mark.parametrize("network", ["generator 1.1M", "MLP 10M"])
def test_step_in_training(play: Callable, device, network: str, kind: str) -> None:
    play(workloads.step_in_training(device, network, kind))
