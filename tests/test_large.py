"""Past 2^31 elements: every kernel once, on a few MiB. Skipped by default: `make large` (see conftest.py).

A `vast` tensor has 2^31 elements more than its sample, all of them one window of zeros mapped again and again, and at
its end the sample itself in memory of its own. An index that is not 64 bits wide never arrives there, or faults.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from fastcl import _ops

from .samples import OPS, mapped, op_name, positive, tensors, values

pytestmark = [
    pytest.mark.large,
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="maps memory twice as Linux does"),
]

PAST = 2**31
WINDOW = 2**24  # bytes mapped again and again: small enough for a cache, large enough for the number of mappings
Vast = Callable[..., Tensor]
MAP_FIXED, MAP_NORESERVE = 0x10, 0x4000  # as on every Linux that torch runs on; Python has no names for them


class Mappings:
    def __init__(self) -> None:
        self.libc = ctypes.CDLL(None, use_errno=True)
        self.libc.mmap.restype = ctypes.c_void_p
        self.libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
        self.libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
        self.mapped: list[tuple[int, int]] = []

    def map(self, at: int | None, size: int, flags: int, file: int = -1) -> int:
        found = self.libc.mmap(at, size, mmap.PROT_READ | mmap.PROT_WRITE, flags, file, 0)
        if found in (None, ctypes.c_void_p(-1).value):
            raise OSError(ctypes.get_errno(), f"mmap of {size} bytes")
        return found

    def zeros(self, nbytes: int, own: int) -> int:
        """Where `nbytes` begin, of which the last `own` are not shared with the rest."""
        tail = math.ceil(own / WINDOW + 1) * WINDOW
        whole = math.ceil(nbytes / WINDOW) * WINDOW
        start = self.map(None, whole, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE)
        self.mapped.append((start, whole))
        file = os.memfd_create("vast")
        os.ftruncate(file, WINDOW)
        for offset in range(0, whole - tail, WINDOW):
            self.map(start + offset, WINDOW, mmap.MAP_SHARED | MAP_FIXED, file)
        os.close(file)
        return start

    def close(self) -> None:
        for start, size in self.mapped:
            assert self.libc.munmap(start, size) == 0


@pytest.fixture
def vast() -> Iterator[Vast]:
    """A contiguous tensor of the given shape, all zero until its last elements, which are `tail`'s."""
    mappings = Mappings()

    def make(tail: Tensor, shape: tuple[int, ...]) -> Tensor:
        n, size = math.prod(shape), tail.element_size()
        start = mappings.zeros(n * size, tail.numel() * size)
        whole = torch.frombuffer((ctypes.c_byte * (n * size)).from_address(start), dtype=tail.dtype)
        whole[n - tail.numel() :] = tail.reshape(-1)
        return whole.view(shape)

    torch.use_deterministic_algorithms(False)  # it fills what is new with NaN: 2^31 elements more to write
    yield make
    mappings.close()


def run(case: str, args: Any) -> list[Tensor]:
    """What the op returns and what it leaves in its mutated arguments."""
    with torch.no_grad():
        result = _ops.catalogue[op_name(case)](*args)
    return tensors(result) + tensors(args[: OPS[case].mutates])


def check_tail(big: Tensor, small: Tensor) -> None:
    """The end of `big` is `small`; a scalar or a short result is all of it. What lies at the beginning is no NaN."""
    torch.testing.assert_close(big.reshape(-1)[big.numel() - small.numel() :], small.reshape(-1), rtol=1e-6, atol=0)
    assert big.reshape(-1)[:1000].isfinite().all()


M = 77  # elements of a sample: more than a vector of any width, and no multiple of one
# Their sums count the elements in front of the sample too: test_sums_over_all_elements.
SUMS = {"mask_sparsity", "mask_sparsity_backward", "masked_weight_kept"}


@pytest.mark.parametrize("case", [case for case in OPS if OPS[case].shaped and case not in SUMS])
def test_element_wise(vast: Vast, case: str) -> None:
    """The sample alone, and behind 2^31 zeros."""
    small = OPS[case].make((M,), torch.bfloat16, lambda t: t)
    lengths = {M: PAST, (M + 7) // 8: PAST // 8}  # a packed mask has a byte for eight

    def behind_zeros(t: Tensor) -> Tensor:
        return vast(t, (lengths[t.numel()] + t.numel(),)) if t.numel() in lengths else t.clone()

    big = mapped(small, behind_zeros)
    for a, b in zip(run(case, big), run(case, small), strict=True):
        check_tail(a, b)


def test_sums_over_all_elements(vast: Vast) -> None:
    zeros, none = torch.zeros(M, dtype=torch.bfloat16), torch.zeros(M, dtype=torch.bool)
    ones = torch.ones(M, dtype=torch.bfloat16)
    n = PAST + M
    sparsity = run("mask_sparsity", ([vast(ones, (n,))], [vast(none, (n,))]))[0]
    assert sparsity.item() == pytest.approx(M / n, rel=1e-6)
    reserved = none.clone()
    reserved[-1] = True
    gradient = run("mask_sparsity_backward", (torch.ones(()), [vast(ones, (n,))], [vast(reserved, (n,))]))[0]
    assert gradient[-2].item() == pytest.approx(1 / (n - 1), rel=2**-8)
    assert gradient[-1] == 0
    del gradient
    weight, embedding = vast(ones, (n,)), vast(zeros, (n,))
    out, kept = run("masked_weight_kept", (weight, embedding, 3.0, vast(~none, (n,)), 0.0, 0))
    assert kept.item() == pytest.approx(PAST / 2, rel=1e-6)  # sigmoid(0) each, but where reserved
    assert (out[-M:] == 0.5).all()
    assert (out[:M] == 0).all()


def test_masks_of_units(vast: Vast) -> None:
    """masked_weight with an embedding for every row, for every unit of the middle dimension, and for every column."""
    rows, columns = 2**16 + 1, 2**15 + 3
    for shape, units in (
        ((rows, columns), (rows, 1)),
        ((2, 2**15 + 1, columns), (1, 2**15 + 1, 1)),
        ((rows, columns), (1, columns)),
    ):
        tail = values((shape[-1],), torch.bfloat16)
        weight, embedding = vast(tail, shape), values(units, torch.bfloat16)
        got = run("masked_weight", (weight, embedding, 3.0, None, 0.0, 0))[0]
        last = embedding if units == (1, columns) else embedding.reshape(-1, 1)[-1:]
        check_tail(got, run("masked_weight", (tail[None], last, 3.0, None, 0.0, 0))[0])
        del got
        up = values((shape[-1],), torch.bfloat16)
        got = run("masked_weight_backward", (vast(up, shape), None, weight, embedding, 3.0, None, 0.0, 0))
        want = run("masked_weight_backward", (up[None], None, tail[None], last, 3.0, None, 0.0, 0))
        for a, b in zip(got, want, strict=True):
            check_tail(a, b)
        del got


@pytest.mark.parametrize("case", ["group_soft_threshold_", "group_soft_threshold_:columns", "drift_norms"])
def test_groups(vast: Vast, case: str) -> None:
    """Groups that lie far apart (dim 0) and side by side (dim 1)."""
    rows, columns = (3, 2**30 + 5) if OPS[case].make((5, 6), torch.float32, lambda t: t)[-1] == 0 else (2**26 + 1, 33)
    tail = values((1, min(columns, 1001)), torch.bfloat16)
    dim, w = int(rows > 3), vast(tail, (rows, columns))
    if case == "drift_norms":
        got = run(case, ([w], [vast(tail * 0, w.shape)], dim))[0]
        torch.testing.assert_close(got, run(case, ([tail], [tail * 0], dim))[0])
        return
    run(case, ([w], 0.5, dim))
    want = tail.clone()
    run(case, ([want], 0.5, dim))
    assert not torch.equal(want, tail)
    torch.testing.assert_close(w[-1:, -tail.numel() :], want, rtol=2**-7, atol=0)
    assert w[0, :1000].count_nonzero() == 0


@pytest.mark.parametrize("dim", ["O I", "N O", "N P I"])
def test_accumulate_outer(vast: Vast, dim: str) -> None:
    if dim == "O I":
        g, a = (torch.zeros(1, n, dtype=torch.bfloat16) for n in (2**16 + 1, 2**15 + 3))
        g[0, -2:], a[0, -5:] = values((2,), torch.bfloat16), values((5,), torch.bfloat16)
        out = vast(torch.zeros(2 * a.shape[1]), (g.shape[1], a.shape[1]))
        _ops.catalogue["accumulate_outer_"](out, g, a, 2)
        want = (g[:, -2:].float().T @ a[:, -5:].float()) ** 2
        torch.testing.assert_close(out[-2:, -5:], want)
        assert out[0].count_nonzero() == 0
        return
    n, positions = 2**21 + 1, (32,) if "P" in dim else ()
    wide = 1024 // math.prod(positions)
    tail, narrow = values((1, *positions, wide), torch.bfloat16), torch.zeros(n, *positions, 1, dtype=torch.bfloat16)
    narrow[-1] = values((*positions, 1), torch.bfloat16)
    big = vast(tail, (n, *positions, wide))
    pairs = [(big, narrow), (tail, narrow[-1:])]
    found = []
    for first, second in pairs if dim == "N O" else [pair[::-1] for pair in pairs]:
        found.append(torch.zeros(first.shape[-1], second.shape[-1]))
        _ops.catalogue["accumulate_outer_"](found[-1], first, second, 2)
    torch.testing.assert_close(*found)
    assert found[0].count_nonzero() == wide


@pytest.mark.parametrize("dim", ["O C", "grad", "input"])
def test_accumulate_conv(vast: Vast, dim: str) -> None:
    rest = ([1], [0], [1], 1, 2)
    if dim == "O C":
        g, x = (torch.zeros(1, n, 1, dtype=torch.bfloat16) for n in (2**16 + 1, 2**15 + 3))
        g[0, -2:], x[0, -5:] = values((2, 1), torch.bfloat16), values((5, 1), torch.bfloat16)
        out = vast(torch.zeros(2 * x.shape[1]), (g.shape[1], x.shape[1], 1))
        _ops.catalogue["accumulate_conv_"](out, g, x, *rest)
        want = (g[0, -2:].float() @ x[0, -5:].float().T) ** 2
        torch.testing.assert_close(out[-2:, -5:, 0], want)
        assert out[0].count_nonzero() == 0
        return
    n, channels, length = 2**21 + 1, 32, 32
    tail, narrow = values((1, channels, length), torch.bfloat16), torch.zeros(n, 1, length, dtype=torch.bfloat16)
    narrow[-1] = values((1, length), torch.bfloat16)
    big = vast(tail, (n, channels, length))
    pairs = [(big, narrow), (tail, narrow[-1:])]
    found = []
    for g, x in pairs if dim == "grad" else [pair[::-1] for pair in pairs]:
        found.append(torch.zeros(g.shape[1], x.shape[1], 1))
        _ops.catalogue["accumulate_conv_"](found[-1], g, x, *rest)
    torch.testing.assert_close(*found)
    assert found[0].count_nonzero() == channels


def test_accumulate_affine(vast: Vast) -> None:
    n, positions, features = 2**21 + 1, 32, 32
    g, x = (values((1, positions, features), torch.bfloat16) for _ in range(2))
    found = []
    for grad, normal in ((vast(g, (n, positions, features)), vast(x, (n, positions, features))), (g, x)):
        weight, bias = torch.zeros(features), torch.zeros(features)
        shift = torch.zeros(features, dtype=torch.bfloat16).expand_as(grad)
        scale = torch.ones(1, 1, 1, dtype=torch.bfloat16).expand_as(grad)
        _ops.catalogue["accumulate_affine_"]([weight], [bias], grad, [normal, shift, scale], 2)
        found.append((weight, bias))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)
        assert a.count_nonzero() == features


# ---- mixtures: diagonal, since a full covariance has no more elements of its own until D = 46,341 (17 GiB) ----


def test_gmm_sample() -> None:
    """A sample's values depend on its number and the feature alone: the first four features need no others."""
    n, features = 2**21 + 1, 1024
    labels, key = torch.zeros(n, dtype=torch.int64), torch.tensor([7])
    means, deviations = values((1, features), torch.bfloat16), positive((1, features), torch.bfloat16)
    got = _ops.catalogue["gmm_sample"](labels, means, deviations, key)
    want = _ops.catalogue["gmm_sample"](labels, means[:, :4].contiguous(), deviations[:, :4].contiguous(), key)
    assert torch.equal(got[:, :4], want)
    assert want[-1].unique().numel() == 4
    last = (got[-1].float() - means[0].float()) / deviations[0].float()
    assert abs(last.mean()) < 0.2
    assert 0.8 < last.std() < 1.2


@pytest.mark.parametrize("shape", [(2**21 + 1, 1024, 1), (2**20 + 1, 1, 2048)], ids=["N D", "N K"])
def test_gmm_log_prob(vast: Vast, shape: tuple[int, int, int]) -> None:
    n, features, components = shape
    tail = values((1, features), torch.bfloat16)
    means, deviations = (make((components, features), torch.bfloat16) for make in (values, positive))
    x = vast(tail, (n, features)) if features > 1 else torch.zeros(n, 1, dtype=torch.bfloat16)
    x[-1] = tail
    got = _ops.catalogue["gmm_log_prob"](x, means, deviations)
    want = _ops.catalogue["gmm_log_prob"](tail, means, deviations)
    torch.testing.assert_close(got[-1:], want, rtol=2**-7, atol=0)
    assert not torch.equal(got[-1], got[0])


@pytest.mark.parametrize("name", ["gmm_statistics", "gmm_class_statistics", "gmm_statistics of many"])
def test_gmm_statistics(vast: Vast, name: str) -> None:
    n, features, components = (2**20 + 1, 1, 2048) if name.endswith("many") else (2**21 + 1, 1024, 2)
    tail = values((1, features), torch.bfloat16)
    x = vast(tail, (n, features)) if features > 1 else torch.zeros(n, 1, dtype=torch.bfloat16)
    x[-1] = tail
    centers = torch.zeros(components, features, dtype=torch.bfloat16)
    if name == "gmm_class_statistics":
        shares: Tensor = torch.zeros(n, dtype=torch.int64)
        shares[-1] = 1
        last, count = shares[-1:], torch.tensor([n - 1.0, 1.0], dtype=torch.float64)
    else:
        last = positive((1, components), torch.bfloat16)
        shares = vast(last, (n, components)) if components > 2 else torch.zeros(n, components, dtype=torch.bfloat16)
        shares[-1] = last
        count = last[0].double()
    got = _ops.catalogue[name.split()[0]](x, shares, centers, False)
    want = _ops.catalogue[name.split()[0]](tail, last, centers, False)
    torch.testing.assert_close(got[0], count)
    for a, b in zip(got[1:], want[1:], strict=True):
        torch.testing.assert_close(a, b)
        assert a[-1].count_nonzero() == features
