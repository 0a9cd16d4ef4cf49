"""Triton form of csrc/proximal."""

import triton
import triton.language as tl
from torch import Tensor

from .._sweep import sweep
from .._triton import load, number, store


@triton.jit
def _soft_threshold(p, i, left, free, aux, s, F: tl.constexpr, A: tl.constexpr, FULL: tl.constexpr):
    w = load(p[0], i, left, A, FULL)
    shrunk = tl.abs(w) - number(s[0], A)
    store(p[0], i, tl.where(shrunk <= 0, 0, tl.where(w < 0, -shrunk, shrunk)), left, FULL)


def soft_threshold_(tensors: list[Tensor], threshold: float) -> None:
    sweep(_soft_threshold, [tensors], [threshold], written=1)
