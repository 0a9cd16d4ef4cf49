"""g *= 1 - reserved over a whole model, and optimizer steps under a mask, against torch's own ways of writing them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import nn

from fastcl.bench import workloads


@pytest.mark.parametrize("mask", ["bool", "units", "float"])
def test_masked_grad(play: Callable, compiled: Callable, device, shapes, mask: str) -> None:
    play(workloads.masked_grad(device, compiled, shapes, mask))


@pytest.mark.parametrize("kind", ["Adam", "SGD momentum"])
def test_masked_step(play: Callable, device, shapes, kind: str) -> None:
    play(workloads.masked_step(device, shapes, kind))


def generator() -> nn.Sequential:
    layers: list[nn.Module] = [nn.ConvTranspose2d(100, 256, 4), nn.BatchNorm2d(256), nn.ReLU()]
    for a, b in pairwise((256, 128, 64)):
        layers += [nn.ConvTranspose2d(a, b, 4, 2, 1), nn.BatchNorm2d(b), nn.ReLU()]
    return nn.Sequential(*layers, nn.ConvTranspose2d(64, 1, 4, 2, 1))


def mlp() -> nn.Sequential:
    wide = [layer for a in (784, 2048, 2048) for layer in (nn.Linear(a, 2048), nn.ReLU())]
    return nn.Sequential(*wide, nn.Linear(2048, 10))


NETWORKS = {"generator 1.1M": (generator, (8, 100, 1, 1)), "MLP 10M": (mlp, (64, 784))}  # and a batch's shape


@pytest.mark.parametrize("kind", ["Adam", "SGD momentum"])
@pytest.mark.parametrize("network", NETWORKS)
def test_step_in_training(contest: Callable, device, network: str, kind: str) -> None:
    """The step alone, each time after a forward and backward pass of the network that it trains."""
    torch.manual_seed(0)
    make, shape = NETWORKS[network]
    start, x = make().to(device), torch.randn(shape, device=device)
    reserved = [workloads.half_of(p.shape, device, units=False) for p in start.parameters()]
    models = [copy.deepcopy(start) for _ in range(3)]
    mine, fused, default = (list(model.parameters()) for model in models)
    plain = workloads.torch_optimizer(kind, default, lr=1e-4)

    def eager() -> None:
        for p, r in zip(default, reserved, strict=True):
            p.grad.mul_(1 - r.float())
        plain.step()

    contenders = {
        "fastcl": workloads.masked_optimizer(kind, mine, dict(zip(mine, reserved, strict=True)), lr=1e-4).step,
        "torch fused, no mask": workloads.torch_optimizer(kind, fused, lr=1e-4, fused=True).step,
        f"eager mask + torch {kind}": eager,
    }

    def forward_and_backward(model: nn.Module) -> None:
        model.zero_grad()
        model(x).square().mean().backward()

    before = {name: partial(forward_and_backward, model) for name, model in zip(contenders, models, strict=True)}

    def check(contenders: dict[str, Any]) -> None:
        for name, call in contenders.items():
            before[name]()
            call()
        for p, want, s, r in zip(mine, fused, start.parameters(), reserved, strict=True):
            torch.testing.assert_close(p.detach()[r], s.detach()[r], rtol=0, atol=0)  # not a bit has moved
            torch.testing.assert_close(p.detach()[~r], want.detach()[~r], rtol=1e-4, atol=1e-5)

    contest(contenders, check, before=before)
