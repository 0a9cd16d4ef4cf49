"""The Triton halves in the interpreter: `TRITON_INTERPRET=1 python -m pytest tests/triton/interpreted.py`.

Values against the float64 references, opcheck, gradients, bounds and races. No speed, no real concurrency.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
import triton
import triton.language as tl

import fastcl
from fastcl import _ops
from fastcl.ops import _sweep

from ..samples import FLOATS, LAYOUTS, OPS, copied, in_float64, op_name, tensors
from ..test_catalogue import ROUNDING, args_of, mutated, op, outcome, reference
from . import answer_on_the_cpu
from .interpreter import Watch, repair

assert os.environ.get("TRITON_INTERPRET") == "1", "set TRITON_INTERPRET=1 before triton is imported"
repair()
answer_on_the_cpu()
pytestmark = pytest.mark.filterwarnings("ignore")  # NumPy's overflows and the overridden kernels

CASES = list(OPS)
# both sides of a block of 512 and a chunk of 4096, and every kind of layout
SHAPED = [
    ((5, 13), "contiguous"),
    ((5, 13), "permuted"),
    ((5, 13), "sliced"),
    ((2, 3, 4, 5), "channels_last"),
    ((3, 2, 5), "permuted and sliced"),
    *(((n,), "contiguous") for n in (0, 1, 511, 512, 513, 4096, 4105)),
    ((), "contiguous"),
]
FEW = [((5, 13), "permuted"), ((513,), "contiguous"), ((4105,), "contiguous")]  # blocks do not depend on the dtype
OTHERS = [
    *(((5, 13), layout) for layout in LAYOUTS),
    ((1, 1), "contiguous"),
    ((3, 49), "contiguous"),
    ((0, 3), "contiguous"),
]


def allowed(a: torch.Tensor, dtype: torch.dtype) -> dict[str, float]:
    if torch.float32 in (a.dtype, torch.promote_types(dtype, torch.float32)) and a.dtype.itemsize > 2:
        return {"rtol": 1e-5, "atol": 1e-5}
    return {"rtol": ROUNDING[a.dtype], "atol": 1e-14 if a.dtype == torch.float64 else 2e-6}


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_equals_the_float64_reference(case: str, dtype: torch.dtype) -> None:
    shaped = SHAPED if dtype == torch.float32 else FEW
    for shape, layout in shaped if OPS[case].shaped else OTHERS:
        args = args_of(case, shape, dtype, layout)
        exact = in_float64(args)
        want = tensors(reference(case)(*exact)) + mutated(case, exact)
        got = outcome(case, args)
        assert [t.shape for t in got] == [t.shape for t in want]
        for a, b in zip(got, want, strict=True):
            if a.is_floating_point():
                torch.testing.assert_close(a.double(), b.double(), **allowed(a, dtype))
            else:
                assert torch.equal(a, b)


@pytest.mark.parametrize("case", CASES)
def test_stays_in_bounds_and_has_no_races(case: str) -> None:
    shape = (4105,) if OPS[case].shaped else (5, 13)
    args = args_of(case, shape)
    kept = tensors(args)
    found: list[torch.Tensor] = []
    make = _sweep.Row.__new__

    def remember(cls: Any, rows: Any, mask: Any, aux: Any) -> Any:
        found.extend([*rows, *(t for t in (mask.data, mask.inner, aux) if t is not None)])
        return make(cls, rows, mask, aux)

    _sweep.Row.__new__ = remember  # what stands behind tables of addresses
    try:
        with Watch(*kept) as watch:
            watch.tensors = Listed(kept, found)
            outcome(case, args)
        assert watch.launches or op_name(case) == "pack_mask"
    finally:
        _sweep.Row.__new__ = make


class Listed:
    """Two lists, of which the second still grows."""

    def __init__(self, *lists: list[torch.Tensor]) -> None:
        self.lists = lists

    def __iter__(self) -> Any:
        return (t for list_ in self.lists for t in list_)


@triton.jit
def _planted(x, n, BLOCK: tl.constexpr, BEYOND: tl.constexpr, RACE: tl.constexpr):
    i = tl.arange(0, BLOCK) + (0 if RACE else tl.program_id(0) * BLOCK)
    tl.store(x + i, tl.load(x + i, mask=i < n + BEYOND) + 1, mask=i < n + BEYOND)


def test_the_watch_finds_planted_bugs() -> None:
    with Watch():
        _planted[(2,)](torch.zeros(20), 20, BLOCK=16, BEYOND=0, RACE=False)
    with pytest.raises(Exception, match="out of bounds"), Watch():
        _planted[(2,)](torch.zeros(20), 20, BLOCK=16, BEYOND=1, RACE=False)
    with pytest.raises(Exception, match="race"), Watch():
        _planted[(2,)](torch.zeros(20), 20, BLOCK=16, BEYOND=0, RACE=True)


@pytest.mark.parametrize("case", CASES)
def test_opcheck(opcheck: Callable, case: str) -> None:
    opcheck(op(case), args_of(case, (5, 13) if OPS[case].shaped else (5, 6)))


@pytest.mark.parametrize("case", [case for case in OPS if OPS[case].differentiable])
def test_opcheck_with_gradient(opcheck: Callable, case: str) -> None:
    args = args_of(case)
    for t in tensors(args[0]):
        t.requires_grad_()
    opcheck(op(case), args)


def test_gradients() -> None:
    w, e = (torch.randn(3, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(lambda w, e: fastcl.ops.masked_weight(w, e, 3.0), (w, e))
    assert torch.autograd.gradcheck(lambda e: fastcl.ops.annealed_mask(e, 3.0), (e,))
    params, anchors, f = [w], [torch.randn(3, 4, dtype=torch.float64)], [torch.rand(3, 4, dtype=torch.float64)]
    assert torch.autograd.gradcheck(lambda w: fastcl.ops.quadratic_penalty([w], anchors, f, 2.0), tuple(params))
    means = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    factors = (0.1 * torch.randn(2, 3, 3).tril(-1) + torch.eye(3)).double().requires_grad_()
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(fastcl.ops.gmm_log_prob, (x, means, factors))

    def sampled(means: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
        return fastcl.ops.gmm_sample(torch.tensor([0, 1, 0]), means, factors, torch.Generator().manual_seed(3))

    assert torch.autograd.gradcheck(sampled, (means, factors))


def test_a_reserved_weight_keeps_every_bit() -> None:
    patterns = torch.randint(-(2**31), 2**31 - 1, (4105,), dtype=torch.int64).to(torch.int32)
    for dtype in (torch.float32, torch.bfloat16):
        p = patterns.view(torch.float32).to(dtype) if dtype == torch.bfloat16 else patterns.view(torch.float32)
        p = p.clone()
        before, r = p.clone(), torch.rand(4105) > 0.5
        m, v, g = torch.ones_like(p), torch.ones_like(p), torch.full_like(p, float("inf"))
        fastcl.ops.masked_adam_([p], [m], [v], [], [torch.zeros(())], [g], [r], [], 0.1, weight_decay=0.1)
        view = torch.int32 if dtype == torch.float32 else torch.int16
        assert torch.equal(p.view(view)[r], before.view(view)[r])
        assert (m[r] == 1).all()
        assert (v[r] == 1).all()


def test_counts_on_the_device_and_on_the_host() -> None:
    """Adam's bias corrections by the kernel, from counts of their own, as on the host."""
    from fastcl.ops.masked_grad import triton as half

    results = []
    for on_device in (False, True):
        torch.manual_seed(0)
        params, grads = [torch.randn(7), torch.randn(9)], [torch.randn(7), torch.randn(9)]
        ms, vs = ([torch.rand_like(p) for p in params] for _ in range(2))
        steps = [torch.tensor(3.0), torch.tensor(9.0)]
        numbers = (1 - 0.9, 0.99, 1 - 0.99, 1e-8, 0.0, 1.0, 1.0)
        own = [
            (0.1, half._log2(0.9), half._log2(0.99)) if on_device else half.corrections(step, 0.1, 0.9, 0.99)
            for step in steps
        ]
        aux = steps if on_device else None
        _sweep.sweep(
            half._adam, [params, ms, vs, grads], numbers, (False, on_device), written=3, aux=aux, own_numbers=own
        )
        results.append(params)
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_one_launch_for_a_model_of_many_tensors() -> None:
    params = [torch.randn(16) for _ in range(200)]
    lists = [[torch.rand(16) for _ in params] for _ in range(3)]
    found = [t for list_ in (params, *lists) for t in list_]
    with Watch(*found) as watch:
        fastcl.ops.quadratic_penalty_grad_(lists[0], params, lists[1], lists[2], 1.0, check=False)
        tables = len(_sweep._tables)
        fastcl.ops.quadratic_penalty_grad_(lists[0], params, lists[1], lists[2], 1.0, check=False)
    assert watch.launches == 2
    assert len(_sweep._tables) == tables  # the addresses stayed, so did the table


@pytest.mark.parametrize("kind", ["full", "diagonal", "spherical"])
def test_normals_are_the_cpu_s(kind: str) -> None:
    """Within 1e-5 of the reference's stream, to which test_catalogue.py holds the C++ kernel."""
    case = "gmm_sample" if kind == "full" else f"gmm_sample:{kind}"
    for dtype in (torch.float32, torch.float64):
        torch.manual_seed(5)
        args = args_of(case, (300, 37), dtype)
        want = reference(case)(*in_float64(args))
        torch.testing.assert_close(op(case)(*args).double(), want, rtol=1e-5, atol=1e-5)


def test_refuses_before_it_writes() -> None:
    g = torch.ones(5)
    for bad in ([torch.full((5,), 1.5)], [torch.full((5,), float("nan"))], [torch.zeros(4, dtype=torch.bool)]):
        with pytest.raises(ValueError, match="reserved"):
            fastcl.ops.masked_grad_([g], bad)
    assert (g == 1).all()


def test_sums_depend_on_the_sizes_alone() -> None:
    """The same elements summed twice, and beside other tensors, in another process: bits stay."""
    args = args_of("quadratic_penalty", (3, 4001))
    first, second = (op("quadratic_penalty")(*copied(args)) for _ in range(2))
    assert torch.equal(first, second)


def test_every_op_has_a_triton_half() -> None:
    for name in _ops.catalogue:
        assert callable(getattr(_ops._triton_half(reference(name).__module__), name))
