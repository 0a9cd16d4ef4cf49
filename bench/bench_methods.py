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
from fastcl.methods import HAT, DGMw, MeRGANJoint
from fastcl.nn import class_loss, crop, frozen
from fastcl.ops._chwn import conv


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

    def begin_task(self, task: Any) -> None:
        self.model._features = lambda x: self.model.trunk(2 * x - 1)  # torch's convolutions
        super().begin_task(task)

    def observe(self, x: torch.Tensor, y: torch.Tensor) -> float:
        self._anneal(len(y))
        fake = self.made(self.generator.latents(y))
        loss = self._discriminator_step(x, y, fake.detach())
        self._generator_step(fake, y)
        return loss

    def made(self, z: torch.Tensor) -> torch.Tensor:
        g, x, used = self.generator, z[:, :, None, None], torch.zeros((), device=z.device)
        for i, (layer, free) in enumerate(zip(g.layers, self.free, strict=True)):
            mask = torch.sigmoid(layer.scale * layer.embedding)
            used = used + (mask * free).sum()
            x = F.conv_transpose2d(x, layer.weight * mask, None, 1 if i == 0 else 2, 0 if i == 0 else 1)
            x = g.norms[-1][i](x).relu()
        self.used = used / sum(free.sum() for free in self.free)
        return crop((g.outputs[-1](x).tanh() + 1) / 2, g.input_shape)

    def _generator_step(self, fake: torch.Tensor, y: torch.Tensor) -> None:
        self.generator_optimizer.zero_grad()
        with frozen(self.model):
            value, logits = self.model.judge(fake)
        grown = sum(self.generator.channels) / sum(self.generator.initial)
        loss = self.strength * grown * self.used - value.mean()
        self.used = None  # its graph, kept, would know the weights before they grow
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
        made = getattr(learner, "made", learner.generator)
        return lambda: learner._generator_step(made(z), y)

    contenders = {name: step(learner) for name, learner in learners.items()}

    def check(contenders: dict[str, Any]) -> None:
        found, (first, second) = [], learners.values()
        for part in ("model", "generator"):  # their first step, on the way here, was rounded otherwise
            getattr(second, part).load_state_dict(getattr(first, part).state_dict())
        for name, call in contenders.items():
            torch.manual_seed(7)
            call()
            found.append([p.detach().clone() for p in learners[name].generator.layers.parameters()])
        for a, b in zip(*found, strict=True):
            # Adam's first step is the gradient's sign: where rounding decides it, weights differ by a whole step
            assert ((a - b).abs() > 1e-4).float().mean() < 0.02

    contest(contenders, check)


@pytest.mark.parametrize("width", [16, 32, 48, 64])
def test_precision(contest: Callable, device: torch.device, width: int) -> None:
    """A whole step of MeRGAN's joint retraining in its second task; "fastcl" is `auto`, as fastcl.nn.mixed picks."""
    images, labels = torch.rand(64, 1, 28, 28).to(device), torch.zeros(64, dtype=torch.int64, device=device)
    tasks = tuple(
        streams.Task(t, (t,), lambda t=t: (images, labels + t), lambda t=t: (images, labels + t)) for t in range(2)
    )
    stream = streams.Stream("drawn", "split", "class", tasks, 2, (1, 28, 28), 0)

    def step(precision: str, layout: torch.memory_format = torch.contiguous_format) -> Callable[[], float]:
        options = {"width": width, "discriminator_width": width, "finish": 0, "epochs": 100}
        learner = MeRGANJoint.build(stream, precision=precision, **options)
        learner.model.to(device, memory_format=layout)
        torch.manual_seed(0)
        learner.begin_task(tasks[0])
        learner.observe(images, labels)
        learner.end_task([(images, labels)])
        learner.begin_task(tasks[1])
        return lambda: learner.observe(images, labels + 1)

    contenders = {
        "fastcl": step("auto"),
        "float32": step("float32"),
        "bfloat16": step("bfloat16"),
        "bfloat16, channels_last": step("bfloat16", torch.channels_last),
    }

    def check(contenders: dict[str, Callable[[], float]]) -> None:
        losses = []
        for call in contenders.values():
            torch.manual_seed(1)
            losses.append(call())
        assert max(losses) - min(losses) < 0.1 * max(losses)  # of the class head: it is another precision

    contest(contenders, check)


@pytest.mark.parametrize(
    ("channels", "size", "outputs"), [(1, 28, 16), (16, 14, 32), (32, 7, 64)], ids=["first", "second", "third"]
)
def test_convolution(contest: Callable, device: torch.device, channels: int, size: int, outputs: int) -> None:
    """A discriminator's convolution, 5 x 5 with stride 2, of 64 images: forward, and backward to input and weight."""
    torch.manual_seed(0)
    x = torch.randn(channels, size, size, 64, device=device)
    weight = torch.randn(outputs, channels, 5, 5, device=device)
    images = x.permute(3, 0, 1, 2).contiguous().requires_grad_()
    x.requires_grad_()
    weight.requires_grad_()
    above = torch.randn_like(conv(x, weight, 2, 2))
    above_images = above.permute(3, 0, 1, 2).contiguous()

    def ours() -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(conv(x, weight, 2, 2), [x, weight], above)

    def plain() -> tuple[torch.Tensor, ...]:
        of_x, of_weight = torch.autograd.grad(F.conv2d(images, weight, None, 2, 2), [images, weight], above_images)
        return of_x.permute(1, 2, 3, 0), of_weight

    def check(contenders: dict[str, Any]) -> None:
        for a, b in zip(*(call() for call in contenders.values()), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-2)

    contest({"fastcl": ours, "plain torch": plain}, check)


class PlainHAT(HAT):
    """HAT as its authors' code and hat-cl write it: eager gates, gradients masked and compensated after backward."""

    def begin_task(self, task: Any) -> None:
        super().begin_task(task)
        rest = [p for p in self.model.parameters() if all(p is not layer.embedding for layer in self.layers)]
        embeddings = {"params": [layer.embedding for layer in self.layers], "lr": 1e-2}
        self.plain = torch.optim.Adam([{"params": rest}, embeddings], 1e-3)
        self.free = {}
        for p, r in self._reserved().items():
            if isinstance(r, tuple):
                rows, columns = r
                r = rows.unsqueeze(1).expand_as(p) if columns is None else torch.minimum(rows.unsqueeze(1), columns)
            self.free[p] = 1 - r.float()

    def observe(self, x: torch.Tensor, y: torch.Tensor) -> float:
        s, h, used, total = 5.0, x.flatten(1), 0.0, 0.0
        for layer in self.layers:
            gate = torch.sigmoid(s * layer.embedding)
            h = F.linear(h, layer.weight, layer.bias).relu() * gate
            free = self.free[layer.bias]
            used, total = used + (gate * free).sum(), total + free.sum()
        own = torch.tensor(self.tasks[-1], device=y.device)
        entropy = F.cross_entropy(self.head(h)[:, own], torch.searchsorted(own, y))
        loss = entropy + self.strength * used / total
        self.plain.zero_grad()
        loss.backward()
        for p, free in self.free.items():
            p.grad *= free
        for layer in self.layers:
            e = layer.embedding.data
            layer.embedding.grad *= self.s_max / s * (torch.cosh((s * e).clamp(-50, 50)) + 1) / (torch.cosh(e) + 1)
        self.plain.step()
        for layer in self.layers:
            layer.embedding.data.clamp_(-self.clamp, self.clamp)
        return loss.item()


@pytest.mark.parametrize("hidden", [(400, 400), (2000, 2000)])
def test_hat_step(contest: Callable, device: torch.device, monkeypatch: Any, hidden: tuple[int, ...]) -> None:
    """A step of HAT's MLP in the second of two tasks, batches of 64, s = 5 (later 1 - m rounds to 0 in eager code)."""
    monkeypatch.setattr("fastcl.methods.hat.hat_scale", lambda *_: 5.0)
    torch.manual_seed(0)
    images, labels = torch.rand(64, 1, 28, 28), torch.randint(0, 2, (64,))
    tasks = tuple(
        streams.Task(t, (2 * t, 2 * t + 1), lambda t=t: (images, labels + 2 * t), lambda t=t: (images, labels + 2 * t))
        for t in range(2)
    )
    stream = streams.Stream("drawn", "split", "task", tasks, 4, (1, 28, 28), 0)
    x, y = images.to(device), labels.to(device)

    def ready(kind: type[HAT]) -> HAT:
        learner = kind.build(stream, hidden=hidden)
        learner.model.to(device)
        learner.begin_task(tasks[0])
        with torch.no_grad():
            for layer in learner.layers:
                layer.embedding.copy_(torch.randn(layer.embedding.shape, generator=torch.Generator().manual_seed(1)))
        learner.end_task([(x, y)])
        torch.manual_seed(2)
        learner.begin_task(tasks[1])
        return learner

    learners = {"fastcl": ready(HAT), "plain torch": ready(PlainHAT)}
    contenders = {name: lambda learner=learner: learner.observe(x, y + 2) for name, learner in learners.items()}

    def check(contenders: dict[str, Any]) -> None:
        before = [p.detach().clone() for p in learners["fastcl"].model.parameters()]
        for call in contenders.values():
            call()
        found = [[p.detach() for p in learner.model.parameters()] for learner in learners.values()]
        assert any(not torch.equal(a, b) for a, b in zip(before, found[0], strict=True))
        for a, b in zip(*found, strict=True):
            # Adam's first step is the gradient's sign: where rounding decides it, weights differ by a whole step
            assert ((a - b).abs() > 1e-4).float().mean() < 0.005

    contest(contenders, check)
