"""Plain torch form of csrc/importance."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _check


def quadratic_penalty(
    params: list[Tensor],
    anchors: list[Tensor],
    importances: list[Tensor],
    strength: float,
    check: bool = True,
) -> Tensor:
    _check_problem("quadratic_penalty", params, anchors, importances, strength, check)
    total = sum(
        (f.to(_wide(p)).double() * (p.double() - a.double()).square()).sum()
        for p, a, f in zip(params, anchors, importances, strict=True)
    )
    return _value(total, params, strength)


def quadratic_penalty_backward(
    grad_value: Tensor,
    params: list[Tensor],
    anchors: list[Tensor],
    importances: list[Tensor],
    strength: float,
) -> list[Tensor]:
    _check_problem("quadratic_penalty_backward", params, anchors, importances, strength, False)
    return [
        (grad_value.to(_wide(p)) * _slope(p, a, f, strength)).to(p.dtype)
        for p, a, f in zip(params, anchors, importances, strict=True)
    ]


def quadratic_penalty_grad_(
    grads: list[Tensor],
    params: list[Tensor],
    anchors: list[Tensor],
    importances: list[Tensor],
    strength: float,
    check: bool = True,
) -> Tensor:
    op = "quadratic_penalty_grad_"
    _check.lengths(op, "grads", len(grads), "params", len(params))
    for i, (g, p) in enumerate(zip(grads, params, strict=True)):
        _check.output(op, f"grads[{i}]", g)
        _check.like(op, f"grads[{i}]", g, f"params[{i}]", p, dtype=True)
    _check.distinct(op, "grads", grads, params=params, anchors=anchors, importances=importances)
    _check_problem(op, params, anchors, importances, strength, check)
    value = quadratic_penalty(params, anchors, importances, strength, False)
    for g, p, a, f in zip(grads, params, anchors, importances, strict=True):
        g.copy_(g.to(_wide(p)) + _slope(p, a, f, strength))
    return value


def accumulate_outer_(out: Tensor, grad: Tensor, activation: Tensor, power: int) -> None:
    op = "accumulate_outer_"
    if power not in (1, 2):
        raise ValueError(f"{op}: power is {power} but must be 1 or 2")
    _check.output(op, "out", out)
    if out.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"{op}: out must be float32 or float64, the types that sums are kept in")
    _check.floating(op, "grad", grad)
    if activation.dtype != grad.dtype:
        raise ValueError(f"{op}: activation must have the dtype of grad")
    if grad.dim() not in (2, 3):
        raise ValueError(f"{op}: grad must be [N, O] or [N, P, O], not of dimension {grad.dim()}")
    if activation.shape[:-1] != grad.shape[:-1]:
        raise ValueError(f"{op}: activation must have the samples (and positions) of grad")
    if out.shape != (grad.shape[-1], activation.shape[-1]):
        raise ValueError(
            f"{op}: out must be [O, I] with the last sizes of grad and activation, "
            f"[{grad.shape[-1]}, {activation.shape[-1]}]"
        )
    _check.distinct(op, "out", [out], **{"grad, activation": [grad, activation]})
    g, a = grad.to(out.dtype), activation.to(out.dtype)
    if grad.dim() == 2:
        per_power = (g.square().T @ a.square()) if power == 2 else g.abs().T @ a.abs()
    else:
        per_sample = g.transpose(1, 2) @ a  # [N, O, I]: what the kernel never holds
        per_power = (per_sample.square() if power == 2 else per_sample.abs()).sum(0)
    out.add_(per_power)


def _wide(t: Tensor) -> torch.dtype:
    return torch.promote_types(t.dtype, torch.float32)


def _slope(p: Tensor, anchor: Tensor, importance: Tensor, strength: float) -> Tensor:
    wide = _wide(p)
    return strength * importance.to(wide) * (p.to(wide) - anchor.to(wide))


def _value(total: Tensor | int, params: list[Tensor], strength: float) -> Tensor:
    device = params[0].device if params else torch.device("cpu")
    dtype = torch.float64 if any(p.dtype == torch.float64 for p in params) else torch.float32
    return (0.5 * strength * torch.as_tensor(total, device=device)).to(dtype)


def _check_problem(
    op: str,
    params: list[Tensor],
    anchors: list[Tensor],
    importances: list[Tensor],
    strength: float,
    values: bool,
) -> None:
    _check.number(op, "strength", strength)
    _check.lengths(op, "anchors", len(anchors), "params", len(params))
    _check.lengths(op, "importances", len(importances), "params", len(params))
    for i, (p, a, f) in enumerate(zip(params, anchors, importances, strict=True)):
        _check.floating(op, f"params[{i}]", p)
        _check.like(op, f"anchors[{i}]", a, f"params[{i}]", p, dtype=True)
        _check.like(op, f"importances[{i}]", f, f"params[{i}]", p)
        if f.dtype not in (p.dtype, torch.float32, torch.bfloat16):
            raise ValueError(f"{op}: importances[{i}] must have the dtype of params[{i}], float32 or bfloat16")
    if values:
        for i, f in enumerate(importances):
            _check.not_negative(op, f"importances[{i}]", f)
