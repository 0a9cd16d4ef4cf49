"""Per-sample gradients to a power in Triton: what csrc/importance/{outer,conv,affine}.cpp do."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._sweep import OPTIONS, TYPES, on

ENOUGH = 264  # programs: two for each of an H100's 132 multiprocessors


@triton.jit
def importance_of(g, POWER: tl.constexpr):
    return g * g if POWER == 2 else tl.abs(g)


@triton.jit
def _outer(
    part, grad, act, N, P, ROWS, COLUMNS, per_split,
    gn: tl.int64, gp, go, an: tl.int64, ap, ai,
    POWER: tl.constexpr, ONE: tl.constexpr, A: tl.constexpr, PRECISION: tl.constexpr,
    BO: tl.constexpr, BI: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """part[split, O, I] = sum over the split's samples of |sum_p g a|^power; the sample's sum stays in registers."""
    o = tl.program_id(0) * BO + tl.arange(0, BO)
    i = tl.program_id(1) * BI + tl.arange(0, BI)
    k = tl.arange(0, BK)
    first = tl.program_id(2) * per_split
    last = tl.minimum(N, first + per_split)
    acc = tl.zeros((BO, BI), A)
    if ONE:  # one position: the power of a product is the product of the powers
        for n0 in range(first, last, BK):
            n = n0 + k
            g = tl.load(grad + n.to(tl.int64)[:, None] * gn + o[None, :] * go,
                        mask=(n < last)[:, None] & (o < ROWS)[None, :], other=0).to(A)  # fmt: skip
            a = tl.load(act + n.to(tl.int64)[:, None] * an + i[None, :] * ai,
                        mask=(n < last)[:, None] & (i < COLUMNS)[None, :], other=0).to(A)  # fmt: skip
            acc = tl.dot(tl.trans(importance_of(g, POWER)), importance_of(a, POWER), acc,
                         input_precision=PRECISION, out_dtype=A)  # fmt: skip
    else:
        for n in range(first, last):
            g_of = grad + tl.cast(n, tl.int64) * gn
            a_of = act + tl.cast(n, tl.int64) * an
            sample = tl.zeros((BO, BI), A)
            for p0 in range(0, P, BK):
                p = p0 + k
                g = tl.load(g_of + p[:, None] * gp + o[None, :] * go,
                            mask=(p < P)[:, None] & (o < ROWS)[None, :], other=0).to(A)  # fmt: skip
                a = tl.load(a_of + p[:, None] * ap + i[None, :] * ai,
                            mask=(p < P)[:, None] & (i < COLUMNS)[None, :], other=0).to(A)  # fmt: skip
                sample = tl.dot(tl.trans(g), a, sample, input_precision=PRECISION, out_dtype=A)
            acc += importance_of(sample, POWER)
    to = part + (tl.program_id(2).to(tl.int64) * ROWS + o[:, None]) * COLUMNS + i[None, :]
    tl.store(to, acc, mask=(o < ROWS)[:, None] & (i < COLUMNS)[None, :])


@triton.jit
def _conv(
    part, grad, x, N, ROWS, C, D, H, W, P, OH, OW, K, per_split, per_group, tiles,
    gn: tl.int64, go, gp, xn: tl.int64, xc, xd, xh, xw,
    SD: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, PD: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    DD: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr, KD: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    POWER: tl.constexpr, A: tl.constexpr, PRECISION: tl.constexpr,
    BO: tl.constexpr, BI: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """part[split, O, K]: as _outer, with the columns of im2col read where they lie. A tile lies in one group."""
    group = tl.program_id(0) // tiles
    o = (tl.program_id(0) % tiles) * BO + tl.arange(0, BO)  # within the group
    k = tl.program_id(1) * BI + tl.arange(0, BI)  # channel, kernel place
    place = k % (KD * KH * KW)
    channel = group * C + k // (KD * KH * KW)
    kd, kh, kw = place // (KH * KW) * DD - PD, place // KW % KH * DH - PH, place % KW * DW - PW
    first = tl.program_id(2) * per_split
    last = tl.minimum(N, first + per_split)
    acc = tl.zeros((BO, BI), A)
    for n in range(first, last):
        g_of = grad + tl.cast(n, tl.int64) * gn + (group * per_group + o)[None, :] * go
        x_of = x + tl.cast(n, tl.int64) * xn + channel[None, :] * xc
        sample = tl.zeros((BO, BI), A)
        for p0 in range(0, P, BK):
            p = p0 + tl.arange(0, BK)
            g = tl.load(g_of + p[:, None] * gp, mask=(p < P)[:, None] & (o < per_group)[None, :], other=0).to(A)
            d = (p // (OH * OW) * SD)[:, None] + kd[None, :]
            h = (p // OW % OH * SH)[:, None] + kh[None, :]
            w = (p % OW * SW)[:, None] + kw[None, :]
            inside = (d >= 0) & (d < D) & (h >= 0) & (h < H) & (w >= 0) & (w < W) & (p < P)[:, None] & (k < K)[None, :]
            a = tl.load(x_of + d * xd + h * xh + w * xw, mask=inside, other=0).to(A)
            sample = tl.dot(tl.trans(g), a, sample, input_precision=PRECISION, out_dtype=A)
        acc += importance_of(sample, POWER)
    row = group * per_group + o
    to = part + (tl.program_id(2).to(tl.int64) * ROWS + row[:, None]) * K + k[None, :]
    tl.store(to, acc, mask=(o < per_group)[:, None] & (k < K)[None, :])


@triton.jit
def _affine(
    weight, bias, grad, x, shift, scale, N, P, C, per_split,
    gn: tl.int64, gp, gc, xn: tl.int64, xp, xc, hn: tl.int64, hp, hc, sn: tl.int64, sp, sc,
    POWER: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, A: tl.constexpr,
    BP: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """weight, bias [split, C]: sums over the split's samples of |sum_p g xhat|^power and |sum_p g|^power."""
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    first = tl.program_id(1) * per_split
    last = tl.minimum(N, first + per_split)
    to_weight, to_bias = tl.zeros((BC,), A), tl.zeros((BC,), A)
    for n in range(first, last):
        m = tl.cast(n, tl.int64)
        of_weight, of_bias = tl.zeros((BP, BC), A), tl.zeros((BP, BC), A)
        for p0 in range(0, P, BP):
            p = p0 + tl.arange(0, BP)
            inside = (p < P)[:, None] & (c < C)[None, :]
            g = tl.load(grad + m * gn + p[:, None] * gp + c[None, :] * gc, mask=inside, other=0).to(A)
            of_bias += g
            if HAS_WEIGHT:
                value = tl.load(x + m * xn + p[:, None] * xp + c[None, :] * xc, mask=inside, other=0).to(A)
                center = tl.load(shift + m * hn + p[:, None] * hp + c[None, :] * hc, mask=inside, other=0).to(A)
                factor = tl.load(scale + m * sn + p[:, None] * sp + c[None, :] * sc, mask=inside, other=0).to(A)
                of_weight += g * ((value - center) * factor)
        to_bias += importance_of(tl.sum(of_bias, 0), POWER)
        if HAS_WEIGHT:
            to_weight += importance_of(tl.sum(of_weight, 0), POWER)
    at = tl.program_id(1).to(tl.int64) * C + c
    if HAS_WEIGHT:
        tl.store(weight + at, to_weight, mask=c < C)
    if HAS_BIAS:
        tl.store(bias + at, to_bias, mask=c < C)


def _precision(grad: Tensor, out: Tensor, squared: bool = False) -> str:
    """How tl.dot multiplies: half inputs (not their squares) are exact in tf32, float32 needs three products of it."""
    if out.dtype == torch.float64 or torch.version.hip:
        return "ieee"
    return "tf32" if grad.dtype.itemsize == 2 and not squared else "tf32x3"


def _splits(samples: int, tiles: int, numel: int) -> int:
    """How many parts of the samples run side by side where the output alone has too few tiles."""
    return max(1, min(samples, triton.cdiv(ENOUGH, tiles), 32, (1 << 24) // max(1, numel)))


def _tile(size: int, largest: int = 64) -> int:
    return max(16, min(largest, triton.next_power_of_2(size)))


def accumulate_outer_(out: Tensor, grad: Tensor, activation: Tensor, power: int) -> None:
    if grad.dim() == 2:
        grad, activation = grad.unsqueeze(1), activation.unsqueeze(1)
    samples, positions, rows = grad.shape
    columns = activation.shape[2]
    if 0 in (*grad.shape, columns):
        return
    bo, bi = _tile(rows), _tile(columns)
    tiles = triton.cdiv(rows, bo) * triton.cdiv(columns, bi)
    splits = _splits(samples, tiles, out.numel())
    part = torch.empty(splits, rows, columns, dtype=out.dtype, device=out.device)
    with on(out.device):
        _outer[(triton.cdiv(rows, bo), triton.cdiv(columns, bi), splits)](
            part, grad, activation, samples, positions, rows, columns, triton.cdiv(samples, splits),
            *grad.stride(), *activation.stride(), POWER=power, ONE=positions == 1, A=TYPES[out.dtype],
            PRECISION=_precision(grad, out, positions == 1), BO=bo, BI=bi, BK=16,
            num_warps=8 if bo * bi > 1024 else 4, num_stages=2, **OPTIONS,
        )  # fmt: skip
    out.add_(part.sum(0) if splits > 1 else part[0])


def accumulate_conv_(
    out: Tensor,
    grad: Tensor,
    input: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    power: int,
) -> None:
    if 0 in (out.numel(), grad.numel(), input.numel()):
        return
    missing = 3 - len(stride)
    stride, dilation = [1] * missing + list(stride), [1] * missing + list(dilation)
    padding = [0] * missing + list(padding)
    kernel = [1] * missing + list(out.shape[2:])
    x = input.reshape(*input.shape[:2], *[1] * missing, *input.shape[2:]) if missing else input
    positions = [1] * missing + list(grad.shape[2:])
    g = grad.flatten(2)  # a copy only where its places do not follow each other at one distance
    rows, k = out.shape[0], out.shape[1:].numel()
    per_group = rows // groups
    bo, bi = _tile(per_group), _tile(k)
    tiles = triton.cdiv(per_group, bo)
    samples = grad.shape[0]
    splits = _splits(samples, groups * tiles * triton.cdiv(k, bi), out.numel())
    part = torch.empty(splits, *out.shape, dtype=out.dtype, device=out.device)
    with on(out.device):
        _conv[(groups * tiles, triton.cdiv(k, bi), splits)](
            part, g, x, samples, rows, out.shape[1], *x.shape[2:], g.shape[2], positions[1], positions[2], k,
            triton.cdiv(samples, splits), per_group, tiles, *g.stride(), *x.stride(),
            SD=stride[0], SH=stride[1], SW=stride[2], PD=padding[0], PH=padding[1], PW=padding[2],
            DD=dilation[0], DH=dilation[1], DW=dilation[2], KD=kernel[0], KH=kernel[1], KW=kernel[2],
            POWER=power, A=TYPES[out.dtype], PRECISION=_precision(grad, out),
            BO=bo, BI=bi, BK=16, num_warps=8 if bo * bi > 1024 else 4, num_stages=2, **OPTIONS,
        )  # fmt: skip
    out.add_(part.sum(0) if splits > 1 else part[0])


def accumulate_affine_(
    weights: list[Tensor], biases: list[Tensor], grad: Tensor, normalised: list[Tensor], power: int
) -> None:
    outs = [*weights, *biases]
    if not outs or 0 in grad.shape:
        return
    samples, positions, channels = grad.shape
    bc = max(16, min(128, triton.next_power_of_2(channels)))
    bp = max(1, min(2048 // bc, triton.next_power_of_2(positions)))
    tiles = triton.cdiv(channels, bc)
    splits = _splits(samples, tiles, channels)
    parts = [torch.empty(splits, channels, dtype=t.dtype, device=t.device) for t in outs]
    x, shift, scale = normalised or (grad, grad, grad)
    with on(grad.device):
        _affine[(tiles, splits)](
            parts[0], parts[-1], grad, x, shift, scale, samples, positions, channels, triton.cdiv(samples, splits),
            *grad.stride(), *x.stride(), *shift.stride(), *scale.stride(),
            POWER=power, HAS_WEIGHT=bool(weights), HAS_BIAS=bool(biases), A=TYPES[outs[0].dtype],
            BP=bp, BC=bc, num_warps=4, **OPTIONS,
        )  # fmt: skip
    for out, part in zip(outs, parts, strict=True):
        out.add_(part.sum(0))
