"""Every op of the catalogue: opcheck, its own kernel, its float64 reference, threads, torch.compile, other builds.

What opcheck does not look at (version counters, leaves, overlaps, bad input) is in test_guards.py.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._inductor.config
from torch import Tensor

import fastcl
from fastcl import _ops

from .conftest import ROOT
from .samples import FLOATS, FORMS, LAYOUTS, OPS, WIDTHS, copied, in_float64, op_name, tensors

SHAPED = [case for case, sample in OPS.items() if sample.shaped]
OTHERS = [case for case, sample in OPS.items() if not sample.shaped]
# Arithmetic is in float32 (float64) and rounded once at the end: half an ulp of the result's dtype, relative.
ROUNDING = {torch.float64: 1e-12, torch.bfloat16: 2**-8 * 1.02, torch.float16: 2**-11 * 1.02}


def op(case: str) -> torch._ops.OpOverload:
    return _ops.catalogue[op_name(case)]


def args_of(case: str, shape: tuple[int, ...] = (5, 13), dtype: torch.dtype = torch.float32, layout="contiguous"):
    return OPS[case].make(shape, dtype, LAYOUTS[layout])


def mutated(case: str, args: Any) -> list[Tensor]:
    return tensors(args[: OPS[case].mutates])


def outcome(case: str, args: Any, call: Callable[..., Any] | None = None) -> list[Tensor]:
    """What the op returns and what it leaves in its mutated arguments."""
    with torch.no_grad():
        result = (call or op(case))(*args)
    return tensors(result) + mutated(case, args)


def test_table_is_the_catalogue() -> None:
    assert {op_name(case) for case in OPS} == set(_ops.catalogue)
    for name, overload in _ops.catalogue.items():
        assert OPS[name].mutates == str(overload._schema).count("!)")


@pytest.mark.skipif(_ops.pure_python, reason="built without a compiler")
@pytest.mark.parametrize("name", _ops.catalogue)
def test_has_its_own_cpu_kernel(name: str) -> None:
    """The reference answers for every missing kernel, so that it can hide none only if one looks."""
    assert _ops.has_kernel(name, "CPU")
    assert fastcl.build_info()["kernels"][name] == "c++"


# ---- opcheck: schema, autograd registration, fake tensors (strides too), AOTAutograd with dynamic shapes ----

# A third of a second each: every layout in float32, every dtype dense.
CHECKED = [
    *((shape, layout, torch.float32) for shape, layout in FORMS),
    *(((5, 13), "contiguous", dtype) for dtype in FLOATS if dtype != torch.float32),
]


@pytest.mark.parametrize(("shape", "layout", "dtype"), CHECKED, ids=str)
@pytest.mark.parametrize("case", SHAPED)
def test_opcheck(opcheck: Callable, case: str, shape: tuple[int, ...], layout: str, dtype: torch.dtype) -> None:
    opcheck(op(case), args_of(case, shape, dtype, layout))


@pytest.mark.parametrize(
    ("layout", "dtype"),
    [*((layout, torch.float32) for layout in LAYOUTS), *(("contiguous", t) for t in FLOATS if t != torch.float32)],
    ids=str,
)
@pytest.mark.parametrize("case", OTHERS)
def test_opcheck_accumulators(opcheck: Callable, case: str, layout: str, dtype: torch.dtype) -> None:
    opcheck(op(case), args_of(case, (5, 6), dtype, layout))


@pytest.mark.parametrize(("shape", "layout", "dtype"), CHECKED, ids=str)
@pytest.mark.parametrize("case", [case for case in OPS if OPS[case].differentiable])
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # opcheck's own, torch 2.14
def test_opcheck_with_gradient(
    opcheck: Callable, case: str, shape: tuple[int, ...], layout: str, dtype: torch.dtype
) -> None:
    args = args_of(case, shape, dtype, layout)
    for t in tensors(args[0]):
        t.requires_grad_()
    opcheck(op(case), args)


# ---- values ----


def reference(case: str) -> Callable[..., Any]:
    """The plain torch form, looked up where `define` got it."""
    for name, module in list(sys.modules.items()):
        if name.startswith("fastcl.ops.") and name.endswith(".reference") and hasattr(module, op_name(case)):
            return getattr(module, op_name(case))
    raise LookupError(case)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("case", OPS)
def test_equals_the_float64_reference(case: str, dtype: torch.dtype) -> None:
    if OPS[case].shaped:
        inputs = [*FORMS, ((3, 2, 5), "permuted and sliced"), *(((n,), "contiguous") for n in WIDTHS)]
    else:
        inputs = [(shape, layout) for shape in ((5, 13), (1, 1), (3, 49)) for layout in LAYOUTS]
    for shape, layout in inputs:
        args = args_of(case, shape, dtype, layout)
        exact = in_float64(args)
        with torch.no_grad():
            want = tensors(reference(case)(*exact)) + mutated(case, exact)
        got = outcome(case, args)
        assert [t.shape for t in got] == [t.shape for t in want]
        for a, b in zip(got, want, strict=True):
            if not a.is_floating_point():
                assert torch.equal(a, b)
            elif torch.float32 in (a.dtype, torch.promote_types(dtype, torch.float32)) and a.dtype.itemsize > 2:
                # sums over positions cancel; the condition number is the data's
                torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)
            else:
                atol = 1e-14 if a.dtype == torch.float64 else 2e-6
                torch.testing.assert_close(a.double(), b, rtol=ROUNDING[a.dtype], atol=atol)


@pytest.mark.skipif(_ops.pure_python, reason="the sums are torch's own")
@pytest.mark.parametrize("case", OPS)
def test_same_bits_for_any_number_of_threads(case: str) -> None:
    args = args_of(case, OPS[case].large)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(outcome(case, copied(args)))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("case", OPS)
def test_same_bits_from_eight_python_threads(case: str) -> None:
    args = args_of(case)
    want = outcome(case, copied(args))
    wrong: list[int] = []

    def work(worker: int) -> None:
        for _ in range(20):
            if not all(torch.equal(a, b) for a, b in zip(outcome(case, copied(args)), want, strict=True)):
                wrong.append(worker)

    workers = [threading.Thread(target=work, args=(k,)) for k in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


@pytest.mark.large
def test_more_elements_than_an_int32_counts() -> None:
    n = 2**31 + 5
    g, r = torch.full((n,), 0.5, dtype=torch.bfloat16), torch.zeros(n, dtype=torch.bool)
    r[-1] = True
    fastcl.ops.masked_grad_([g], [r])
    assert g[-3:].tolist() == [0.5, 0.5, 0.0]


# ---- torch.compile ----


def public(case: str, args: Any) -> Any:
    """The same call through fastcl.ops."""
    name = op_name(case)
    if name == "accumulate_affine_":
        weights, biases, grad, normalised, power = args
        first = [tensors[0] if tensors else None for tensors in (weights, biases)]
        return fastcl.ops.accumulate_affine_(*first, grad, tuple(normalised) or None, power)
    if name in ("quadratic_penalty", "quadratic_penalty_grad_"):
        return getattr(fastcl.ops, name)(*args[:-1], check=args[-1])
    if name == "gmm_sample":  # its generator becomes a key
        return _ops.call(op(case), *args)
    if name in ("gmm_statistics", "gmm_class_statistics"):
        return getattr(fastcl.ops, name)(*args[:-1], full=args[-1])
    if name == "compensated_mask":
        return fastcl.ops.compensated_mask(*args[:-1], literal=args[-1])
    if name in ("masked_weight", "masked_weight_kept"):
        *first, reserved, s_max, compensation = args
        options = {"s_max": s_max, "literal": compensation == 2} if compensation else {}
        return getattr(fastcl.ops, name)(*first, reserved=reserved, **options)
    return getattr(fastcl.ops, name, op(case))(*args)


def same_as_eager(compiled: Callable[..., Any], case: str, shape: tuple[int, ...]) -> None:
    args = args_of(case, shape)
    mine, theirs = copied(args), copied(args)
    for a, b in zip(outcome(case, mine, compiled), outcome(case, theirs), strict=True):
        assert torch.equal(a, b)


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # inductor's own
@pytest.mark.filterwarnings("ignore:dynamo_pgo force disabled")
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("case", OPS)
def test_compiles_into_one_graph_for_all_sizes(case: str, backend: str) -> None:
    torch._dynamo.reset()
    # the cache on disk does not know our references: it would bring back the guards of an earlier version
    with torch._inductor.config.patch(force_disable_caches=True):
        compiled = torch.compile(lambda *args: public(case, args), fullgraph=True, backend=backend, dynamic=True)
        same_as_eager(compiled, case, (6, 11))
    with torch.compiler.set_stance("fail_on_recompile"):
        same_as_eager(compiled, case, (8, 12))


def test_compiles_forward_and_backward() -> None:
    torch._dynamo.reset()

    def loss(e: Tensor, p: Tensor) -> Tensor:
        mask = fastcl.ops.annealed_mask(e, 3.0)
        return (mask * p).sum() + fastcl.ops.quadratic_penalty([p], [torch.ones(5)], [torch.ones(5)], 2.0)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    gradients = []
    for f in (loss, compiled):
        e, p = (torch.linspace(-1, 1, 5, requires_grad=True) for _ in range(2))
        f(e, p).backward()
        gradients.append((e.grad, p.grad))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


# ---- the op tests again, on the references and on the lower instruction sets ----

BUILDS = {
    "without a compiler": {"FASTCL_PURE_PYTHON": "1"},
    "AVX2": {"FASTCL_CPU": "avx2"},
    "baseline": {"FASTCL_CPU": "baseline"},
}
INNER = "FASTCL_INNER" in os.environ


@pytest.mark.skipif(INNER, reason="runs itself")
@pytest.mark.parametrize("build", BUILDS)
def test_other_builds_and_processors(build: str) -> None:
    names = ["masked_grad", "annealed_mask", "importance_ops", "importance_accumulate", "proximal", "gmm", "catalogue"]
    if build == "without a compiler":  # checks are Python's and C++'s own, whatever the instruction set
        names.append("guards")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "not compiles and not opcheck"]
    command += [f"tests/test_{name}.py" for name in names]
    # one thread for the oracles' small products; tests of threads ask for theirs
    environment = {**os.environ, **BUILDS[build], "FASTCL_INNER": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert " passed" in done.stdout


@pytest.mark.skipif(INNER or _ops.pure_python, reason="compares builds")
@pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"), reason="needs an x86 with FMA")
def test_lower_instruction_sets_are_really_used() -> None:
    """Without FMA the last bits differ: if they did not, the runs above would test one kernel three times."""
    code = (
        "import torch, fastcl; torch.manual_seed(0); out = torch.zeros(9, 50); "
        "fastcl.ops.accumulate_outer_(out, torch.randn(5, 7, 9), torch.randn(5, 7, 50), 2); print(out.tolist())"
    )
    sums = set()
    for level in ("baseline", "avx2"):
        environment = {**os.environ, "FASTCL_CPU": level}
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == 0, done.stderr
        sums.add(done.stdout)
    assert len(sums) == 2
