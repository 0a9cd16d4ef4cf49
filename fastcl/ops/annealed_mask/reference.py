"""Plain torch form of csrc/annealed_mask."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import _check
from .._check import Checked


@_check.reference
def annealed_mask(embedding: Tensor, scale: float) -> Checked[Tensor]:
    _check.number("annealed_mask", "scale", scale)
    _check.floating("annealed_mask", "embedding", embedding)
    yield
    wide = torch.promote_types(embedding.dtype, torch.float32)
    # in the embedding's memory order, as the kernel gives it
    return torch.empty_like(embedding).copy_(torch.sigmoid(embedding.to(wide) * scale))


@_check.reference
def annealed_mask_backward(grad: Tensor, embedding: Tensor, scale: float) -> Checked[Tensor]:
    op = "annealed_mask_backward"
    _check.number(op, "scale", scale)
    _check.like(op, "grad", grad, "embedding", embedding, dtype=True)
    _check.floating(op, "embedding", embedding)
    yield
    # in the embedding's memory order, as the kernel gives it
    return torch.empty_like(embedding).copy_(grad.to(_wide(embedding)) * slope(embedding, scale))


def slope(embedding: Tensor, scale: float) -> Tensor:
    """dm/de = s q / (1 + q)^2 with q = exp(-|s e|): not zero where m rounds to 1."""
    q = torch.exp(-(embedding.to(_wide(embedding)) * scale).abs())
    return scale * q / ((1 + q) * (1 + q))


def _wide(t: Tensor) -> torch.dtype:
    return torch.promote_types(t.dtype, torch.float32)


NONE, ANALYTIC, LITERAL = 0, 1, 2  # enum Compensation of csrc/annealed_mask/math.h


@_check.reference
def compensated_mask(embedding: Tensor, scale: float, s_max: float, literal: bool) -> Checked[Tensor]:
    _scales("compensated_mask", scale, s_max, LITERAL if literal else ANALYTIC)
    _check.floating("compensated_mask", "embedding", embedding)
    yield
    return annealed_mask(embedding, scale)


@_check.reference
def compensated_mask_backward(
    grad: Tensor, embedding: Tensor, scale: float, s_max: float, literal: bool
) -> Checked[Tensor]:
    op = "compensated_mask_backward"
    kind = LITERAL if literal else ANALYTIC
    _scales(op, scale, s_max, kind)
    _check.like(op, "grad", grad, "embedding", embedding, dtype=True)
    _check.floating(op, "embedding", embedding)
    yield
    return torch.empty_like(embedding).copy_(grad.to(_wide(embedding)) * slope_of(embedding, scale, s_max, kind))


def slope_of(embedding: Tensor, scale: float, s_max: float, compensation: int) -> Tensor:
    """dm/de, or HAT's compensated one: s_max sigmoid'(e), or the authors' literal quotient of cosh."""
    if compensation == NONE:
        return slope(embedding, scale)
    if compensation == ANALYTIC:
        return s_max * slope(embedding, 1.0)
    e = embedding.to(_wide(embedding))
    m = torch.sigmoid(scale * e)
    quotient = (torch.cosh((scale * e).clamp(-50, 50)) + 1) / (torch.cosh(e) + 1)
    return scale * m * (1 - m) * (s_max / scale * quotient)


@_check.reference
def masked_weight(
    weight: Tensor,
    embedding: Tensor,
    scale: float,
    reserved: Tensor | None = None,
    s_max: float = 0.0,
    compensation: int = NONE,
) -> Checked[Tensor]:
    _weight_problem("masked_weight", weight, embedding, scale, reserved, s_max, compensation)
    yield
    wide = _wide(weight)
    return _like(weight, embedding).copy_(weight.to(wide) * torch.sigmoid(embedding.to(wide) * scale))


@_check.reference
def masked_weight_kept(
    weight: Tensor,
    embedding: Tensor,
    scale: float,
    reserved: Tensor | None = None,
    s_max: float = 0.0,
    compensation: int = NONE,
) -> Checked[tuple[Tensor, Tensor]]:
    op = "masked_weight_kept"
    _weight_problem(op, weight, embedding, scale, reserved, s_max, compensation)
    if weight.shape != embedding.shape:
        raise ValueError(f"{op}: embedding must have the shape of weight")
    yield
    wide = _wide(weight)
    mask = torch.sigmoid(embedding.to(wide) * scale)
    share = _share(reserved, weight)
    kept = (mask if share is None else mask * share).sum(dtype=torch.float64).to(wide)
    return _like(weight, embedding).copy_(weight.to(wide) * mask), kept


@_check.reference
def masked_weight_backward(
    grad: Tensor,
    grad_kept: Tensor | None,
    weight: Tensor,
    embedding: Tensor,
    scale: float,
    reserved: Tensor | None = None,
    s_max: float = 0.0,
    compensation: int = NONE,
) -> Checked[tuple[Tensor, Tensor]]:
    op = "masked_weight_backward"
    _check.like(op, "grad", grad, "weight", weight, dtype=True)
    _weight_problem(op, weight, embedding, scale, reserved, s_max, compensation)
    per_unit = weight.shape != embedding.shape
    if grad_kept is not None and per_unit:
        raise ValueError(f"{op}: embedding must have the shape of weight")
    if grad_kept is not None:
        _check.device(op, "grad_kept", grad_kept, "weight", weight)
        _check.floating(op, "grad_kept", grad_kept)
    if grad_kept is not None and grad_kept.numel() != 1:
        raise ValueError(f"{op}: grad_kept must be one number on the CPU")
    yield
    wide = _wide(weight)
    g, mask = grad.to(wide), torch.sigmoid(embedding.to(wide) * scale)
    slopes = slope_of(embedding, scale, s_max, compensation)
    share = _share(reserved, weight)
    grad_weight = g * mask if share is None else torch.where(share == 0, 0, g * mask * share)
    through = g * weight.to(wide)
    if per_unit:
        through = through.sum([d for d in range(weight.dim()) if embedding.shape[d] == 1], keepdim=True)
    if grad_kept is not None:
        through = through + grad_kept.to(wide).reshape(()) * (1 if share is None else share)
    like = torch.empty_like(embedding.contiguous()) if per_unit else _like(weight, embedding)
    return _like(weight, embedding).copy_(grad_weight), like.copy_(through * slopes)


@_check.reference
def mask_sparsity(masks: list[Tensor], reserved: list[Tensor]) -> Checked[Tensor]:
    _sparsity_problem("mask_sparsity", masks, reserved)
    yield
    used, free = _sums(masks, reserved)
    wide = torch.float64 if any(m.dtype == torch.float64 for m in masks) else torch.float32
    return torch.where(free > 0, used / free, 0).to(wide)


@_check.reference
def mask_sparsity_backward(grad: Tensor, masks: list[Tensor], reserved: list[Tensor]) -> Checked[list[Tensor]]:
    op = "mask_sparsity_backward"
    _sparsity_problem(op, masks, reserved)
    _check.floating(op, "grad", grad)
    if masks:
        _check.device(op, "grad", grad, "masks[0]", masks[0])
    if grad.numel() != 1:
        raise ValueError(f"{op}: grad must be one number on the CPU")
    yield
    _, free = _sums(masks, reserved)
    factor = torch.where(free > 0, grad.reshape(()).double() / free, 0)
    found = []
    for i, m in enumerate(masks):
        share = _share(reserved[i] if reserved else None, m)
        found.append(torch.empty_like(m).copy_(factor.to(_wide(m)) * (torch.ones_like(m) if share is None else share)))
    return found


def _sums(masks: list[Tensor], reserved: list[Tensor]) -> tuple[Tensor, Tensor]:
    device = masks[0].device if masks else torch.device("cpu")
    used = free = torch.zeros((), dtype=torch.float64, device=device)
    for i, m in enumerate(masks):
        share = _share(reserved[i] if reserved else None, m)
        share = torch.ones_like(m, dtype=torch.float64) if share is None else share.double()
        used, free = used + (m.double() * share).sum(), free + share.sum()
    return used, free


def _share(reserved: Tensor | None, weight: Tensor) -> Tensor | None:
    return None if reserved is None else _check.free_share(reserved, None, weight)


def _like(weight: Tensor, embedding: Tensor) -> Tensor:
    return torch.empty_like(weight if weight.shape == embedding.shape else weight.contiguous())


def _scales(op: str, scale: float, s_max: float, compensation: int) -> None:
    _check.number(op, "scale", scale)
    if compensation not in (NONE, ANALYTIC, LITERAL):
        raise ValueError(f"{op}: compensation is {compensation} but must be 0 (none), 1 (analytic) or 2 (literal)")
    if compensation and not (s_max > 0 and math.isfinite(s_max)):
        raise ValueError(f"{op}: s_max is {s_max} but must be finite and positive")
    if compensation == LITERAL and scale == 0:
        raise ValueError(f"{op}: scale is 0 but must be positive for the literal compensation")


def _weight_problem(
    op: str,
    weight: Tensor,
    embedding: Tensor,
    scale: float,
    reserved: Tensor | None,
    s_max: float,
    compensation: int,
) -> None:
    _scales(op, scale, s_max, compensation)
    _check.floating(op, "weight", weight)
    _check.device(op, "embedding", embedding, "weight", weight)
    if embedding.dtype != weight.dtype:
        raise ValueError(f"{op}: embedding must have the dtype of weight")
    sizes = [(e, w) for e, w in zip(embedding.shape, weight.shape, strict=False) if e != 1]
    per_unit = embedding.dim() == weight.dim() and len(sizes) <= 1 and all(e == w for e, w in sizes)
    if weight.shape != embedding.shape and not per_unit:
        raise ValueError(f"{op}: embedding must have the shape of weight, or be 1 in every dimension but one of it")
    if reserved is not None:
        _check.mask(op, "reserved", reserved, None, "weight", weight, True)


def _sparsity_problem(op: str, masks: list[Tensor], reserved: list[Tensor]) -> None:
    if reserved:
        _check.lengths(op, "reserved", len(reserved), "masks", len(masks))
    for i, m in enumerate(masks):
        _check.floating(op, f"masks[{i}]", m)
        if reserved:
            _check.mask(op, f"reserved[{i}]", reserved[i], None, f"masks[{i}]", m, True)
