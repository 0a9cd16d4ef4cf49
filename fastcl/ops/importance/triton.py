"""Triton form of csrc/importance."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._sweep import sweep
from .._triton import load, number, store, within
from .triton_samples import accumulate_affine_, accumulate_conv_, accumulate_outer_

__all__ = [
    "accumulate_affine_",
    "accumulate_conv_",
    "accumulate_outer_",
    "accumulate_path_",
    "accumulate_walk_",
    "consolidate_path_",
    "merge_anchored_",
    "merge_importances_",
    "quadratic_penalty",
    "quadratic_penalty_backward",
    "quadratic_penalty_grad_",
    "score_walk_",
]


@triton.jit
def quadratic_slope(p, anchor, importance, strength):
    return strength * importance * (p - anchor)


@triton.jit
def share_of(old, fresh):
    """Where the minimum of F (t - a)^2 + f (t - p)^2 lies between a and p."""
    total = old + fresh
    return tl.where(total > 0, fresh / tl.where(total > 0, total, 1), 1)


@triton.jit
def _penalty(p, i, left, free, aux, s, F: tl.constexpr, A: tl.constexpr, FULL: tl.constexpr):
    # p: params, anchors, importances
    drift = load(p[0], i, left, A, FULL) - load(p[1], i, left, A, FULL)
    return within(load(p[2], i, left, A, FULL) * drift * drift, i, left, FULL)


@triton.jit
def _penalty_backward(p, i, left, free, aux, s, F: tl.constexpr, A: tl.constexpr, FULL: tl.constexpr):
    w, anchor, f = load(p[1], i, left, A, FULL), load(p[2], i, left, A, FULL), load(p[3], i, left, A, FULL)
    store(p[0], i, tl.load(aux).to(A) * quadratic_slope(w, anchor, f, number(s[0], A)), left, FULL)


@triton.jit
def _penalty_grad(p, i, left, free, aux, s, F: tl.constexpr, A: tl.constexpr, FULL: tl.constexpr):
    # p: grads, params, anchors, importances
    w, anchor, f = load(p[1], i, left, A, FULL), load(p[2], i, left, A, FULL), load(p[3], i, left, A, FULL)
    g = load(p[0], i, left, A, FULL) + quadratic_slope(w, anchor, f, number(s[0], A))
    store(p[0], i, g, left, FULL)
    drift = w - anchor
    return within(f * drift * drift, i, left, FULL)


@triton.jit
def _path(p, i, left, free, aux, s, F: tl.constexpr, A: tl.constexpr, FULL: tl.constexpr):
    # p: omegas, grads, params, before
    step = load(p[2], i, left, A, FULL) - load(p[3], i, left, A, FULL)
    store(p[0], i, load(p[0], i, left, A, FULL) - load(p[1], i, left, A, FULL) * step, left, FULL)


@triton.jit
def _walk(p, i, left, free, aux, s, F: tl.constexpr, A: tl.constexpr, FULL: tl.constexpr):
    # p: fishers, gains, moved, grads, params, before
    alpha = number(s[0], A)
    g = load(p[3], i, left, A, FULL)
    step = load(p[4], i, left, A, FULL) - load(p[5], i, left, A, FULL)
    store(p[0], i, (1 - alpha) * load(p[0], i, left, A, FULL) + alpha * g * g, left, FULL)
    store(p[1], i, load(p[1], i, left, A, FULL) - g * step, left, FULL)
    store(p[2], i, load(p[2], i, left, A, FULL) + step, left, FULL)


@triton.jit
def _score(p, i, left, free, aux, s, F: tl.constexpr, A: tl.constexpr, FULL: tl.constexpr):
    # p: scores, gains, moved, fishers
    gain, moved = load(p[1], i, left, A, FULL), load(p[2], i, left, A, FULL)
    score = gain / (0.5 * load(p[3], i, left, A, FULL) * moved * moved + number(s[0], A))
    store(p[0], i, load(p[0], i, left, A, FULL) + tl.where(score < 0, 0, score), left, FULL)
    store(p[1], i, gain * 0, left, FULL)
    store(p[2], i, gain * 0, left, FULL)


@triton.jit
def _consolidate(p, i, left, free, aux, s, F: tl.constexpr, A: tl.constexpr, FULL: tl.constexpr):
    # p: importances, omegas, starts, params
    omega, w = load(p[1], i, left, A, FULL), load(p[3], i, left, A, FULL)
    distance = w - load(p[2], i, left, A, FULL)
    fresh = tl.where(omega < 0, 0, omega) / (distance * distance + number(s[0], A))
    store(p[0], i, load(p[0], i, left, A, FULL) + fresh, left, FULL)
    store(p[1], i, tl.zeros(i.shape, A), left, FULL)
    store(p[2], i, w, left, FULL)


@triton.jit
def _merge(p, i, left, free, aux, s, F: tl.constexpr, A: tl.constexpr, FULL: tl.constexpr):
    # p: importances, fresh
    old, fresh = load(p[0], i, left, A, FULL), load(p[1], i, left, A, FULL)
    store(p[0], i, number(s[0], A) * old + number(s[1], A) * fresh, left, FULL)


@triton.jit
def _merge_anchored(p, i, left, free, aux, s, F: tl.constexpr, A: tl.constexpr, FULL: tl.constexpr):
    # p: importances, anchors, fresh, params
    old, fresh = load(p[0], i, left, A, FULL), load(p[2], i, left, A, FULL)
    anchor = load(p[1], i, left, A, FULL)
    apart = load(p[3], i, left, A, FULL) - anchor
    share = share_of(old, fresh)
    store(p[1], i, anchor + share * apart, left, FULL)
    store(p[0], i, old + fresh, left, FULL)
    return within(0.5 * old * share * apart * apart, i, left, FULL)


def quadratic_penalty(
    params: list[Tensor], anchors: list[Tensor], importances: list[Tensor], strength: float, check: bool
) -> Tensor:
    if not params:
        return torch.zeros(())
    total = sweep(_penalty, [params, anchors, importances], written=0, total=True)
    return _value(total, params, strength)


def quadratic_penalty_backward(
    grad_value: Tensor, params: list[Tensor], anchors: list[Tensor], importances: list[Tensor], strength: float
) -> list[Tensor]:
    grads = [torch.empty_like(p) for p in params]
    lists = [grads, params, anchors, importances]
    sweep(_penalty_backward, lists, [strength], written=1, aux=[grad_value] * len(params))
    return grads


def quadratic_penalty_grad_(
    grads: list[Tensor],
    params: list[Tensor],
    anchors: list[Tensor],
    importances: list[Tensor],
    strength: float,
    check: bool,
) -> Tensor:
    if not params:
        return torch.zeros(())
    total = sweep(_penalty_grad, [grads, params, anchors, importances], [strength], written=1, total=True)
    return _value(total, params, strength)


def _value(total: Tensor, params: list[Tensor], strength: float) -> Tensor:
    dtype = torch.float64 if any(p.dtype == torch.float64 for p in params) else torch.float32
    return (0.5 * strength * total).to(dtype)


def accumulate_path_(omegas: list[Tensor], grads: list[Tensor], params: list[Tensor], before: list[Tensor]) -> None:
    sweep(_path, [omegas, grads, params, before], written=1)


def accumulate_walk_(
    fishers: list[Tensor],
    gains: list[Tensor],
    moved: list[Tensor],
    grads: list[Tensor],
    params: list[Tensor],
    before: list[Tensor],
    alpha: float,
) -> None:
    sweep(_walk, [fishers, gains, moved, grads, params, before], [alpha], written=3)


def score_walk_(
    scores: list[Tensor], gains: list[Tensor], moved: list[Tensor], fishers: list[Tensor], epsilon: float
) -> None:
    sweep(_score, [scores, gains, moved, fishers], [epsilon], written=3)


def consolidate_path_(
    importances: list[Tensor], omegas: list[Tensor], starts: list[Tensor], params: list[Tensor], xi: float
) -> None:
    sweep(_consolidate, [importances, omegas, starts, params], [xi], written=3)


def merge_importances_(importances: list[Tensor], fresh: list[Tensor], old_share: float, fresh_share: float) -> None:
    sweep(_merge, [importances, fresh], [old_share, fresh_share], written=1)


def merge_anchored_(
    importances: list[Tensor], anchors: list[Tensor], fresh: list[Tensor], params: list[Tensor]
) -> Tensor:
    if not params:
        return torch.zeros((), dtype=torch.float64)
    return sweep(_merge_anchored, [importances, anchors, fresh, params], written=2, total=True)
