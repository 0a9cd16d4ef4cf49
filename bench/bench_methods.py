"""Whole steps of methods, against the same steps in plain torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import chain
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fastcl import ops, streams
from fastcl.methods import DGMw
from fastcl.nn import class_loss, crop, frozen


class PlainDGM(DGMw):
    """DGMw as one would write it in torch: eager masks, gradients masked after backward, torch's Adam."""

    def _adam(self, params: Iterable[nn.Parameter]) -> Any:
        return torch.optim.Adam(params, self.lr, self.betas)

    def _masked_adam(self) -> Any:
        g = self.generator
        unpack = [torch.empty(layer.weight.shape, dtype=torch.bool) for layer in g.layers]
        device = g.layers[0].weight.device
        self.free = [
            1 - ops.unpack_mask(layer.reserved(), like.to(device)).float()
            for layer, like in zip(g.layers, unpack, strict=True)
        ]
        params = chain(g.layers.parameters(), g.norms[-1].parameters(), g.outputs[-1].parameters())
        return torch.optim.Adam(params, self.lr, self.betas)

    def _images(self, z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        g, x, used = self.generator, z[:, :, None, None], torch.zeros((), device=z.device)
        for i, (layer, free) in enumerate(zip(g.layers, self.free, strict=True)):
            mask = torch.sigmoid(layer.scale * layer.embedding)
            used = used + (mask * free).sum()
            x = F.conv_transpose2d(x, layer.weight * mask, None, 1 if i == 0 else 2, 0 if i == 0 else 1)
            x = g.norms[-1][i](x).relu()
        total = sum(free.sum() for free in self.free)
        return crop((g.outputs[-1](x).tanh() + 1) / 2, g.input_shape), used / total

    def _generator_step(self, z: torch.Tensor, y: torch.Tensor) -> None:
        self.generator_optimizer.zero_grad()
        fake, sparsity = self._images(z)
        with frozen(self.model):
            value, logits = self.model.judge(fake)
        grown = sum(self.generator.channels) / sum(self.generator.initial)
        loss = self.strength * grown * sparsity - value.mean()
        if len(self.tasks[-1]) > 1:
            loss = loss + class_loss(logits, y, self.classes)
        loss.backward()
        for layer, free in zip(self.generator.layers, self.free, strict=True):
            layer.weight.grad *= free
            s, e = layer.scale, layer.embedding.data
            ratio = self.s_max / s * (torch.cosh((s * e).clamp(-50, 50)) + 1) / (torch.cosh(e) + 1)
            layer.embedding.grad *= ratio
        self.generator_optimizer.step()
        for layer in self.generator.layers:
            layer.embedding.data.clamp_(-self.clamp, self.clamp)


@pytest.mark.parametrize("part", ["generator", "whole"])
@pytest.mark.parametrize("width", [6, 48])
def test_dgm_step(contest: Callable, device: torch.device, width: int, part: str) -> None:
    """A step in the second task of one-class digits, 28 x 28, batches of 64; width 6 is the paper's generator."""
    shape = (1, 28, 28)
    torch.manual_seed(0)
    images, labels = torch.rand(128, *shape), torch.zeros(128, dtype=torch.int64)
    tasks = tuple(
        streams.Task(t, (t,), lambda t=t: (images, labels + t), lambda t=t: (images, labels + t)) for t in range(2)
    )
    stream = streams.Stream("drawn", "split", "class", tasks, 2, shape, 0)

    def ready(kind: type[DGMw]) -> DGMw:
        learner = kind.build(stream, width=width, finish=0, epochs=100)
        learner.model.to(device)
        for task in tasks:
            torch.manual_seed(task.index)
            learner.begin_task(task)
            if task.index == 0:
                learner.observe(images[:64].to(device), labels[:64].to(device))
                with torch.no_grad():
                    for layer in learner.generator.layers:
                        layer.embedding.copy_(torch.randn(layer.embedding.shape))
                learner.end_task([(images.to(device), labels.to(device))])
        return learner

    learners = {"fastcl": ready(DGMw), "plain torch": ready(PlainDGM)}
    x, y = images[:64].to(device), labels[:64].to(device) + 1

    def step(learner: DGMw) -> Callable[[], Any]:
        if part == "whole":
            return lambda: learner.observe(x, y)
        z = learner.generator.latents(y, torch.Generator().manual_seed(1))
        learner.generator.set_scale(2.0)
        return lambda: learner._generator_step(z, y)

    contenders = {name: step(learner) for name, learner in learners.items()}

    def check(contenders: dict[str, Any]) -> None:
        found = []
        for name, call in contenders.items():
            torch.manual_seed(7)
            call()
            found.append([p.detach().clone() for p in learners[name].generator.layers.parameters()])
        for a, b in zip(*found, strict=True):
            # Adam's first step is the gradient's sign: where rounding decides it, weights differ by a whole step
            assert ((a - b).abs() > 1e-4).float().mean() < 0.005

    contest(contenders, check)
