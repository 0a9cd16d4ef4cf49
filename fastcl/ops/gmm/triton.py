"""Triton form of csrc/gmm."""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._sweep import OPTIONS, TYPES, on
from .reference import shares

# ---- normals: csrc/gmm/math.h in Triton ----


@triton.jit
def log_unit(u):
    """log of a float in (0, 1] without a branch, so that CPU and GPU compute one formula."""
    if u.dtype == tl.float64:
        return tl.log(u)
    shifted = u.to(tl.int32, bitcast=True) - 0x3F3504F3
    n = (shifted >> 23).to(tl.float32)
    f = ((shifted & 0x7FFFFF) + 0x3F3504F3).to(tl.float32, bitcast=True) - 1
    p = -7.635556257e-2 * f + 1.276162402e-1
    p = p * f - 1.315975386e-1
    p = p * f + 1.420171585e-1
    p = p * f - 1.662340295e-1
    p = p * f + 2.000123117e-1
    p = p * f - 2.500081960e-1
    p = p * f + 3.333333161e-1
    return n * 6.931471806e-1 + (f * f * (f * p - 0.5) + f)


@triton.jit
def sincos_half_turn(h):
    """Of pi h, for |h| <= 1/2."""
    if h.dtype == tl.float64:
        return tl.sin(h * 3.14159265358979323846), tl.cos(h * 3.14159265358979323846)
    y = h * h
    s = 7.722224761e-2 * y - 5.980464497e-1
    s = s * y + 2.550031641
    s = s * y - 5.167706900
    s = s * y + 3.141592581
    c = -2.442107905e-2 * y + 2.349541715e-1
    c = c * y - 1.335216161
    c = c * y + 4.058709605
    c = c * y - 4.934802156
    return s * h, c * y + 1


@triton.jit
def box_muller(a, b, A: tl.constexpr):
    """Two words to two normals; u is defined as rounded to float32, the nearest half turn is taken off in integers."""
    u = a.to(tl.float32) * 2.3283064365386963e-10 + 1.1641532182693481e-10
    half_turn = (b + 0x40000000) & 0x80000000
    rest = (b ^ half_turn).to(tl.int32, bitcast=True)
    s, c = sincos_half_turn(rest.to(A) * tl.full((1,), 4.656612873077393e-10, A))
    r = tl.sqrt(-2 * log_unit(u.to(A)))
    r = tl.where(half_turn != 0, -r, r)
    return r * c, r * s


@triton.jit
def four_normals(key, quad, sample, A: tl.constexpr):
    """The normals of features 4 quad to 4 quad + 3 of a sample (int64), as csrc/gmm/blocks.h counts."""
    low, high = (sample & 0xFFFFFFFF).to(tl.uint32), (sample >> 32).to(tl.uint32)
    a, b, c, d = tl.philox(key, quad.to(tl.uint32), low, tl.zeros_like(low), high)
    x0, x1 = box_muller(a, b, A)
    x2, x3 = box_muller(c, d, A)
    return x0, x1, x2, x3


@triton.jit
def _sample_full(
    z, order, starts, blocks_before, means, factors, key: tl.int64, key_at, D,
    K: tl.constexpr, A: tl.constexpr, KEY_ON_DEVICE: tl.constexpr, PRECISION: tl.constexpr,
    BN: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    """BN samples of one component, BD features: z = mu + sum over blocks of features e of eps_e L_de."""
    block = tl.program_id(0)
    low, high = 0, K  # the component: the last k with blocks_before[k] <= block
    while high - low > 1:
        middle = (low + high) // 2
        if tl.load(blocks_before + middle) <= block:
            low = middle
        else:
            high = middle
    k = tl.cast(low, tl.int64)
    begin = tl.load(starts + k) + (block - tl.load(blocks_before + k)) * BN
    end = tl.load(starts + k + 1)
    if begin < end:
        if KEY_ON_DEVICE:
            key = tl.load(key_at)
        place = begin + tl.arange(0, BN)
        inside = place < end
        sample = tl.load(order + place, mask=inside, other=0)
        d = tl.program_id(1) * BD + tl.arange(0, BD)
        acc = tl.zeros((BN, BD), A)
        for e0 in range(0, tl.minimum(D, (tl.program_id(1) + 1) * BD), BE):
            quad = e0 // 4 + tl.arange(0, BE // 4)
            both = tl.zeros((BN, BE // 4), tl.int64)
            x0, x1, x2, x3 = four_normals(key, quad[None, :] + both, sample[:, None] + both, A)
            eps = tl.reshape(tl.join(tl.join(x0, x2), tl.join(x1, x3)), (BN, BE))
            e = e0 + tl.arange(0, BE)
            # the triangle by select: a mask on the load would make it scalar
            f = tl.load(factors + (k * D + d[:, None]) * D + e[None, :],
                        mask=(d < D)[:, None] & (e < D)[None, :], other=0).to(A)  # fmt: skip
            f = tl.where(e[None, :] <= d[:, None], f, 0)
            acc = tl.dot(eps, tl.trans(f), acc, input_precision=PRECISION, out_dtype=A)
        acc += tl.load(means + k * D + d, mask=d < D, other=0).to(A)[None, :]
        to = z + sample[:, None] * D + d[None, :]
        tl.store(to, acc.to(z.dtype.element_ty), mask=inside[:, None] & (d < D)[None, :])


@triton.jit
def _sample_diagonal(
    z, labels, means, deviations, key: tl.int64, key_at, N: tl.int64, D,
    SPHERICAL: tl.constexpr, A: tl.constexpr, KEY_ON_DEVICE: tl.constexpr, BN: tl.constexpr, BQ: tl.constexpr,
):  # fmt: skip
    """BN samples, BQ quads of features."""
    if KEY_ON_DEVICE:
        key = tl.load(key_at)
    sample = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    k = tl.load(labels + sample, mask=sample < N, other=0)
    quad = tl.program_id(1) * BQ + tl.arange(0, BQ)
    both = tl.zeros((BN, BQ), tl.int64)
    x0, x1, x2, x3 = four_normals(key, quad[None, :] + both, sample[:, None] + both, A)
    eps = tl.reshape(tl.join(tl.join(x0, x2), tl.join(x1, x3)), (BN, 4 * BQ))
    d = tl.program_id(1) * BQ * 4 + tl.arange(0, 4 * BQ)
    inside = (sample < N)[:, None] & (d < D)[None, :]
    if SPHERICAL:
        scale = tl.load(deviations + k).to(A)[:, None]
    else:
        scale = tl.load(deviations + k[:, None] * D + d[None, :], mask=inside, other=0).to(A)
    value = tl.load(means + k[:, None] * D + d[None, :], mask=inside, other=0).to(A) + scale * eps
    tl.store(z + sample[:, None] * D + d[None, :], value.to(z.dtype.element_ty), mask=inside)


def gmm_sample(labels: Tensor, means: Tensor, scale_trils: Tensor, key: Tensor) -> Tensor:
    samples, (components, features) = labels.shape[0], means.shape
    z = means.new_empty(samples, features)
    if samples == 0:
        return z
    labels, means, scale = labels.contiguous(), means.contiguous(), scale_trils.contiguous()
    arithmetic = tl.float64 if means.dtype == torch.float64 else tl.float32
    on_device = key.device.type == "cuda"
    number = 0 if on_device else int(key)
    with on(means.device):
        if scale.dim() < 3:
            bq = min(8, triton.next_power_of_2(triton.cdiv(features, 4)))
            bn = 256 // bq
            _sample_diagonal[(triton.cdiv(samples, bn), triton.cdiv(features, 4 * bq))](
                z, labels, means, scale, number, key if on_device else labels, samples, features,
                SPHERICAL=scale.dim() == 1, A=arithmetic, KEY_ON_DEVICE=on_device, BN=bn, BQ=bq,
                num_warps=4, **OPTIONS,
            )  # fmt: skip
            return z
        # samples of a component side by side, without asking the device how many there are
        ordered, order = torch.sort(labels, stable=True)
        starts = torch.searchsorted(ordered, torch.arange(components + 1, device=labels.device))
        bn = 16
        blocks = (starts.diff() + bn - 1) // bn
        before = blocks.cumsum(0) - blocks
        bd = max(16, min(128, triton.next_power_of_2(features)))
        _sample_full[(triton.cdiv(samples, bn) + components, triton.cdiv(features, bd))](
            z, order, starts, before, means, scale, number, key if on_device else labels, features,
            K=components, A=arithmetic, KEY_ON_DEVICE=on_device, PRECISION=_precision(means),
            BN=bn, BD=bd, BE=16, num_warps=4, **OPTIONS,
        )  # fmt: skip
    return z


def _precision(t: Tensor) -> str:
    return "ieee" if t.dtype == torch.float64 or torch.version.hip else "tf32x3"


# ---- density ----


@triton.jit
def _density_full(
    out, x, means, whitening, logs, N, D, K, xn: tl.int64, xd,
    A: tl.constexpr, PRECISION: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    """out[n, k] = logs[k] - |W_k (x - mu_k)|^2 / 2 with the lower triangular W = L^-1."""
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    k = tl.program_id(1).to(tl.int64)
    square = tl.zeros((BN,), A)
    for d0 in range(0, D, BD):
        d = d0 + tl.arange(0, BD)
        y = tl.zeros((BN, BD), A)
        for e0 in range(0, tl.minimum(D, d0 + BD), BE):
            e = e0 + tl.arange(0, BE)
            value = tl.load(x + n.to(tl.int64)[:, None] * xn + e[None, :] * xd,
                            mask=(n < N)[:, None] & (e < D)[None, :], other=0).to(A)  # fmt: skip
            apart = value - tl.load(means + k * D + e, mask=e < D, other=0).to(A)[None, :]
            w = tl.load(whitening + (k * D + d[:, None]) * D + e[None, :],
                        mask=(d < D)[:, None] & (e < D)[None, :], other=0)  # fmt: skip
            y = tl.dot(tl.where((n < N)[:, None] & (e < D)[None, :], apart, 0), tl.trans(w), y,
                       input_precision=PRECISION, out_dtype=A)  # fmt: skip
        square += tl.sum(y * y, 1)
    value = tl.load(logs + k) - 0.5 * square
    tl.store(out + n.to(tl.int64) * K + k, value.to(out.dtype.element_ty), mask=n < N)


@triton.jit
def _density_diagonal(
    out, x, means, whitening, logs, N, D, K, xn: tl.int64, xd, wk, wd,
    A: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    k = tl.program_id(1).to(tl.int64)
    square = tl.zeros((BN, BD), A)
    for d0 in range(0, D, BD):
        d = d0 + tl.arange(0, BD)
        inside = (n < N)[:, None] & (d < D)[None, :]
        value = tl.load(x + n.to(tl.int64)[:, None] * xn + d[None, :] * xd, mask=inside, other=0).to(A)
        apart = value - tl.load(means + k * D + d, mask=d < D, other=0).to(A)[None, :]
        y = apart * tl.load(whitening + k * wk + d * wd, mask=d < D, other=0)[None, :]
        square += tl.where(inside, y * y, 0)
    value = tl.load(logs + k) - 0.5 * tl.sum(square, 1)
    tl.store(out + n.to(tl.int64) * K + k, value.to(out.dtype.element_ty), mask=n < N)


def gmm_log_prob(x: Tensor, means: Tensor, scale_trils: Tensor) -> Tensor:
    return _log_prob(x, means, scale_trils, x.dtype)


def _log_prob(x: Tensor, means: Tensor, scale_trils: Tensor, dtype: torch.dtype) -> Tensor:
    samples, (components, features) = x.shape[0], means.shape
    out = x.new_empty(samples, components, dtype=dtype)
    if samples == 0:
        return out
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    means, scale = means.contiguous(), scale_trils.to(wide)
    diagonal = scale.diagonal(dim1=1, dim2=2) if scale.dim() == 3 else scale
    logs = diagonal.double().log()
    logs = logs.sum(1) if diagonal.dim() == 2 else logs * features
    logs = (-logs - 0.5 * features * math.log(2 * math.pi)).to(wide)
    with on(x.device):
        if scale.dim() == 3:
            eye = torch.eye(features, dtype=wide, device=x.device).expand_as(scale)
            whitening = torch.linalg.solve_triangular(scale.tril(), eye, upper=False).contiguous()
            bd = max(16, min(64, triton.next_power_of_2(features)))
            _density_full[(triton.cdiv(samples, 64), components)](
                out, x, means, whitening, logs, samples, features, components, *x.stride(),
                A=TYPES[wide], PRECISION=_precision(x), BN=64, BD=bd, BE=16, num_warps=8 if bd == 64 else 4,
                num_stages=2, **OPTIONS,
            )  # fmt: skip
        else:
            whitening = 1 / scale
            strides = whitening.stride() if whitening.dim() == 2 else (whitening.stride(0), 0)
            bd = max(1, min(64, triton.next_power_of_2(features)))
            _density_diagonal[(triton.cdiv(samples, 64), components)](
                out, x, means, whitening, logs, samples, features, components, *x.stride(), *strides,
                A=TYPES[wide], BN=64, BD=bd, num_warps=4, **OPTIONS,
            )  # fmt: skip
    return out


def gmm_responsibilities(x: Tensor, weights: Tensor, means: Tensor, scale_trils: Tensor) -> tuple[Tensor, Tensor]:
    """The densities by the kernel above; the rest torch does on a GPU in passes over [N, K]."""
    log_prob = _log_prob(x, means, scale_trils, torch.promote_types(x.dtype, torch.float32))
    return shares(log_prob, weights, x.dtype)


# ---- moments ----


@triton.jit
def _moments(
    s0, s1, s2, x, r, order, starts, centers, N: tl.int64, D, K, per_split, tiles, splits,
    xn: tl.int64, xd, rn: tl.int64, rk,
    CLASSES: tl.constexpr, FULL_COVARIANCE: tl.constexpr, A: tl.constexpr, PRECISION: tl.constexpr,
    BD: tl.constexpr, BN: tl.constexpr, FLUSH: tl.constexpr,
):  # fmt: skip
    """s0 [split, K], s1 [split, K, D], s2 [split, K, D, D] or [split, K, D] about the centres. FLUSH samples are summed
    in the arithmetic type, those sums in float64."""
    k = tl.program_id(1).to(tl.int64)
    split = tl.program_id(2).to(tl.int64)
    row, column = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    if row >= column:
        i, j = row * BD + tl.arange(0, BD), column * BD + tl.arange(0, BD)
        center_i = tl.load(centers + k * D + i, mask=i < D, other=0).to(A)
        center_j = tl.load(centers + k * D + j, mask=j < D, other=0).to(A)
        if CLASSES:  # the class's own samples, in their order
            low, high = tl.load(starts + k), tl.load(starts + k + 1)
            share = (high - low + splits - 1) // splits
            begin = low + split * share
            end = tl.minimum(high, begin + share)
        else:
            begin = split * per_split
            end = tl.minimum(N, begin + per_split)
        count = tl.zeros((BN,), tl.float64)
        first = tl.zeros((BD,), tl.float64)
        if FULL_COVARIANCE:
            second = tl.zeros((BD, BD), tl.float64)
        else:
            second = tl.zeros((BD,), tl.float64)
        flush = begin
        while flush < end:
            until = tl.minimum(end, flush + FLUSH)
            count_ = tl.zeros((BN,), A)
            first_ = tl.zeros((BN, BD), A)
            if FULL_COVARIANCE:
                second_ = tl.zeros((BD, BD), A)
            else:
                second_ = tl.zeros((BN, BD), A)
            at = flush
            while at < until:
                n = at + tl.arange(0, BN)
                inside = n < until
                if CLASSES:
                    n = tl.load(order + n, mask=inside, other=0)
                    weight = tl.where(inside, 1, 0).to(A)
                else:
                    weight = tl.load(r + n * rn + k * rk, mask=inside, other=0).to(A)
                left = tl.load(x + n[:, None] * xn + i[None, :] * xd,
                               mask=inside[:, None] & (i < D)[None, :], other=0).to(A)  # fmt: skip
                left = tl.where(inside[:, None] & (i < D)[None, :], left - center_i[None, :], 0)
                weighted = left * weight[:, None]
                count_ += weight
                first_ += weighted
                if FULL_COVARIANCE:
                    right = tl.load(x + n[:, None] * xn + j[None, :] * xd,
                                    mask=inside[:, None] & (j < D)[None, :], other=0).to(A)  # fmt: skip
                    right = tl.where(inside[:, None] & (j < D)[None, :], right - center_j[None, :], 0)
                    second_ = tl.dot(tl.trans(weighted), right, second_, input_precision=PRECISION, out_dtype=A)
                else:
                    second_ += weighted * left
                at += BN
            count += count_.to(tl.float64)
            first += tl.sum(first_, 0).to(tl.float64)
            if FULL_COVARIANCE:
                second += second_.to(tl.float64)
            else:
                second += tl.sum(second_, 0).to(tl.float64)
            flush += FLUSH
        of = split * K + k
        if column == 0:
            tl.store(s1 + of * D + i, first, mask=i < D)
            if row == 0:
                tl.store(s0 + of, tl.sum(count))
        if FULL_COVARIANCE:
            inside = (i < D)[:, None] & (j < D)[None, :]
            tl.store(s2 + (of * D + i[:, None]) * D + j[None, :], second, mask=inside)
        else:
            tl.store(s2 + of * D + i, second, mask=i < D)


def _statistics(
    x: Tensor, centers: Tensor, full: bool, responsibilities: Tensor | None, labels: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    samples, (components, features) = x.shape[0], centers.shape
    bd = max(16, min(32, triton.next_power_of_2(features)))
    tiles = triton.cdiv(features, bd)
    pairs = tiles * tiles if full else tiles
    work = samples if labels is None else triton.cdiv(samples, components)
    numel = components * features * (features if full else 1)
    splits = max(1, min(triton.cdiv(264, pairs * components), triton.cdiv(work, 1024), (1 << 22) // numel))
    make = lambda *shape: torch.zeros(splits, components, *shape, dtype=torch.float64, device=x.device)  # noqa: E731
    s0, s1, s2 = make(), make(features), make(features, features) if full else make(features)
    order = starts = x
    if labels is not None:
        ordered, order = torch.sort(labels, stable=True)
        starts = torch.searchsorted(ordered, torch.arange(components + 1, device=x.device))
    r = x if responsibilities is None else responsibilities
    arithmetic = tl.float64 if x.dtype == torch.float64 else tl.float32
    if samples:
        # one column of tiles where only the diagonal is wanted: pairs (row, 0)
        with on(x.device):
            _moments[(pairs, components, splits)](
                s0, s1, s2, x, r, order, starts, centers.contiguous(), samples, features, components,
                triton.cdiv(samples, splits), tiles if full else 1, splits, *x.stride(), *r.stride(),
                CLASSES=labels is not None, FULL_COVARIANCE=full, A=arithmetic, PRECISION=_precision(x),
                BD=bd, BN=32, FLUSH=1024, num_warps=4, num_stages=2, **OPTIONS,
            )  # fmt: skip
    s0, s1, s2 = s0.sum(0), s1.sum(0), s2.sum(0)
    return s0, s1, s2.tril() + s2.tril(-1).mT if full else s2


def gmm_statistics(x: Tensor, responsibilities: Tensor, centers: Tensor, full: bool) -> tuple[Tensor, Tensor, Tensor]:
    return _statistics(x, centers, full, responsibilities, None)


def gmm_class_statistics(x: Tensor, labels: Tensor, centers: Tensor, full: bool) -> tuple[Tensor, Tensor, Tensor]:
    return _statistics(x, centers, full, None, labels.contiguous())
