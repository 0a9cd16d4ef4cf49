"""Plain torch form of csrc/masked_grad."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import _check
from .._check import Checked

OP = "masked_grad_"


@_check.reference
def masked_grad_(grads: list[Tensor], reserved: list[Tensor]) -> Checked[None]:
    if any(r.dtype == torch.uint8 for r in reserved):
        _check_any(OP, grads, reserved, [])
    else:
        _check.lengths(OP, "reserved", len(reserved), "grads", len(grads))
        for i, (g, r) in enumerate(zip(grads, reserved, strict=True)):
            _check.output(OP, f"grads[{i}]", g)
            _check.floating(OP, f"grads[{i}]", g)
            _check.like(OP, f"reserved[{i}]", r, f"grads[{i}]", g)
            if r.dtype != torch.bool and r.dtype not in _check.FLOATS:
                raise ValueError(
                    f"{OP}: reserved[{i}] must be bool, float32, float64, bfloat16 or float16 (or uint8: packed bits)"
                )
        _check.distinct(OP, "grads", grads, reserved=reserved)
        for i, r in enumerate(reserved):
            _check.in_unit_interval(OP, f"reserved[{i}]", r)
    yield
    _mask(grads, reserved, [])


@_check.reference
def masked_grad_any_(grads: list[Tensor], reserved: list[Tensor], columns: list[Tensor]) -> Checked[None]:
    _check_any("masked_grad_any_", grads, reserved, columns)
    yield
    _mask(grads, reserved, columns)


def _check_any(op: str, grads: list[Tensor], reserved: list[Tensor], columns: list[Tensor]) -> None:
    _check.lengths(op, "reserved", len(reserved), "grads", len(grads))
    for i, g in enumerate(grads):
        _check.output(op, f"grads[{i}]", g)
        _check.floating(op, f"grads[{i}]", g)
    _check.distinct(op, "grads", grads, reserved=reserved, columns=columns)
    _masks(op, "grads", grads, reserved, columns, True)


def _mask(grads: list[Tensor], reserved: list[Tensor], columns: list[Tensor]) -> None:
    for i, g in enumerate(grads):
        share = _share(i, g, reserved, columns)
        if share is not None:
            g.copy_(torch.where(share == 0, 0, g.to(share.dtype) * share))


@_check.reference
def pack_mask(mask: Tensor) -> Checked[Tensor]:
    if mask.dtype != torch.bool:
        raise ValueError("pack_mask: mask must be a bool tensor")
    yield
    if not _check.has_values(mask):  # the padding below would fix its size
        return mask.new_empty((mask.numel() + 7) // 8, dtype=torch.uint8)
    bits = _check.flat(mask)
    n = bits.numel()
    bits = torch.cat([bits, bits.new_zeros(-n % 8)]).reshape(-1, 8).to(torch.uint8)
    return (bits << torch.arange(8, dtype=torch.uint8, device=mask.device)).sum(1, dtype=torch.uint8)


@_check.reference
def unpack_mask(packed: Tensor, like: Tensor) -> Checked[Tensor]:
    n_bytes = (like.numel() + 7) // 8
    _check.device("unpack_mask", "packed", packed, "like", like)
    if packed.dtype != torch.uint8 or packed.shape != (n_bytes,):
        raise ValueError(
            f"unpack_mask: packed must be uint8 of one dimension with {n_bytes} bytes, for the {like.numel()} "
            "elements of like"
        )
    yield
    return _check.unpack(packed, like) if _check.has_values(like) else torch.empty_like(like, dtype=torch.bool)


@_check.reference
def masked_sgd_(
    params: list[Tensor],
    momentum_buffers: list[Tensor],
    grads: list[Tensor],
    reserved: list[Tensor],
    columns: list[Tensor],
    lr: float,
    momentum: float,
    dampening: float,
    weight_decay: float,
    nesterov: bool,
    maximize: bool,
    first: bool,
    check: bool,
) -> Checked[None]:
    op = "masked_sgd_"
    for name, value in (("lr", lr), ("momentum", momentum), ("weight_decay", weight_decay)):
        _check.number(op, name, value)
    if not math.isfinite(dampening):
        raise ValueError(f"{op}: dampening is {dampening} but must be finite")
    if nesterov and (momentum == 0 or dampening != 0):
        raise ValueError(f"{op}: nesterov is true but needs a momentum and no dampening")
    if (len(momentum_buffers) == 0) != (momentum == 0) and params:
        raise ValueError(f"{op}: momentum_buffers must be given with a momentum, and only then")
    _check_step(op, params, {"momentum_buffers": momentum_buffers}, grads, reserved, columns, check)
    yield
    for i, p in enumerate(params):
        share, g = _gradient(i, p, grads, reserved, columns, weight_decay, maximize)
        if momentum_buffers:
            old = momentum_buffers[i]
            buffer = g if first else momentum * old.to(g.dtype) + (1 - dampening) * g
            _store(old, buffer, share)
            g = g + momentum * buffer if nesterov else buffer
        _store(p, p.to(g.dtype) - lr * g, share)


@_check.reference
def masked_adam_(
    params: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    max_exp_avg_sqs: list[Tensor],
    steps: list[Tensor],
    grads: list[Tensor],
    reserved: list[Tensor],
    columns: list[Tensor],
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    decoupled: bool,
    maximize: bool,
    check: bool,
) -> Checked[None]:
    op = "masked_adam_"
    for name, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
        _check.number(op, name, value)
    for name, value in (("beta1", beta1), ("beta2", beta2)):
        if not 0 <= value < 1:
            raise ValueError(f"{op}: {name} is {value} but must be at least 0 and less than 1")
    for name, moments in (("exp_avgs", exp_avgs), ("exp_avg_sqs", exp_avg_sqs)):
        _check.lengths(op, name, len(moments), "params", len(params))
    states = {"exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs, "max_exp_avg_sqs": max_exp_avg_sqs}
    _check.lengths(op, "steps", len(steps), "params", len(params))
    _check_step(op, params, states, grads, reserved, columns, check, steps)
    yield
    for i, p in enumerate(params):
        share, g = _gradient(i, p, grads, reserved, columns, 0 if decoupled else weight_decay, maximize)
        step = steps[i].add_(1).double().reshape(()).to(p.device)
        m, v = exp_avgs[i].to(g.dtype), exp_avg_sqs[i].to(g.dtype)
        m = m + (1 - beta1) * (g - m)
        v = beta2 * v + (1 - beta2) * g * g
        _store(exp_avgs[i], m, share)
        _store(exp_avg_sqs[i], v, share)
        if max_exp_avg_sqs:
            v = torch.maximum(max_exp_avg_sqs[i].to(g.dtype), v)
            _store(max_exp_avg_sqs[i], v, share)
        root = v.sqrt() / (1 - beta2**step).sqrt().to(g.dtype) + eps
        shrunk = p.to(g.dtype) * (1 - lr * weight_decay) if decoupled else p.to(g.dtype)
        _store(p, shrunk - (lr / (1 - beta1**step)).to(g.dtype) * m / root, share)


def _gradient(
    i: int,
    p: Tensor,
    grads: list[Tensor],
    reserved: list[Tensor],
    columns: list[Tensor],
    weight_decay: float,
    maximize: bool,
) -> tuple[Tensor | None, Tensor]:
    share = _share(i, p, reserved, columns)
    g = grads[i].to(torch.promote_types(p.dtype, torch.float32))
    if share is not None:
        g = g * share
    if maximize:
        g = -g
    return share, g + weight_decay * p.to(g.dtype) if weight_decay else g


def _share(i: int, like: Tensor, reserved: list[Tensor], columns: list[Tensor]) -> Tensor | None:
    return _check.free_share(reserved[i], columns[i] if columns else None, like) if reserved else None


def _store(into: Tensor, value: Tensor, share: Tensor | None) -> None:
    """Writes the free entries; the others keep every bit."""
    value = value.to(into.dtype)
    into.copy_(value if share is None else torch.where(share == 0, into, value))


def _masks(op: str, of: str, like: list[Tensor], reserved: list[Tensor], columns: list[Tensor], values: bool) -> None:
    if columns:
        _check.lengths(op, "columns", len(columns), "reserved", len(reserved))
    for i, r in enumerate(reserved):
        _check.mask(op, f"reserved[{i}]", r, columns[i] if columns else None, f"{of}[{i}]", like[i], values)


def _check_step(
    op: str,
    params: list[Tensor],
    states: dict[str, list[Tensor]],
    grads: list[Tensor],
    reserved: list[Tensor],
    columns: list[Tensor],
    values: bool,
    steps: list[Tensor] | None = None,
) -> None:
    _check.lengths(op, "grads", len(grads), "params", len(params))
    states = {name: list_ for name, list_ in states.items() if list_}
    for name, list_ in states.items():
        _check.lengths(op, name, len(list_), "params", len(params))
    if reserved:
        _check.lengths(op, "reserved", len(reserved), "params", len(params))
    for i, p in enumerate(params):
        _check.output(op, f"params[{i}]", p)
        _check.floating(op, f"params[{i}]", p)
        _check.like(op, f"grads[{i}]", grads[i], f"params[{i}]", p, dtype=True)
        for name, list_ in states.items():
            _check.output(op, f"{name}[{i}]", list_[i])
            _check.like(op, f"{name}[{i}]", list_[i], f"params[{i}]", p, dtype=True)
    for i, step in enumerate(steps or ()):
        at_hand = step.device in (torch.device("cpu"), params[i].device)
        if not at_hand or step.numel() != 1 or step.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"{op}: steps[{i}] must be one float32 or float64 number on the CPU")
    mutated = [*params, *(t for list_ in states.values() for t in list_), *(steps or ())]
    _check.distinct(op, "params and state", mutated, grads=grads, reserved=reserved, columns=columns)
    _masks(op, "params", params, reserved, columns, values)
