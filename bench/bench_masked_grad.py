"""g *= 1 - reserved over a whole model, against torch's own ways of writing it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import fastcl


@pytest.mark.parametrize("mask", ["bool", "float"])
def test_masked_grad(contest: Callable, compiled: Callable, copy_rate: Callable, device, shapes, mask: str) -> None:
    grads = [torch.randn(s, device=device) for s in shapes]
    reserved = [torch.rand(s, device=device) > 0.5 for s in shapes]
    floats = [r.float() for r in reserved]
    free = [1 - f for f in floats]
    given = reserved if mask == "bool" else floats
    n = sum(g.numel() for g in grads)

    def loop() -> None:
        for g, r in zip(grads, floats, strict=True):
            g.mul_(1 - r)

    def fill() -> None:
        for g, r in zip(grads, reserved, strict=True):
            g.masked_fill_(r, 0)

    contenders: dict[str, Any] = {
        "fastcl": lambda: fastcl.ops.masked_grad_(grads, given),
        "loop (1 - m) * g": loop,
        "loop masked_fill_": fill,
        "_foreach_mul_ (mask precomputed)": lambda: torch._foreach_mul_(grads, free),
        **compiled(loop),
    }

    def check(contenders: dict[str, Any]) -> None:
        start = [g.clone() for g in grads]
        want = [g * f for g, f in zip(start, free, strict=True)]
        for call in contenders.values():
            torch._foreach_copy_(grads, start)
            call()
            for g, w in zip(grads, want, strict=True):
                torch.testing.assert_close(g, w)
        torch._foreach_copy_(grads, start)

    bytes_moved = n * (9 if mask == "bool" else 12)
    contest(contenders, check, floor=bytes_moved / copy_rate(device, bytes_moved))


def _parameters(shapes: list[tuple[int, ...]], device: torch.device) -> list[torch.nn.Parameter]:
    params = [torch.nn.Parameter(torch.randn(s, device=device)) for s in shapes]
    for p in params:
        p.grad = torch.randn_like(p)
    return params


def _free_agree(found: list[torch.nn.Parameter], want: list[torch.nn.Parameter], reserved: list[torch.Tensor]) -> None:
    for a, b, r in zip(found, want, reserved, strict=True):
        torch.testing.assert_close(a.detach()[~r], b.detach()[~r], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["Adam", "SGD momentum"])
def test_masked_step(contest: Callable, copy_rate: Callable, device, shapes, kind: str) -> None:
    """A whole optimizer step under a reserved mask, against torch's steps with and without one.

    "fused, no mask" is what protection may cost nothing against; it, and the other two, do not freeze anything: torch's
    moments and weight decay move reserved weights.
    """
    reserved = [torch.rand(s, device=device) > 0.5 for s in shapes]
    floats = [r.float() for r in reserved]
    free = [1 - f for f in floats]
    n = sum(r.numel() for r in reserved)

    def theirs(**options: bool) -> tuple[list[torch.nn.Parameter], torch.optim.Optimizer]:
        params = _parameters(shapes, device)
        if kind == "Adam":
            return params, torch.optim.Adam(params, 1e-3, **options)
        return params, torch.optim.SGD(params, 1e-2, momentum=0.9, **options)

    def mine(form: str) -> tuple[list[torch.nn.Parameter], torch.optim.Optimizer]:
        params = _parameters(shapes, device)
        given = [fastcl.ops.pack_mask(r) for r in reserved] if form == "bits" else reserved
        masks = {} if form == "none" else dict(zip(params, given, strict=True))
        if kind == "Adam":
            return params, fastcl.optim.MaskedAdam(params, 1e-3, reserved=masks)
        return params, fastcl.optim.MaskedSGD(params, 1e-2, momentum=0.9, reserved=masks)

    pairs = {form: mine(form) for form in ("bool", "bits", "none")}
    plain, default, foreach, fused = theirs(), theirs(), theirs(foreach=True), theirs(fused=True)

    def eager() -> None:
        for p, f in zip(default[0], floats, strict=True):
            p.grad.mul_(1 - f)
        default[1].step()

    def multi() -> None:
        torch._foreach_mul_([p.grad for p in foreach[0]], free)
        foreach[1].step()

    contenders: dict[str, Any] = {
        "fastcl": pairs["bool"][1].step,
        "fastcl, packed bits": pairs["bits"][1].step,
        "fastcl, no mask": pairs["none"][1].step,
        "torch fused, no mask": fused[1].step,
        f"eager mask + torch {kind}": eager,
        "_foreach_mul_ + foreach": multi,
        f"torch {kind}, no mask": plain[1].step,
    }

    def check(contenders: dict[str, Any]) -> None:
        everyone = [*(p for p, _ in pairs.values()), plain[0], default[0], foreach[0], fused[0]]
        for params in everyone:
            for p, source in zip(params, plain[0], strict=True):
                p.data.copy_(source.data)
                p.grad.copy_(source.grad)
        start = [p.detach().clone() for p in plain[0]]
        for call in contenders.values():
            call()
        for form in ("bool", "bits"):
            _free_agree(pairs[form][0], plain[0], reserved)
            for p, s, r in zip(pairs[form][0], start, reserved, strict=True):
                assert torch.equal(p.detach()[r], s[r])  # not a bit has moved
        for params in (pairs["none"][0], fused[0], default[0], foreach[0]):
            _free_agree(params, plain[0], reserved)

    bytes_moved = n * (29 if kind == "Adam" else 21)
    contest(contenders, check, floor=bytes_moved / copy_rate(device, bytes_moved))
