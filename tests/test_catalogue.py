"""Every op of the catalogue: opcheck, the three checks that opcheck lacks, its float64 reference, threads, compile."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

import fastcl
from fastcl import _ops

from .conftest import ROOT
from .samples import FLOATS, LAYOUTS, OPS, WIDTHS, copied, in_float64, tensors

MUTATING = [name for name, sample in OPS.items() if sample.mutates]
SHAPED = [name for name, sample in OPS.items() if sample.shaped]
TOLERANCE = {torch.float32: 2e-6, torch.float64: 1e-12, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def op(name: str) -> torch._ops.OpOverload:
    return _ops.catalogue[name]


def args_of(
    name: str, shape: tuple[int, ...] = (5, 13), dtype: torch.dtype = torch.float32, layout: str = "contiguous"
):
    return OPS[name].make(shape, dtype, LAYOUTS[layout])


def mutated(name: str, args: Any) -> list[Tensor]:
    return tensors(args[: OPS[name].mutates])


def outcome(name: str, args: Any) -> list[Tensor]:
    """What the op returns and what it leaves in its mutated arguments."""
    with torch.no_grad():
        result = op(name)(*args)
    return tensors(result) + mutated(name, args)


def test_table_is_the_catalogue() -> None:
    assert set(OPS) == set(_ops.catalogue)


@pytest.mark.skipif(_ops.pure_python, reason="built without a compiler")
@pytest.mark.parametrize("name", OPS)
def test_has_its_own_cpu_kernel(name: str) -> None:
    """The reference answers for every missing kernel, so that it can hide none only if one looks."""
    assert _ops.has_kernel(name, "CPU")
    assert fastcl.build_info()["kernels"][name] == "c++"


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name", OPS)
def test_opcheck_dtypes(name: str, dtype: torch.dtype) -> None:
    torch.library.opcheck(op(name), args_of(name, dtype=dtype))


@pytest.mark.parametrize(
    ("shape", "layout"),
    [((), "contiguous"), ((0,), "contiguous"), ((3, 0), "contiguous"), ((5, 13), "permuted"), ((5, 13), "sliced"),
     ((2, 3, 4, 5), "channels_last"), ((1,), "contiguous")],
)  # fmt: skip
@pytest.mark.parametrize("name", SHAPED)
def test_opcheck_layouts(name: str, shape: tuple[int, ...], layout: str) -> None:
    torch.library.opcheck(op(name), args_of(name, shape, layout=layout))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # opcheck's own, in torch 2.14
@pytest.mark.parametrize("name", [n for n in OPS if OPS[n].differentiable])
def test_opcheck_with_gradient(name: str) -> None:
    args = args_of(name, dtype=torch.float64)
    first = copied(args[0], lambda t: t.requires_grad_())
    torch.library.opcheck(op(name), (first, *args[1:]))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name", OPS)
def test_equals_the_float64_reference(name: str, dtype: torch.dtype) -> None:
    shapes = [(n,) for n in WIDTHS] + [(2, 3, 4, 5)] if OPS[name].shaped else [(1,)]
    layouts = {(5, 13): list(LAYOUTS)[:3], (2, 3, 4, 5): list(LAYOUTS)}
    for shape in [*shapes, (5, 13), ()]:
        for layout in layouts.get(shape, ["contiguous"]):
            args = args_of(name, shape, dtype, layout)
            exact = in_float64(args)
            with torch.no_grad():
                reference = tensors(_reference(name)(*exact)) + mutated(name, exact)
            for got, want in zip(outcome(name, args), reference, strict=True):
                tolerance = TOLERANCE[dtype if got.dtype == dtype else torch.float32]
                if got.dtype != dtype and dtype != torch.float64:
                    tolerance = 1e-5  # sums kept in float32
                torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=tolerance)


def _reference(name: str) -> Any:
    """The plain torch form, looked up where `define` got it."""
    for stem in ("masked_grad", "annealed_mask", "importance", "proximal", "gmm"):
        module = sys.modules.get(f"fastcl.ops.{stem}.reference")
        if module is not None and hasattr(module, name):
            return getattr(module, name)
    raise LookupError(name)


@pytest.mark.parametrize("name", OPS)
def test_same_bits_for_any_number_of_threads(name: str) -> None:
    args = args_of(name, (3, 40001))
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(outcome(name, copied(args)))
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("name", MUTATING)
def test_version_counter_is_bumped(name: str) -> None:
    args = args_of(name)
    before = [t._version for t in mutated(name, args)]
    op(name)(*args)
    after = [t._version for t in mutated(name, args)]
    assert all(a > b for a, b in zip(after, before, strict=True))
    _public(name, args)
    assert all(t._version > a for t, a in zip(mutated(name, args), after, strict=True))


@pytest.mark.parametrize("name", MUTATING)
def test_autograd_notices_the_write(name: str) -> None:
    """w * w saves w; writing to w must make backward raise, not return a wrong gradient."""
    args = args_of(name)
    target = mutated(name, args)[0]
    factor = torch.ones_like(target, requires_grad=True)
    y = factor * target
    op(name)(*args)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("how", ["raw", "public"])
@pytest.mark.parametrize("name", MUTATING)
def test_leaf_that_requires_grad_is_refused(name: str, how: str) -> None:
    args = args_of(name)
    target = mutated(name, args)[0].requires_grad_()
    before = target.detach().clone()
    call = op(name) if how == "raw" else (lambda *a: _public(name, a))
    with pytest.raises(RuntimeError, match="requires grad"):
        call(*args)
    assert torch.equal(target, before)
    assert target._version == 0
    with torch.no_grad():
        call(*args)
    assert not torch.equal(target, before)


@pytest.mark.parametrize("how", ["raw", "public"])
@pytest.mark.parametrize("name", MUTATING)
def test_overlapping_output_is_refused(name: str, how: str) -> None:
    args = list(args_of(name))
    call = op(name) if how == "raw" else (lambda *a: _public(name, a))
    error = (RuntimeError, ValueError) if how == "raw" else ValueError
    target = mutated(name, args)[0]

    expanded = target[:1].expand_as(target) if target.shape[0] > 1 else target
    before = expanded.clone()
    wrong = [[expanded, *args[0][1:]] if isinstance(args[0], list) else expanded, *args[1:]]
    with pytest.raises(error, match=r"overlaps itself|contiguous"):
        call(*wrong)
    assert torch.equal(expanded, before)

    if isinstance(args[0], list) and not OPS[name].mutates > 1:
        twice = [[a[0], a[0]] if isinstance(a, list) else a for a in copied(args)]
        before = twice[0][0].clone()
        with pytest.raises(error, match="shares memory"):
            call(*twice)
        assert torch.equal(twice[0][0], before)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", OPS)
def test_compiles_into_one_graph(name: str, dynamic: bool) -> None:
    torch._dynamo.reset()

    def f(*args: Any) -> Any:
        return op(name)(*args)

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for shape in [(5, 13), (6, 14)]:
        args = args_of(name, shape)
        mine, theirs = copied(args), copied(args)
        with torch.no_grad():
            a = tensors(compiled(*mine)) + mutated(name, mine)
            b = tensors(f(*theirs)) + mutated(name, theirs)
        for x, y in zip(a, b, strict=True):
            torch.testing.assert_close(x, y, rtol=0, atol=0)


def _public(name: str, args: Any) -> Any:
    if name == "accumulate_affine_":
        return fastcl.ops.accumulate_affine_(args[0][0], args[1][0], *args[2:])
    if name.startswith("quadratic_penalty"):
        return getattr(fastcl.ops, name)(*args[:-1], check=args[-1])
    return getattr(fastcl.ops, name)(*args)


FORMS = {
    "without a compiler": {"FASTCL_PURE_PYTHON": "1"},
    "AVX2": {"FASTCL_CPU": "avx2"},
    "baseline": {"FASTCL_CPU": "baseline"},
}


@pytest.mark.skipif("FASTCL_INNER" in os.environ, reason="runs itself")
@pytest.mark.parametrize("form", FORMS)
def test_other_builds_and_processors(form: str) -> None:
    """The op tests again, in a process of their own, on the references and on the lower instruction sets."""
    files = ["masked_grad", "annealed_mask", "importance_ops", "proximal"]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    command += [f"tests/test_{name}.py" for name in files]
    command += ["tests/test_catalogue.py", "-k", "not compiles and not opcheck"]
    environment = {**os.environ, **FORMS[form], "FASTCL_INNER": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert " passed" in done.stdout
