"""Plain torch form of csrc/importance."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import _check
from .._check import Checked


@_check.reference
def quadratic_penalty(
    params: list[Tensor],
    anchors: list[Tensor],
    importances: list[Tensor],
    strength: float,
    check: bool,
) -> Checked[Tensor]:
    _check_problem("quadratic_penalty", params, anchors, importances, strength, check)
    yield
    total = sum(
        (f.to(_wide(p)).double() * (p.double() - a.double()).square()).sum()
        for p, a, f in zip(params, anchors, importances, strict=True)
    )
    return _value(total, params, strength)


@_check.reference
def quadratic_penalty_backward(
    grad_value: Tensor,
    params: list[Tensor],
    anchors: list[Tensor],
    importances: list[Tensor],
    strength: float,
) -> Checked[list[Tensor]]:
    op = "quadratic_penalty_backward"
    _check_problem(op, params, anchors, importances, strength, False)
    _check.floating(op, "grad_value", grad_value)
    if grad_value.numel() != 1:
        raise ValueError(f"{op}: grad_value must be one number")
    if params:
        _check.device(op, "grad_value", grad_value, "params[0]", params[0])
    yield
    return [
        torch.empty_like(p).copy_(grad_value.to(_wide(p)) * _slope(p, a, f, strength))
        for p, a, f in zip(params, anchors, importances, strict=True)
    ]


@_check.reference
def quadratic_penalty_grad_(
    grads: list[Tensor],
    params: list[Tensor],
    anchors: list[Tensor],
    importances: list[Tensor],
    strength: float,
    check: bool,
) -> Checked[Tensor]:
    op = "quadratic_penalty_grad_"
    _check.lengths(op, "grads", len(grads), "params", len(params))
    for i, (g, p) in enumerate(zip(grads, params, strict=True)):
        _check.output(op, f"grads[{i}]", g)
        _check.like(op, f"grads[{i}]", g, f"params[{i}]", p, dtype=True)
    _check.distinct(op, "grads", grads, params=params, anchors=anchors, importances=importances)
    _check_problem(op, params, anchors, importances, strength, check)
    yield
    value = quadratic_penalty(params, anchors, importances, strength, False)
    for g, p, a, f in zip(grads, params, anchors, importances, strict=True):
        g.copy_(g.to(_wide(p)) + _slope(p, a, f, strength))
    return value


@_check.reference
def accumulate_outer_(out: Tensor, grad: Tensor, activation: Tensor, power: int) -> Checked[None]:
    op = "accumulate_outer_"
    _check_accumulator(op, "out", out, grad, power)
    _check.device(op, "activation", activation, "out", out)
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
    yield
    g, a = grad.to(out.dtype), activation.to(out.dtype)
    if grad.dim() == 2:
        per_power = (g.square().T @ a.square()) if power == 2 else g.abs().T @ a.abs()
    else:
        per_sample = g.transpose(1, 2) @ a  # [N, O, I]: what the kernel never holds
        per_power = (per_sample.square() if power == 2 else per_sample.abs()).sum(0)
    out.add_(per_power)


@_check.reference
def accumulate_conv_(
    out: Tensor,
    grad: Tensor,
    input: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    power: int,
) -> Checked[None]:
    op, spatial = "accumulate_conv_", out.dim() - 2
    _check_accumulator(op, "out", out, grad, power)
    _check.device(op, "input", input, "out", out)
    if input.dtype != grad.dtype:
        raise ValueError(f"{op}: input must have the dtype of grad")
    if spatial not in (1, 2, 3):
        raise ValueError(f"{op}: out must be [O, C / groups, kernel...] with 1 to 3 kernel sizes")
    if grad.dim() != out.dim() or input.dim() != out.dim() or grad.shape[0] != input.shape[0]:
        raise ValueError(
            f"{op}: grad and input must be [N, channels, spatial...] of the same N, with as many spatial sizes as out"
        )
    channels = out.shape[1] * groups
    if groups < 1 or grad.shape[1] != out.shape[0] or input.shape[1] != channels or out.shape[0] % groups:
        raise ValueError(f"{op}: out must be [channels of grad, channels of input / groups, kernel...]")
    if not len(stride) == len(padding) == len(dilation) == spatial:
        raise ValueError(f"{op}: stride, padding and dilation must each have {spatial} numbers")
    if min(stride) < 1 or min(dilation) < 1 or min(padding) < 0:
        raise ValueError(f"{op}: stride and dilation must be at least 1, padding not negative")
    if max(*stride, *padding, *dilation) >= 2**31:
        raise ValueError(f"{op}: stride, padding and dilation must be less than 2^31")
    for d in range(spatial):
        reach = (grad.shape[d + 2] - 1) * stride[d] + (out.shape[d + 2] - 1) * dilation[d]
        if grad.shape[d + 2] and reach >= input.shape[d + 2] + 2 * padding[d]:
            raise ValueError(f"{op}: grad has more positions than this stride, padding and dilation give for input")
    _check.distinct(op, "out", [out], **{"grad, input": [grad, input]})
    yield
    if not _check.has_values(out) or 0 in (grad.numel(), input.numel(), out.numel()):
        return  # for a fake tensor the loop below would fix the number of samples
    weight_grad = (torch.nn.grad.conv1d_weight, torch.nn.grad.conv2d_weight, torch.nn.grad.conv3d_weight)[spatial - 1]
    g, x = grad.to(out.dtype), input.to(out.dtype)
    # sizes that the stride leaves over at the end reach no output: cut them off, which torch.nn.grad wants
    for d in range(spatial):
        used = (g.shape[d + 2] - 1) * stride[d] + (out.shape[d + 2] - 1) * dilation[d] + 1 - 2 * padding[d]
        if used > 0:
            x = x.narrow(d + 2, 0, min(x.shape[d + 2], used))
    for n in range(len(g)):
        dw = weight_grad(x[n : n + 1], out.shape, g[n : n + 1], stride, padding, dilation, groups)
        out.add_(dw.square() if power == 2 else dw.abs())


@_check.reference
def accumulate_affine_(
    weights: list[Tensor], biases: list[Tensor], grad: Tensor, normalised: list[Tensor], power: int
) -> Checked[None]:
    op = "accumulate_affine_"
    if len(weights) > 1 or len(biases) > 1:
        raise ValueError(f"{op}: weights and biases must each have at most one tensor")
    if len(normalised) != 3 and not (not normalised and not weights):
        raise ValueError(f"{op}: normalised must be [x, shift, scale] (or empty, for a bias alone)")
    if grad.dim() != 3:
        raise ValueError(f"{op}: grad must be a {grad.device.type.upper()} tensor [N, P, C]")
    if power not in (1, 2):
        raise ValueError(f"{op}: power is {power} but must be 1 or 2")
    _check.floating(op, "grad", grad)
    for name, outs in (("weights[0]", weights), ("biases[0]", biases)):
        for out in outs:
            _check_accumulator(op, name, out, grad, power)
            if out.shape != (grad.shape[2],) or not out.is_contiguous():
                raise ValueError(f"{op}: {name} must be contiguous [C] with the features of grad, {grad.shape[2]}")
    if weights and biases and weights[0].dtype != biases[0].dtype:
        raise ValueError(f"{op}: biases[0] must have the dtype of weights[0]")
    for i, t in enumerate(normalised):
        _check.like(op, f"normalised[{i}]", t, "grad", grad, dtype=True)
    _check.distinct(op, "outputs", [*weights, *biases], inputs=[*normalised, grad])
    yield
    for out, factor in ((weights, True), (biases, False)):
        for total in out:
            g = grad.to(total.dtype)
            if factor:
                x, shift, scale = (t.to(total.dtype) for t in normalised)
                g = g * ((x - shift) * scale)
            per_sample = g.sum(1)
            total.add_((per_sample.square() if power == 2 else per_sample.abs()).sum(0))


def _check_accumulator(op: str, name: str, out: Tensor, grad: Tensor, power: int) -> None:
    if power not in (1, 2):
        raise ValueError(f"{op}: power is {power} but must be 1 or 2")
    _check.output(op, name, out)
    _check.device(op, "grad", grad, name, out)
    if out.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"{op}: {name} must be float32 or float64, the types that sums are kept in")
    _check.floating(op, "grad", grad)


def _wide(t: Tensor) -> torch.dtype:
    return torch.promote_types(t.dtype, torch.float32)


def _slope(p: Tensor, anchor: Tensor, importance: Tensor, strength: float) -> Tensor:
    wide = _wide(p)
    return strength * importance.to(wide) * (p.to(wide) - anchor.to(wide))


def _value(total: Tensor | int, params: list[Tensor], strength: float) -> Tensor:
    device = params[0].device if params else torch.device("cpu")
    dtype = torch.float64 if any(p.dtype == torch.float64 for p in params) else torch.float32
    return (0.5 * strength * torch.as_tensor(total, device=device)).to(dtype)


@_check.reference
def accumulate_path_(
    omegas: list[Tensor], grads: list[Tensor], params: list[Tensor], before: list[Tensor]
) -> Checked[None]:
    op = "accumulate_path_"
    _check_lists(op, params=(params, _VALUE), omegas=(omegas, _SUM_), grads=(grads, _VALUE), before=(before, _VALUE))
    yield
    for omega, g, p, b in zip(omegas, grads, params, before, strict=True):
        omega.sub_(g.to(omega.dtype) * (p.to(omega.dtype) - b.to(omega.dtype)))


@_check.reference
def accumulate_walk_(
    fishers: list[Tensor],
    gains: list[Tensor],
    moved: list[Tensor],
    grads: list[Tensor],
    params: list[Tensor],
    before: list[Tensor],
    alpha: float,
) -> Checked[None]:
    op = "accumulate_walk_"
    if not 0 < alpha <= 1:
        raise ValueError(f"{op}: alpha is {alpha} but must lie in (0, 1]")
    _check_lists(
        op,
        params=(params, _VALUE),
        fishers=(fishers, _SUM_),
        gains=(gains, _SUM_),
        moved=(moved, _SUM_),
        grads=(grads, _VALUE),
        before=(before, _VALUE),
    )
    yield
    for fisher, gain, m, g, p, b in zip(fishers, gains, moved, grads, params, before, strict=True):
        g, step = g.to(fisher.dtype), p.to(fisher.dtype) - b.to(fisher.dtype)
        fisher.copy_((1 - alpha) * fisher + alpha * g * g)
        gain.sub_(g * step)
        m.add_(step)


@_check.reference
def score_walk_(
    scores: list[Tensor], gains: list[Tensor], moved: list[Tensor], fishers: list[Tensor], epsilon: float
) -> Checked[None]:
    op = "score_walk_"
    _positive(op, "epsilon", epsilon)
    _check_lists(op, scores=(scores, _SUM_), gains=(gains, _SUM_), moved=(moved, _SUM_), fishers=(fishers, _SUM))
    yield
    for score, gain, m, fisher in zip(scores, gains, moved, fishers, strict=True):
        score.add_((gain / (0.5 * fisher * m * m + epsilon)).clamp(min=0))
        gain.zero_()
        m.zero_()


@_check.reference
def consolidate_path_(
    importances: list[Tensor], omegas: list[Tensor], starts: list[Tensor], params: list[Tensor], xi: float
) -> Checked[None]:
    op = "consolidate_path_"
    _positive(op, "xi", xi)
    _check_lists(
        op,
        params=(params, _VALUE),
        importances=(importances, _STORED_),
        omegas=(omegas, _SUM_),
        starts=(starts, _VALUE_),
    )
    fresh = []
    for i, (f, omega, start, p) in enumerate(zip(importances, omegas, starts, params, strict=True)):
        distance = p.to(omega.dtype) - start.to(omega.dtype)
        fresh.append(f.to(omega.dtype) + omega.clamp(min=0) / (distance * distance + xi))
        if _check.has_values(f) and not (fresh[-1].isfinite() & distance.isfinite()).all():
            raise ValueError(f"{op}: omegas[{i}] would give NaN or infinite importances, or its params are not finite")
    yield
    for f, omega, start, p, new in zip(importances, omegas, starts, params, fresh, strict=True):
        f.copy_(new)
        omega.zero_()
        start.copy_(p)


@_check.reference
def merge_importances_(
    importances: list[Tensor], fresh: list[Tensor], old_share: float, fresh_share: float
) -> Checked[None]:
    op = "merge_importances_"
    _check.number(op, "old_share", old_share)
    _check.number(op, "fresh_share", fresh_share)
    _check_lists(op, fresh=(fresh, _SUM), importances=(importances, _STORED_))
    _check_fresh(op, fresh)
    yield
    for f, new in zip(importances, fresh, strict=True):
        f.copy_(old_share * f.to(new.dtype) + fresh_share * new)


@_check.reference
def merge_anchored_(
    importances: list[Tensor], anchors: list[Tensor], fresh: list[Tensor], params: list[Tensor]
) -> Checked[Tensor]:
    op = "merge_anchored_"
    _check_lists(
        op,
        params=(params, _VALUE),
        importances=(importances, _STORED_),
        anchors=(anchors, _VALUE_),
        fresh=(fresh, _SUM),
    )
    _check_fresh(op, fresh)
    yield
    constant = torch.zeros((), dtype=torch.float64, device=params[0].device if params else None)
    for f, a, new, p in zip(importances, anchors, fresh, params, strict=True):
        old = f.to(new.dtype)
        total = old + new
        share = torch.where(total > 0, new / total, 1.0)
        apart = p.to(new.dtype) - a.to(new.dtype)
        constant = constant + 0.5 * (old * share * apart * apart).sum(dtype=torch.float64)
        a.copy_(a.to(new.dtype) + share * apart)
        f.copy_(total)
    return constant


# A list's dtype, and whether it is written: the parameters' own, the one sums are kept in, the one importances are
# stored in (the parameters', float32 or bfloat16).
_VALUE, _VALUE_, _SUM, _SUM_, _STORED_ = "value", "value_", "sum", "sum_", "stored_"


def _check_lists(op: str, **lists: tuple[list[Tensor], str]) -> None:
    """The first list is the one that the others must match."""
    (first_name, (first, first_kind)), *_ = lists.items()
    for name, (tensors, kind) in lists.items():
        _check.lengths(op, name, len(tensors), first_name, len(first))
        for i, (t, like) in enumerate(zip(tensors, first, strict=True)):
            said, of = f"{name}[{i}]", f"{first_name}[{i}]"
            if kind.endswith("_"):
                _check.output(op, said, t)
            if tensors is first:
                _check.floating(op, said, t)
                if first_kind.startswith(_SUM) and t.dtype not in (torch.float32, torch.float64):
                    raise ValueError(f"{op}: {said} must be float32 or float64, the types that sums are kept in")
                continue
            _check.like(op, said, t, of, like, dtype=kind.startswith(_VALUE))
            if kind.startswith(_SUM) and t.dtype != _wide(like):
                raise ValueError(
                    f"{op}: {said} must be {str(_wide(like))[6:]}, the type that sums for {of} are kept in"
                )
            if kind == _STORED_ and t.dtype not in (like.dtype, torch.float32, torch.bfloat16):
                raise ValueError(f"{op}: {said} must have the dtype of {of}, float32 or bfloat16")
    written = [t for tensors, kind in lists.values() if kind.endswith("_") for t in tensors]
    read = {name: tensors for name, (tensors, kind) in lists.items() if not kind.endswith("_")}
    _check.distinct(op, "written lists", written, **read)


def _check_fresh(op: str, fresh: list[Tensor]) -> None:
    for i, f in enumerate(fresh):
        if _check.has_values(f) and not ((f >= 0) & (f <= torch.finfo(f.dtype).max)).all():
            raise ValueError(f"{op}: fresh[{i}] has NaN, infinite or negative values")


def _positive(op: str, name: str, value: float) -> None:
    if not (value > 0 and math.isfinite(value)):
        raise ValueError(f"{op}: {name} is {value} but must be finite and positive")


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
