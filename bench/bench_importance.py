"""Penalties and the per-sample accumulation kernels."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable
from typing import Any

import pytest
import torch

import fastcl
from fastcl import ops
from fastcl.bench import workloads


def test_penalty_with_gradient(play: Callable, compiled: Callable, device, shapes) -> None:
    play(workloads.penalty(device, compiled, shapes))


DENSE = [(128, None, 400, 784), (128, 256, 64, 576), (128, 64, 128, 1152), (128, 16, 256, 2304), (64, 16, 512, 4608),
         (32, 128, 768, 3072)]  # fmt: skip


@pytest.mark.parametrize("sizes", DENSE, ids=lambda s: "x".join(map(str, s)))
def test_accumulate_outer(contest: Callable, device, sizes: tuple) -> None:
    """Against the ordinary weight gradient of the same layer (which an importance pass need not compute)."""
    n, p, o, i = sizes
    lead = (n,) if p is None else (n, p)
    grad, activation = torch.randn(*lead, o, device=device), torch.randn(*lead, i, device=device)
    flat_g, flat_a = grad.reshape(-1, o), activation.reshape(-1, i)
    out = torch.zeros(o, i, device=device)
    scratch = torch.empty(o, i, device=device)

    def materialised() -> None:
        if p is None:
            out.addmm_(grad.square().T, activation.square())
        else:
            out.add_(torch.bmm(grad.transpose(1, 2), activation).square_().sum(0))

    contenders = {
        "fastcl": lambda: ops.accumulate_outer_(out, grad, activation, 2),
        "bmm, square, sum" if p else "squares and a GEMM": materialised,
        "ordinary weight gradient": lambda: torch.mm(flat_g.T, flat_a, out=scratch),
    }

    def check(contenders: dict[str, Any]) -> None:
        results = []
        for name, call in contenders.items():
            if name != "ordinary weight gradient":  # another quantity: the price to be compared with
                out.zero_()
                call()
                results.append(out.clone())
        torch.testing.assert_close(results[0], results[1], rtol=1e-3, atol=1e-3)
        out.zero_()

    contest(contenders, check)


CONV = [(128, 64, 32, 64, 3), (128, 128, 16, 128, 3), (128, 256, 8, 256, 3), (128, 512, 4, 512, 3),
        (128, 64, 16, 128, 1)]  # fmt: skip


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("sizes", CONV, ids=lambda s: "x".join(map(str, s)))
def test_accumulate_conv(contest: Callable, device, sizes: tuple, layout: str) -> None:
    n, c, side, o, k = sizes
    form = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    x = torch.randn(n, c, side, side, device=device).contiguous(memory_format=form)
    w = torch.randn(o, c, k, k, device=device).contiguous(memory_format=form)
    grad = torch.randn(n, o, side, side, device=device).contiguous(memory_format=form)
    out, pad = torch.zeros_like(w), k // 2
    few = slice(0, 4)  # unfold and bmm hold [N, O, C k k]: compared on four samples, not timed

    def plain() -> torch.Tensor:
        args = (None, [1, 1], [pad, pad], [1, 1], False, [0, 0], 1, [False, True, False])
        return torch.ops.aten.convolution_backward(grad, x, w, *args)[1]

    contenders = {
        "fastcl": lambda: ops.accumulate_conv_(out, grad, x, [1, 1], [pad, pad], [1, 1], 1, 2),
        "ordinary weight gradient": plain,
    }

    def check(contenders: dict[str, Any]) -> None:
        ops.accumulate_conv_(out, grad[few], x[few], [1, 1], [pad, pad], [1, 1], 1, 2)
        columns = torch.nn.functional.unfold(x[few], k, padding=pad)
        want = torch.bmm(grad[few].flatten(2), columns.transpose(1, 2)).square().sum(0)
        torch.testing.assert_close(out.reshape(o, -1), want, rtol=1e-3, atol=1e-2)
        out.zero_()

    contest(contenders, check)


def test_ewc_step(contest: Callable, device) -> None:
    """One training step of the split-MNIST MLP with EWC, whole."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(
        torch.nn.Linear(784, 400), torch.nn.ReLU(), torch.nn.Linear(400, 400), torch.nn.ReLU(), torch.nn.Linear(400, 10)
    ).to(device)
    x, y = torch.randn(128, 784, device=device), torch.randint(0, 10, (128,), device=device)
    ewc = fastcl.EWC(net, 100.0)
    ewc.consolidate([(x, y)])
    with torch.no_grad():
        for p in net.parameters():
            p += 0.01 * torch.randn_like(p)
    params = dict(net.named_parameters())

    def loss() -> torch.Tensor:
        net.zero_grad()
        return torch.nn.functional.cross_entropy(net(x), y)

    def fused() -> None:
        loss().backward()
        ewc.add_gradients()

    def eager() -> None:
        total = loss()
        for name, p in params.items():
            total = total + 50.0 * (ewc.importances[name] * (p - ewc.anchors[name]).square()).sum()
        total.backward()

    def check(contenders: dict[str, Any]) -> None:
        grads = []
        for name in ("fastcl", "eager penalty"):
            contenders[name]()
            grads.append([p.grad.clone() for p in params.values()])
        for a, b in zip(*grads, strict=True):
            torch.testing.assert_close(a, b)

    contest({"fastcl": fused, "eager penalty": eager, "no penalty": lambda: loss().backward()}, check)


class _Block(torch.nn.Module):
    def __init__(self, a: int, b: int, stride: int) -> None:
        super().__init__()
        conv, norm = torch.nn.Conv2d, torch.nn.BatchNorm2d
        self.body = torch.nn.Sequential(
            conv(a, b, 3, stride, 1, bias=False), norm(b), torch.nn.ReLU(), conv(b, b, 3, 1, 1, bias=False), norm(b)
        )
        same = a == b and stride == 1
        self.skip = torch.nn.Identity() if same else torch.nn.Sequential(conv(a, b, 1, stride, bias=False), norm(b))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.body(x) + self.skip(x))


def _resnet18() -> torch.nn.Module:
    layers: list[torch.nn.Module] = [
        torch.nn.Conv2d(3, 64, 3, 1, 1, bias=False),
        torch.nn.BatchNorm2d(64),
        torch.nn.ReLU(),
    ]
    width = 64
    for stage, out in enumerate((64, 128, 256, 512)):
        for block in range(2):
            layers.append(_Block(width, out, 2 if stage and not block else 1))
            width = out
    return torch.nn.Sequential(*layers, torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(512, 10))


class _Encoder(torch.nn.Module):
    """Two pre-norm blocks with single-head attention written out, 64 tokens of 128."""

    def __init__(self) -> None:
        super().__init__()
        d = 128
        self.embed = torch.nn.Linear(32, d)
        self.qkv = torch.nn.ModuleList(torch.nn.Linear(d, 3 * d) for _ in range(2))
        self.out = torch.nn.ModuleList(torch.nn.Linear(d, d) for _ in range(2))
        self.norms = torch.nn.ModuleList(torch.nn.LayerNorm(d) for _ in range(4))
        self.up = torch.nn.ModuleList(torch.nn.Linear(d, 4 * d) for _ in range(2))
        self.down = torch.nn.ModuleList(torch.nn.Linear(4 * d, d) for _ in range(2))
        self.head = torch.nn.Linear(d, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.embed(x)
        for k in range(2):
            q, key, v = self.qkv[k](self.norms[2 * k](h)).chunk(3, -1)
            h = h + self.out[k](torch.softmax(q @ key.transpose(1, 2) / 128**0.5, -1) @ v)
            h = h + self.down[k](torch.relu(self.up[k](self.norms[2 * k + 1](h))))
        return self.head(h.mean(1))


NETWORKS: dict[str, tuple[Callable[[], torch.nn.Module], tuple[int, ...]]] = {
    "MLP 0.5M": (workloads.mlp, (128, 1, 28, 28)),
    "4-conv net": (workloads.convnet, (128, 3, 32, 32)),
    "encoder, 64 tokens": (_Encoder, (128, 64, 32)),
    "ResNet-18": (_resnet18, (128, 3, 32, 32)),
}


def _backpack(net: torch.nn.Module, batches: list[Any], name: str) -> dict[str, Any]:
    """BackPACK's SumGradSquared where it is installed and can read the network (plain sequences of layers)."""
    if name not in ("MLP 0.5M", "4-conv net") or importlib.util.find_spec("backpack") is None:
        return {}
    import backpack

    model = backpack.extend(copy.deepcopy(net))
    criterion = backpack.extend(torch.nn.CrossEntropyLoss(reduction="sum"))

    def run() -> None:
        for a, b in batches:
            model.zero_grad()
            with backpack.backpack(backpack.extensions.SumGradSquared()):
                criterion(model(a), b).backward()

    return {"BackPACK SumGradSquared": run}


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("name", NETWORKS)
def test_fisher(play: Callable, device, name: str, layout: str) -> None:
    """The exact empirical Fisher of one batch of 128, against a plain forward and backward pass of the same batch."""
    make, shape = NETWORKS[name]
    if layout == "channels_last" and name not in ("4-conv net", "ResNet-18"):
        pytest.skip("no convolutions")
    form = torch.channels_last if layout == "channels_last" and len(shape) == 4 else torch.contiguous_format
    torch.manual_seed(0)
    net = make().to(device, memory_format=form).eval()
    x = torch.randn(shape, device=device).contiguous(memory_format=form)
    y = torch.randint(0, 10, (len(x),), device=device)
    n_batches = 32 if name.startswith("MLP") else 1  # a data set's worth of a small network
    contest = workloads.fisher(net, x, y, n_batches, one_by_one=name != "ResNet-18")
    contest.contenders |= _backpack(net, [(x, y)] * n_batches, name)
    play(contest)


def test_si_step(contest: Callable, compiled: Callable, copy_rate: Callable, device, shapes) -> None:
    """SI's path integral of one step: what a loop over parameters writes, against one call."""
    params, before, grads = ([torch.randn(s, device=device) for s in shapes] for _ in range(3))
    omegas = [torch.zeros(s, device=device) for s in shapes]

    def loop(omegas: list[torch.Tensor] = omegas) -> None:
        for w, g, p, b in zip(omegas, grads, params, before, strict=True):
            w -= g * (p - b)

    def foreach() -> None:
        moved = torch._foreach_sub(params, before)
        torch._foreach_addcmul_(omegas, grads, moved, value=-1)

    def fused() -> None:
        fastcl.ops.accumulate_path_(omegas, grads, params, before)

    def check(contenders: dict[str, Any]) -> None:
        want = [w - g * (p - b) for w, g, p, b in zip(omegas, grads, params, before, strict=True)]
        fused()
        for a, b in zip(omegas, want, strict=True):
            torch.testing.assert_close(a, b)

    n_bytes = 20 * sum(p.numel() for p in params)
    contest(
        {"fastcl": fused, "eager": loop, "_foreach_": foreach, **compiled(loop)},
        check,
        n_bytes / copy_rate(device, n_bytes),
    )


def test_consolidation(contest: Callable, compiled: Callable, copy_rate: Callable, device, shapes) -> None:
    """F = gamma F + F_new, checked for NaN and negative values; the others do not check."""
    importances, fresh = ([torch.rand(s, device=device) for s in shapes] for _ in range(2))

    def eager() -> list[torch.Tensor]:
        return [0.9 * f + new for f, new in zip(importances, fresh, strict=True)]

    def foreach() -> None:
        torch._foreach_mul_(importances, 0.9)
        torch._foreach_add_(importances, fresh)

    def fused() -> None:
        fastcl.ops.merge_importances_(importances, fresh, old_share=0.9)

    def check(contenders: dict[str, Any]) -> None:
        want = eager()
        fused()
        for a, b in zip(importances, want, strict=True):
            torch.testing.assert_close(a, b)

    n_bytes = 16 * sum(f.numel() for f in importances)
    contest(
        {"fastcl": fused, "eager": eager, "_foreach_": foreach, **compiled(eager)},
        check,
        n_bytes / copy_rate(device, n_bytes),
    )
