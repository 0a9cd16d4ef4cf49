"""Triton form of csrc/annealed_mask."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import _check
from .._sweep import Mask, arithmetic, in_order, mask_of, sweep
from .._triton import free_part, load, number, share_gradient, store, within
from .reference import ANALYTIC, LITERAL, NONE

_ANALYTIC, _LITERAL = tl.constexpr(ANALYTIC), tl.constexpr(LITERAL)


@triton.jit
def annealed_mask_and_slope(e, scale):
    """sigmoid(s e) and s q / (1 + q)^2 with q = exp(-|s e|), from one exponential."""
    x = scale * e
    q = tl.exp(-tl.abs(x))
    inverse = 1 / (1 + q)
    small = q * inverse
    return tl.where(x < 0, small, inverse), scale * small * inverse


@triton.jit
def mask_slope(e, scale, s_max, KIND: tl.constexpr):
    """dm/de; HAT's compensated s_max sigmoid'(e); or the authors' product, with 1 - m rounded and cosh clamped."""
    if KIND == _ANALYTIC:
        return s_max * annealed_mask_and_slope(e, 1.0)[1]
    elif KIND == _LITERAL:
        m = 1 / (1 + tl.exp(-scale * e))
        x = tl.minimum(tl.abs(scale * e), 50.0)
        numerator = (tl.exp(x) + tl.exp(-x)) / 2 + 1
        denominator = (tl.exp(e) + tl.exp(-e)) / 2 + 1
        return scale * m * (1 - m) * (s_max / scale * (numerator / denominator))
    else:
        return annealed_mask_and_slope(e, scale)[1]


@triton.jit
def _forward(p, i, left, free, aux, s, F: tl.constexpr, A: tl.constexpr, FULL: tl.constexpr):
    m, _ = annealed_mask_and_slope(load(p[1], i, left, A, FULL), number(s[0], A))
    store(p[0], i, m, left, FULL)


@triton.jit
def _backward(p, i, left, free, aux, s, F: tl.constexpr, A: tl.constexpr, FULL: tl.constexpr):
    slope = mask_slope(load(p[2], i, left, A, FULL), number(s[0], A), number(s[1], A), F[0])
    store(p[0], i, load(p[1], i, left, A, FULL) * slope, left, FULL)


@triton.jit
def _weight(p, i, left, free, aux, s, F: tl.constexpr, A: tl.constexpr, FULL: tl.constexpr):
    m, _ = annealed_mask_and_slope(load(p[2], i, left, A, FULL), number(s[0], A))
    store(p[0], i, load(p[1], i, left, A, FULL) * m, left, FULL)
    return within(m * free, i, left, FULL)


@triton.jit
def _weight_backward(p, i, left, free, aux, s, F: tl.constexpr, A: tl.constexpr, FULL: tl.constexpr):
    # p: grad_weight, grad_embedding, grad, weight, embedding; aux: the gradient of the kept sum, if F[1]
    g, e = load(p[2], i, left, A, FULL), load(p[4], i, left, A, FULL)
    scale = number(s[0], A)
    m, slope = annealed_mask_and_slope(e, scale)
    if F[0] != 0:
        slope = mask_slope(e, scale, number(s[1], A), F[0])
    through = g * load(p[3], i, left, A, FULL)
    if F[1]:
        through += tl.load(aux).to(A) * free
    store(p[0], i, free_part(g * m, free), left, FULL)
    store(p[1], i, through * slope, left, FULL)


@triton.jit
def _used(p, i, left, free, aux, s, F: tl.constexpr, A: tl.constexpr, FULL: tl.constexpr):
    return within(load(p[0], i, left, A, FULL) * free, i, left, FULL)


@triton.jit
def _free(p, i, left, free, aux, s, F: tl.constexpr, A: tl.constexpr, FULL: tl.constexpr):
    return within(free, i, left, FULL)


@triton.jit
def _times_free(p, i, left, free, aux, s, F: tl.constexpr, A: tl.constexpr, FULL: tl.constexpr):
    store(p[0], i, tl.load(aux).to(A) * free, left, FULL)


@triton.jit
def _units(
    out, grad_e, grad, weight, e, units, inner, outer_stride, scale_: tl.float64, s_max_: tl.float64,
    KIND: tl.constexpr, BACKWARD: tl.constexpr, A: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A mask for each unit of a contiguous weight [outer, units, inner]: a program has one unit, so that its gradient
    is summed in a fixed order."""
    unit = tl.program_id(0).to(tl.int64)
    scale, s_max = number(scale_, A), number(s_max_, A)
    value = tl.load(e + unit).to(A)
    m, slope = annealed_mask_and_slope(value, scale)
    if KIND != 0:
        slope = mask_slope(value, scale, s_max, KIND)
    acc = tl.zeros((ROWS, BLOCK), A)
    column = tl.arange(0, BLOCK)
    for row in range(0, outer_stride, ROWS):
        rows = row + tl.arange(0, ROWS)
        base = (rows.to(tl.int64) * units + unit) * inner
        for at in range(0, inner, BLOCK):
            i = base[:, None] + (at + column)[None, :]
            inside = (rows < outer_stride)[:, None] & (at + column < inner)[None, :]
            w = tl.load(weight + i, mask=inside, other=0).to(A)
            if BACKWARD:
                g = tl.load(grad + i, mask=inside, other=0).to(A)
                tl.store(out + i, (g * m).to(out.dtype.element_ty), mask=inside)
                acc += g * w
            else:
                tl.store(out + i, (w * m).to(out.dtype.element_ty), mask=inside)
    if BACKWARD:
        one = tl.arange(0, 1)
        tl.store(grad_e + unit + one, (tl.sum(acc) * slope).to(grad_e.dtype.element_ty))


def annealed_mask(embedding: Tensor, scale: float) -> Tensor:
    mask = torch.empty_like(embedding)
    sweep(_forward, [[mask], [in_order(embedding, mask)]], [scale], written=1)
    return mask


def compensated_mask(embedding: Tensor, scale: float, s_max: float, literal: bool) -> Tensor:
    return annealed_mask(embedding, scale)


def annealed_mask_backward(grad: Tensor, embedding: Tensor, scale: float) -> Tensor:
    return _mask_backward(grad, embedding, scale, 0.0, NONE)


def compensated_mask_backward(grad: Tensor, embedding: Tensor, scale: float, s_max: float, literal: bool) -> Tensor:
    return _mask_backward(grad, embedding, scale, s_max, LITERAL if literal else ANALYTIC)


def _mask_backward(grad: Tensor, embedding: Tensor, scale: float, s_max: float, kind: int) -> Tensor:
    grad_embedding = torch.empty_like(embedding)
    sweep(_backward, [[grad_embedding], [grad], [embedding]], [scale, s_max], (kind,), written=1)
    return grad_embedding


def masked_weight(
    weight: Tensor,
    embedding: Tensor,
    scale: float,
    reserved: Tensor | None = None,
    s_max: float = 0.0,
    compensation: int = NONE,
) -> Tensor:
    if weight.shape != embedding.shape:
        return _by_units(weight, embedding, scale)
    out = torch.empty_like(weight)
    sweep(_weight, [[out], [weight], [embedding]], [scale], written=1)
    return out


def masked_weight_kept(
    weight: Tensor,
    embedding: Tensor,
    scale: float,
    reserved: Tensor | None = None,
    s_max: float = 0.0,
    compensation: int = NONE,
) -> tuple[Tensor, Tensor]:
    out = torch.empty_like(weight)
    masks = [mask_of(reserved, None, _check.dense(weight))]
    kept = sweep(_weight, [[out], [weight], [embedding]], [scale], written=1, masks=masks, total=True)
    return out, kept.to(arithmetic(weight))


def masked_weight_backward(
    grad: Tensor,
    grad_kept: Tensor | None,
    weight: Tensor,
    embedding: Tensor,
    scale: float,
    reserved: Tensor | None = None,
    s_max: float = 0.0,
    compensation: int = NONE,
) -> tuple[Tensor, Tensor]:
    if weight.shape != embedding.shape:
        grad_weight, grad_embedding = _by_units(weight, embedding, scale, grad, s_max, compensation)
        if reserved is not None:
            masks = [mask_of(reserved, None, grad_weight)]
            sweep(share_gradient, [[grad_weight]], written=1, masks=masks)
        return grad_weight, grad_embedding
    grad_weight, grad_embedding = torch.empty_like(weight), torch.empty_like(weight)
    sweep(
        _weight_backward,
        [[grad_weight], [grad_embedding], [grad], [weight], [embedding]],
        [scale, s_max],
        (compensation, grad_kept is not None),
        written=2,
        masks=[mask_of(reserved, None, _check.dense(weight))],
        aux=[grad_kept],
    )
    return grad_weight, grad_embedding


def mask_sparsity(masks: list[Tensor], reserved: list[Tensor]) -> Tensor:
    if not masks:
        return torch.zeros(())
    forms = _forms(masks, reserved)
    used = sweep(_used, [masks], written=0, masks=forms, total=True)
    free = sweep(_free, [masks], written=0, masks=forms, total=True)
    return torch.where(free > 0, used / free, 0).to(arithmetic(*masks))


def mask_sparsity_backward(grad: Tensor, masks: list[Tensor], reserved: list[Tensor]) -> list[Tensor]:
    if not masks:
        return []
    forms = _forms(masks, reserved)
    free = sweep(_free, [masks], written=0, masks=forms, total=True)
    factor = torch.where(free > 0, grad.reshape(()).double() / free, 0)
    found = [torch.empty_like(m) for m in masks]
    sweep(_times_free, [found], written=1, masks=forms, aux=[factor] * len(masks))
    return found


def _forms(masks: list[Tensor], reserved: list[Tensor]) -> list[Mask]:
    return [mask_of(reserved[i] if reserved else None, None, _check.dense(m)) for i, m in enumerate(masks)]


def _by_units(
    weight: Tensor, embedding: Tensor, scale: float, grad: Tensor | None = None, s_max: float = 0.0, kind: int = NONE
) -> tuple[Tensor, Tensor] | Tensor:
    weight, e = weight.contiguous(), embedding.contiguous()
    out, grad_e = torch.empty_like(weight), torch.empty_like(e)
    unit_dim = next((d for d in range(weight.dim()) if e.shape[d] != 1), 0)
    units = e.shape[unit_dim] if e.dim() else 1
    outer = weight.shape[:unit_dim].numel()
    inner = weight.numel() // max(1, outer * units)
    if e.numel() == 1 and weight.dim():  # one number for all of it
        outer, units, inner = 1, 1, weight.numel()
    if weight.numel():
        rows = 1 if inner >= 256 else min(64, triton.next_power_of_2(outer))
        _units[(units,)](
            out, grad_e, weight if grad is None else grad.contiguous(), weight, e, units, inner, outer, scale, s_max,
            KIND=kind, BACKWARD=grad is not None, A=tl.float64 if weight.dtype == torch.float64 else tl.float32,
            ROWS=rows, BLOCK=max(16, min(1024, triton.next_power_of_2(inner))) if rows == 1 else max(
                16, min(256, triton.next_power_of_2(inner))), num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
    elif grad is not None:
        grad_e.zero_()
    return out if grad is None else (out, grad_e)
