"""Triton form of csrc/proximal."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import _check
from .._sweep import OPTIONS, in_order, on, sweep
from .._triton import load, number, store


@triton.jit
def _soft_threshold(p, i, left, free, aux, s, F: tl.constexpr, A: tl.constexpr, FULL: tl.constexpr):
    w = load(p[0], i, left, A, FULL)
    shrunk = tl.abs(w) - number(s[0], A)
    store(p[0], i, tl.where(shrunk <= 0, 0, tl.where(w < 0, -shrunk, shrunk)), left, FULL)


def soft_threshold_(tensors: list[Tensor], threshold: float) -> None:
    sweep(_soft_threshold, [tensors], [threshold], written=1)


@triton.jit
def _groups(
    w, anchor, norms, outer: tl.int64, groups, inner: tl.int64, threshold_: tl.float64,
    DRIFT: tl.constexpr, A: tl.constexpr, BE: tl.constexpr, BG: tl.constexpr,
):  # fmt: skip
    """BG slices of w [outer, groups, inner]: their norms are written if DRIFT, else the slices are scaled."""
    g = tl.program_id(0) * BG + tl.arange(0, BG)
    total = outer * inner
    acc = tl.zeros((BE, BG), tl.float64)
    for start in range(0, total, BE):
        e = start + tl.arange(0, BE).to(tl.int64)
        i = ((e // inner) * groups * inner + e % inner)[:, None] + g[None, :] * inner
        inside = (e < total)[:, None] & (g < groups)[None, :]
        d = tl.load(w + i, mask=inside, other=0).to(tl.float64)
        if DRIFT:
            d -= tl.load(anchor + i, mask=inside, other=0).to(tl.float64)
        acc += d * d
    norm = tl.sqrt(tl.sum(acc, 0))
    if DRIFT:
        tl.store(norms + g, norm.to(norms.dtype.element_ty), mask=g < groups)
    else:
        threshold = number(threshold_, tl.float64)
        scale = tl.where(norm <= threshold, 0, 1 - threshold / norm).to(A)
        for start in range(0, total, BE):
            e = start + tl.arange(0, BE).to(tl.int64)
            i = ((e // inner) * groups * inner + e % inner)[:, None] + g[None, :] * inner
            inside = (e < total)[:, None] & (g < groups)[None, :]
            value = tl.load(w + i, mask=inside, other=0).to(A) * scale[None, :]
            tl.store(w + i, value.to(w.dtype.element_ty), mask=inside)


def _launch(w: Tensor, anchor: Tensor, norms: Tensor, threshold: float, dim: int, drift: bool) -> None:
    """`w` and `anchor` without gaps, in one memory order."""
    groups = w.shape[dim]
    inner = w.stride(dim) if groups > 1 else w.numel()
    outer = w.numel() // (groups * inner)
    with on(w.device):
        _groups[(triton.cdiv(groups, 16),)](
            w, anchor, norms, outer, groups, inner, threshold, DRIFT=drift,
            A=tl.float64 if w.dtype == torch.float64 else tl.float32, BE=64, BG=16, num_warps=4, **OPTIONS,
        )  # fmt: skip


def group_soft_threshold_(tensors: list[Tensor], threshold: float, dim: int) -> None:
    for given in tensors:
        if given.numel():
            w = _check.dense(given)
            _launch(w, w, w, threshold, dim, False)
            if w is not given:
                given.copy_(w)


def drift_norms(tensors: list[Tensor], anchors: list[Tensor], dim: int) -> list[Tensor]:
    found = []
    for given, anchor in zip(tensors, anchors, strict=True):
        w = _check.dense(given)
        wide = torch.promote_types(w.dtype, torch.float32)
        norms = torch.zeros(w.shape[dim], dtype=wide, device=w.device)
        if w.numel():
            _launch(w, in_order(anchor, w), norms, 0.0, dim, True)
        found.append(norms)
    return found
