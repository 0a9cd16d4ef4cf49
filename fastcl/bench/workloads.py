"""One function a hot path: contenders, what compares them, the bytes that must move. bench/ runs the same ones."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import importance, ops, optim
from .race import Call, Compiled, Contest

Shapes = list[tuple[int, ...]]
Params = Iterable[nn.Parameter]
close = torch.testing.assert_close


def _linear(*sizes: int) -> Shapes:
    return [s for a, b in pairwise(sizes) for s in ((b, a), (b,))]


def _resnet18() -> Shapes:
    shapes: Shapes = [(64, 3, 3, 3), (64,), (64,)]
    width = 64
    for stage, out in enumerate((64, 128, 256, 512)):
        for block in range(2):
            shapes += [(out, width, 3, 3), (out,), (out,), (out, out, 3, 3), (out,), (out,)]
            if stage and not block:
                shapes += [(out, width, 1, 1), (out,), (out,)]
            width = out
    return [*shapes, (10, 512), (10,)]


SHAPES: dict[str, Shapes] = {
    "200 tiny tensors": [(16,)] * 200,
    "MLP 0.5M": _linear(784, 400, 400, 10),
    "DCGAN 1.5M": [(128, 256, 4, 4), (256, 128, 4, 4), (128, 64, 4, 4), (64, 3, 4, 4), (256, 100, 4, 4)],
    "DCGAN 9.9M": [(100, 512, 4, 4), (512, 512, 4, 4), (512, 256, 4, 4), (256, 512, 4, 4), (512, 64, 4, 4)],
    "ResNet-18 11.2M": _resnet18(),
}


def masked_grad(device: torch.device, compiled: Compiled, shapes: Shapes, mask: str = "bool") -> Contest:
    """g *= 1 - reserved over a whole model, against torch's own ways of writing it; `units`: bools, alike in a row."""
    grads = [torch.randn(s, device=device) for s in shapes]
    reserved = [half_of(s, device, units=mask == "units") for s in shapes]
    floats = [r.float() for r in reserved]
    free = [1 - f for f in floats]
    given = floats if mask == "float" else reserved

    def loop() -> None:
        for g, r in zip(grads, floats, strict=True):
            g.mul_(1 - r)

    def fill() -> None:
        for g, r in zip(grads, reserved, strict=True):
            g.masked_fill_(r, 0)

    def check(contenders: dict[str, Call]) -> None:
        start = [g.clone() for g in grads]
        want = [g * f for g, f in zip(start, free, strict=True)]
        for call in contenders.values():
            torch._foreach_copy_(grads, start)
            call()
            close(grads, want)
        torch._foreach_copy_(grads, start)

    contenders: dict[str, Call] = {
        "fastcl": lambda: ops.masked_grad_(grads, given),
        "loop (1 - m) * g": loop,
        "loop masked_fill_": fill,
        "_foreach_mul_ (mask precomputed)": lambda: torch._foreach_mul_(grads, free),
        **compiled(loop),
    }
    return Contest(contenders, check, sum(g.numel() for g in grads) * {"units": 5, "bool": 9, "float": 12}[mask])


def half_of(shape: tuple[int, ...], device: torch.device, *, units: bool) -> Tensor:
    """A mask that reserves half the weights (DGMw), or all weights of half the units (DGMa, HAT)."""
    places = shape[:1] + (1,) * (len(shape) - 1) if units else shape
    return (torch.rand(places, device=device) > 0.5).expand(shape).contiguous()


def torch_optimizer(kind: str, params: Params, **options: Any) -> torch.optim.Optimizer:
    """Of the kind "Adam" or "SGD momentum"; it freezes nothing."""
    if kind == "Adam":
        return torch.optim.Adam(params, **{"lr": 1e-3, **options})
    return torch.optim.SGD(params, **{"lr": 1e-2, "momentum": 0.9, **options})


def masked_optimizer(kind: str, params: Params, masks: dict[nn.Parameter, Tensor], **options: Any) -> Any:
    """:func:`torch_optimizer`'s counterpart with reserved weights."""
    if kind == "Adam":
        return optim.MaskedAdam(params, **{"lr": 1e-3, **options}, reserved=masks)
    return optim.MaskedSGD(params, **{"lr": 1e-2, "momentum": 0.9, **options}, reserved=masks)


def masked_step(device: torch.device, shapes: Shapes, kind: str = "Adam") -> Contest:
    """A whole optimizer step under a reserved mask, against torch's steps with and without one.

    "fused, no mask" is what protection may cost nothing against; it, and the other two, do not freeze anything: torch's
    moments and weight decay move reserved weights. "units": half the units are reserved, not half of each unit.
    """
    reserved = [half_of(s, device, units=False) for s in shapes]
    of_units = [half_of(s, device, units=True) for s in shapes]
    floats = [r.float() for r in reserved]
    free = [1 - f for f in floats]

    def parameters() -> list[nn.Parameter]:
        params = [nn.Parameter(torch.randn(s, device=device)) for s in shapes]
        for p in params:
            p.grad = torch.randn_like(p)
        return params

    def theirs(**options: bool) -> tuple[list[nn.Parameter], torch.optim.Optimizer]:
        params = parameters()
        return params, torch_optimizer(kind, params, **options)

    def mine(form: str) -> tuple[list[nn.Parameter], torch.optim.Optimizer]:
        params = parameters()
        given = {"bits": [ops.pack_mask(r) for r in reserved], "units": of_units}.get(form, reserved)
        masks = {} if form == "none" else dict(zip(params, given, strict=True))
        return params, masked_optimizer(kind, params, masks)

    pairs = {form: mine(form) for form in ("bool", "bits", "units", "none")}
    plain, default, foreach, fused = theirs(), theirs(), theirs(foreach=True), theirs(fused=True)

    def eager() -> None:
        for p, f in zip(default[0], floats, strict=True):
            p.grad.mul_(1 - f)  # type: ignore[union-attr]
        default[1].step()

    def multi() -> None:
        torch._foreach_mul_([p.grad for p in foreach[0]], free)  # type: ignore[misc]
        foreach[1].step()

    def check(contenders: dict[str, Call]) -> None:
        everyone = [*(p for p, _ in pairs.values()), plain[0], default[0], foreach[0], fused[0]]
        for params in everyone:
            for p, source in zip(params, plain[0], strict=True):
                p.data.copy_(source.data)
                p.grad.copy_(source.grad)  # type: ignore[union-attr]
        start = [p.detach().clone() for p in plain[0]]
        for call in contenders.values():
            call()
        for form, masks in (("bool", reserved), ("bits", reserved), ("units", of_units)):
            for p, s, r in zip(pairs[form][0], start, masks, strict=True):
                close(p.detach()[r], s[r], rtol=0, atol=0)  # not a bit has moved
        for params in everyone:
            masks = of_units if params is pairs["units"][0] else reserved
            for p, want, r in zip(params, plain[0], masks, strict=True):
                close(p.detach()[~r], want.detach()[~r], rtol=1e-4, atol=1e-5)

    contenders: dict[str, Call] = {
        "fastcl": pairs["bool"][1].step,
        "fastcl, packed bits": pairs["bits"][1].step,
        "fastcl, units": pairs["units"][1].step,
        "fastcl, no mask": pairs["none"][1].step,
        "torch fused, no mask": fused[1].step,
        f"eager mask + torch {kind}": eager,
        "_foreach_mul_ + foreach": multi,
        f"torch {kind}, no mask": plain[1].step,
    }
    return Contest(contenders, check, sum(r.numel() for r in reserved) * (29 if kind == "Adam" else 21))


def masked_weight(device: torch.device, compiled: Compiled, n: int) -> Contest:
    """DGMw's layer: w o sigmoid(s e) with its regulariser's numerator, forward and backward."""
    rows = n // 100
    w, e = (torch.randn(rows, 100, device=device, requires_grad=True) for _ in range(2))
    reserved = torch.rand(rows, 100, device=device) > 0.5
    free, upstream = (~reserved).float(), torch.randn(rows, 100, device=device)

    def eager() -> tuple[Tensor, Tensor]:
        mask = torch.sigmoid(3.0 * e)
        return w * mask, (mask * free).sum()

    def with_gradients(forward: Call) -> tuple[Tensor, ...]:
        out, kept = forward()
        return torch.autograd.grad((out, kept), (w, e), (upstream, torch.ones_like(kept)))

    def eager_reserved(forward: Call = eager) -> tuple[Tensor, ...]:
        grad_w, grad_e = with_gradients(forward)
        return grad_w * free, grad_e

    def check(contenders: dict[str, Call]) -> None:
        want = eager_reserved()
        for call in contenders.values():
            close(call(), want, rtol=1e-4, atol=1e-5)

    contenders: dict[str, Call] = {
        "fastcl": lambda: with_gradients(lambda: ops.masked_weight_kept(w, e, 3.0, reserved=reserved)),
        "eager": eager_reserved,
        **{name: (lambda f=f: eager_reserved(f)) for name, f in compiled(eager).items()},
    }
    return Contest(contenders, check, 34 * n)


def penalty(device: torch.device, compiled: Compiled, shapes: Shapes, strength: float = 2.0) -> Contest:
    """What a step of EWC adds: the penalty's value and its gradient on top of the loss's."""
    params = [torch.randn(s, device=device, requires_grad=True) for s in shapes]
    anchors = [torch.randn(s, device=device) for s in shapes]
    importances = [torch.rand(s, device=device) for s in shapes]
    grads = [torch.zeros(s, device=device) for s in shapes]
    for p, g in zip(params, grads, strict=True):
        p.grad = g

    def value() -> Tensor:
        terms = [(f * (p - a).square()).sum() for p, a, f in zip(params, anchors, importances, strict=True)]
        return 0.5 * strength * torch.stack(terms).sum()

    def autograd() -> Tensor:
        loss = value()
        loss.backward()
        return loss.detach()

    @torch.no_grad()
    def by_hand() -> Tensor:
        total = torch.zeros((), device=device)
        for p, a, f, g in zip(params, anchors, importances, grads, strict=True):
            drift = p - a
            slope = strength * f * drift
            g += slope
            total = total + 0.5 * (slope * drift).sum()
        return total

    @torch.no_grad()
    def foreach() -> Tensor:
        drift = torch._foreach_sub(params, anchors)
        slope = torch._foreach_mul(importances, drift)
        torch._foreach_mul_(slope, strength)
        torch._foreach_add_(grads, slope)
        return 0.5 * torch.stack([(s * d).sum() for s, d in zip(slope, drift, strict=True)]).sum()

    @torch.no_grad()
    def fused(check: bool) -> Tensor:
        return ops.quadratic_penalty_grad_(grads, params, anchors, importances, strength, check=check)

    def check(contenders: dict[str, Call]) -> None:
        want_value = value().detach()
        want = list(torch.autograd.grad(value(), params))
        for call in contenders.values():
            for g in grads:
                g.zero_()
            close(call(), want_value, rtol=1e-4, atol=0)
            close(grads, want)

    contenders: dict[str, Call] = {
        "fastcl": lambda: fused(False),
        "fastcl, importances checked": lambda: fused(True),
        "eager autograd": autograd,
        "eager by hand": by_hand,
        "_foreach_": foreach,
        **compiled(by_hand),
    }
    return Contest(contenders, check, 20 * sum(p.numel() for p in params))


def mlp() -> nn.Module:
    """Split MNIST's network."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(784, 400), nn.ReLU(), nn.Linear(400, 400), nn.ReLU(), nn.Linear(400, 10)
    )


def convnet() -> nn.Module:
    """Four convolutions for images of 32 x 32."""
    layers: list[nn.Module] = []
    for a, b in ((3, 32), (32, 64), (64, 128), (128, 128)):
        layers += [nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(512, 10))


def fisher(net: nn.Module, x: Tensor, y: Tensor, n_batches: int = 1, one_by_one: bool = True) -> Contest:
    """The exact empirical Fisher of batches, against a plain forward and backward pass of the same ones."""
    batches = [(x, y)] * n_batches

    def plain() -> None:
        for a, b in batches:
            net.zero_grad()
            F.cross_entropy(net(a), b).backward()

    def vmapped() -> dict[str, Tensor]:
        params = {k: v.detach() for k, v in net.named_parameters()}

        def loss(values: dict[str, Tensor], a: Tensor, b: Tensor) -> Tensor:
            return F.cross_entropy(torch.func.functional_call(net, values, (a[None],)), b[None])

        grads = torch.func.vmap(torch.func.grad(loss), (None, 0, 0), chunk_size=16)(params, x, y)
        return {k: g.square().mean(0) for k, g in grads.items()}

    def sample_by_sample() -> None:  # EWC's usual loop
        sums = [torch.zeros_like(p) for p in net.parameters()]
        for a, b in batches:
            for n in range(len(a)):
                loss = F.cross_entropy(net(a[n : n + 1]), b[n : n + 1])
                for total, g in zip(sums, torch.autograd.grad(loss, list(net.parameters())), strict=True):
                    total.addcmul_(g, g)

    def check(contenders: dict[str, Call]) -> None:
        found, want = contenders["fastcl"](), vmapped()
        for key, value in want.items():
            close(found[key], value, rtol=1e-3, atol=1e-4 * value.max().item())

    contenders: dict[str, Call] = {
        "fastcl": lambda: importance.fisher_diagonal(net, batches),
        "plain forward + backward": plain,
        **({"sample by sample": sample_by_sample} if one_by_one else {}),
        "batch gradient squared (not the Fisher)": lambda: importance.fisher_diagonal(net, batches, kind="batched"),
        "torch.func, chunks of 16": lambda: [vmapped() for _ in batches],
    }
    return Contest(contenders, check)


def soft_threshold(device: torch.device, compiled: Compiled, shapes: Shapes) -> Contest:
    """Soft threshold over a whole model."""
    tensors = [torch.randn(s, device=device) for s in shapes]

    def loop() -> None:
        for w in tensors:
            w.copy_(torch.sign(w) * torch.clamp(w.abs() - 1e-6, min=0))

    def softshrink() -> None:
        for w in tensors:
            w.copy_(F.softshrink(w, 1e-6))

    def foreach() -> None:
        size = torch._foreach_abs(tensors)
        torch._foreach_sub_(size, 1e-6)
        torch._foreach_clamp_min_(size, 0)
        torch._foreach_mul_(size, torch._foreach_sign(tensors))
        torch._foreach_copy_(tensors, size)

    def check(contenders: dict[str, Call]) -> None:
        start = [t.clone() for t in tensors]
        for call in contenders.values():
            torch._foreach_copy_(tensors, start)
            call()
            close(tensors, [F.softshrink(s, 1e-6) for s in start])

    contenders: dict[str, Call] = {
        "fastcl": lambda: ops.soft_threshold_(tensors, 1e-6),
        "eager": loop,
        "softshrink": softshrink,
        "_foreach_": foreach,
        **compiled(loop),
    }
    return Contest(contenders, check, 8 * sum(t.numel() for t in tensors))
