"""Triton form of csrc/masked_grad: one launch for all tensors of a model."""

import math
from itertools import repeat

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import _check
from .._sweep import Mask, mask_of, sweep
from .._triton import free_part, load, number, raw, share_gradient, sqrt, store, store_free


@triton.jit
def _sgd(p, i, left, free, aux, s, F: tl.constexpr, A: tl.constexpr, FULL: tl.constexpr):
    lr, momentum, share, decay, sign = number(s[0], A), number(s[1], A), number(s[2], A), number(s[3], A), s[4]
    old = raw(p[0], i, left, FULL)
    w = old.to(A)
    if F[0]:  # momentum
        stored = raw(p[1], i, left, FULL)
        g = free_part(load(p[2], i, left, A, FULL), free) * number(sign, A) + decay * w
        buffer = g
        if not F[2]:  # not the first step
            buffer = momentum * stored.to(A) + share * g
        store_free(p[1], i, buffer, stored, free, left, FULL)
        g = g + momentum * buffer if F[1] else buffer
    else:
        g = free_part(load(p[1], i, left, A, FULL), free) * number(sign, A) + decay * w
    store_free(p[0], i, w - lr * g, old, free, left, FULL)


@triton.jit
def _adam(p, i, left, free, aux, s, F: tl.constexpr, A: tl.constexpr, FULL: tl.constexpr):
    # F: amsgrad, the count on the device
    share1, beta2, share2 = number(s[0], A), number(s[1], A), number(s[2], A)
    eps, decay, shrink, sign = number(s[3], A), number(s[4], A), number(s[5], A), number(s[6], A)
    if F[1]:
        count = tl.load(aux).to(tl.float64)
        one = number(1.0, tl.float64)
        step_size = (number(s[7], tl.float64) / (one - tl.exp2(count * number(s[8], tl.float64)))).to(A)
        root_scale = (one / tl.sqrt(one - tl.exp2(count * number(s[9], tl.float64)))).to(A)
    else:
        step_size, root_scale = number(s[7], A), number(s[8], A)
    old, old_m, old_v = raw(p[0], i, left, FULL), raw(p[1], i, left, FULL), raw(p[2], i, left, FULL)
    g = load(p[4], i, left, A, FULL) if F[0] else load(p[3], i, left, A, FULL)
    w, m, v = old.to(A), old_m.to(A), old_v.to(A)
    g = free_part(g, free) * sign + decay * w
    m = m + share1 * (g - m)
    v = beta2 * v + share2 * g * g
    store_free(p[1], i, m, old_m, free, left, FULL)
    store_free(p[2], i, v, old_v, free, left, FULL)
    if F[0]:
        old_largest = raw(p[3], i, left, FULL)
        largest = old_largest.to(A)
        v = tl.where(v <= largest, largest, v)  # NaN stays
        store_free(p[3], i, v, old_largest, free, left, FULL)
    store_free(p[0], i, w * shrink - step_size * m / (sqrt(v) * root_scale + eps), old, free, left, FULL)


@triton.jit
def _pack(bytes_, mask, n, BYTES: tl.constexpr):
    byte = tl.program_id(0).to(tl.int64) * BYTES + tl.arange(0, BYTES)
    bit = tl.arange(0, 8)
    i = byte[:, None] * 8 + bit[None, :]
    r = tl.load(mask + i, mask=i < n, other=0) != 0
    packed = tl.sum(r.to(tl.int32) << bit[None, :], 1)
    tl.store(bytes_ + byte, packed.to(tl.uint8), mask=byte * 8 < n)


@triton.jit
def _unpack(p, i, left, free, aux, s, F: tl.constexpr, A: tl.constexpr, FULL: tl.constexpr):
    store(p[0], i, free == 0, left, FULL)


def masked_grad_(grads: list[Tensor], reserved: list[Tensor]) -> None:
    masked_grad_any_(grads, reserved, [])


def masked_grad_any_(grads: list[Tensor], reserved: list[Tensor], columns: list[Tensor]) -> None:
    sweep(share_gradient, [grads], written=1, masks=_masks(grads, reserved, columns))


def pack_mask(mask: Tensor) -> Tensor:
    bits = _check.dense(mask).view(torch.uint8)
    packed = mask.new_empty((mask.numel() + 7) // 8, dtype=torch.uint8)
    if len(packed):
        _pack[(triton.cdiv(len(packed), 512),)](packed, bits, mask.numel(), BYTES=512, enable_fp_fusion=True)
    return packed


def unpack_mask(packed: Tensor, like: Tensor) -> Tensor:
    mask = torch.empty_like(like, dtype=torch.bool)
    sweep(_unpack, [[mask.view(torch.uint8)]], written=1, masks=[mask_of(packed, None, mask)])
    return mask


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
) -> None:
    buffers = [momentum_buffers] if momentum_buffers else []
    numbers = (lr, momentum, 1 - dampening, weight_decay, -1.0 if maximize else 1.0)
    flags = (bool(buffers), nesterov, first)
    masks = _masks(params, reserved, columns)
    sweep(_sgd, [params, *buffers, grads], numbers, flags, written=1 + len(buffers), masks=masks)


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
) -> None:
    if not params:
        return
    torch._foreach_add_(steps, 1)
    largest = [max_exp_avg_sqs] if max_exp_avg_sqs else []
    numbers = (
        1 - beta1,
        beta2,
        1 - beta2,
        eps,
        0.0 if decoupled else weight_decay,
        1 - lr * weight_decay if decoupled else 1.0,
        -1.0 if maximize else 1.0,
    )
    lists = [params, exp_avgs, exp_avg_sqs, *largest, grads]
    masks = _masks(params, reserved, columns)
    for on_device in (False, True):
        chosen = [i for i, step in enumerate(steps) if (step.device.type != "cpu") == on_device]
        if not chosen:
            continue
        own = [corrections(step, lr, beta1, beta2) for step in (steps[i] for i in chosen)]
        sweep(
            _adam,
            [[list_[i] for i in chosen] for list_ in lists],
            numbers,
            (bool(largest), on_device),
            written=len(lists) - 1,
            masks=[masks[i] for i in chosen],
            aux=[steps[i] for i in chosen] if on_device else None,
            own_numbers=own,
        )


def corrections(step: Tensor, lr: float, beta1: float, beta2: float) -> tuple[float, ...]:
    """Adam's bias corrections: step size and the root's factor, or what the kernel computes them from."""
    if step.device.type != "cpu":
        return lr, _log2(beta1), _log2(beta2)
    n = float(step)
    return lr / (1 - beta1**n), (1 - beta2**n) ** -0.5


def _log2(beta: float) -> float:
    return math.log2(beta) if beta > 0 else -math.inf


def _masks(weights: list[Tensor], reserved: list[Tensor], columns: list[Tensor]) -> list[Mask]:
    pairs = zip(weights, reserved or repeat(None), columns or repeat(None), strict=False)
    return [mask_of(r, c, _check.dense(w)) for w, r, c in pairs]
