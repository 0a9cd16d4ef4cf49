"""The Triton halves, without a GPU: in the interpreter and compiled, each in a process of its own.

TRITON_INTERPRET decides when triton is first imported, so that no process can do both. With a GPU the ops run on it
too, below.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest
import torch

from fastcl import _ops

from .conftest import ROOT
from .samples import FLOATS, OPS, in_float64, mapped, tensors
from .test_catalogue import ROUNDING, args_of, mutated, op, reference

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


def run(script: str, *chosen: str, **environment: str) -> None:
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | environment
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"tests/triton/{script}.py", *chosen]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    print(done.stdout.splitlines()[-1])


# in parts, which pytest-xdist spreads over its workers
@needs_triton
@pytest.mark.parametrize("chosen", [*(f"equals and {dtype}" for dtype in FLOATS), "not equals"])
def test_in_the_interpreter(chosen: str) -> None:
    run("interpreted", "-k", chosen, TRITON_INTERPRET="1")


@needs_triton
@pytest.mark.parametrize("chosen", ["sm_80", "sm_90", "gfx942", "spill"])
def test_compiled_for_gpus(chosen: str) -> None:
    """For sm_100 too by `make triton-versions`."""
    run("compiled", "-k", chosen)


def test_without_triton_a_gpu_s_tensor_says_what_to_install() -> None:
    program = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch, fastcl\n"
        "from fastcl import _ops\n"
        "from fastcl.ops.proximal import reference\n"
        "try:\n"
        "    _ops.on_gpu('soft_threshold_', reference.soft_threshold_)([torch.ones(2)], 0.5)\n"
        "except RuntimeError as error:\n"
        "    assert 'fastcl[gpu]' in str(error), error\n"
        "else:\n"
        "    raise SystemExit('nothing was raised')\n"
    )
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)


def test_import_does_not_load_triton() -> None:
    program = "import sys, fastcl; assert 'triton' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)


@pytest.mark.parametrize("name", _ops.catalogue)
def test_has_a_kernel_for_gpus(name: str) -> None:
    assert _ops.has_kernel(name, "CUDA")


# ---- on a GPU ----


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("case", OPS)
def test_on_a_gpu_it_equals_the_float64_reference(case: str, dtype: torch.dtype) -> None:
    for shape in ((5, 13), (3, 4105)) if OPS[case].shaped else ((5, 13), (3, 49)):
        args = args_of(case, shape, dtype)
        exact = in_float64(args)
        want = tensors(reference(case)(*exact)) + mutated(case, exact)
        on_gpu = mapped(args, lambda t: t.cuda() if t.dim() or t.is_floating_point() else t)
        with torch.no_grad():
            got = tensors(op(case)(*on_gpu)) + mutated(case, on_gpu)
        for a, b in zip(got, want, strict=True):
            if not a.is_floating_point():
                assert torch.equal(a.cpu(), b)
                continue
            limit = (
                {"rtol": 1e-5, "atol": 1e-5} if a.dtype == torch.float32 else {"rtol": ROUNDING[a.dtype], "atol": 2e-6}
            )
            torch.testing.assert_close(a.cpu().double(), b.double(), **limit)


@pytest.mark.gpu
def test_in_a_cuda_graph() -> None:
    """A captured step, replayed on new values: no synchronisation, no table built from pageable memory."""
    import fastcl

    params, anchors, importances = ([torch.rand(64, 9, device="cuda") for _ in range(20)] for _ in range(3))
    grads = [torch.zeros_like(p) for p in params]
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        fastcl.ops.quadratic_penalty_grad_(grads, params, anchors, importances, 1.0)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        fastcl.ops.quadratic_penalty_grad_(grads, params, anchors, importances, 1.0)
    torch._foreach_zero_(grads)
    torch._foreach_add_(params, 1.0)
    graph.replay()
    for g, p, a, f in zip(grads, params, anchors, importances, strict=True):
        torch.testing.assert_close(g, f * (p - a))


@pytest.mark.gpu
def test_on_another_stream_and_device() -> None:
    import fastcl

    device = torch.device("cuda", torch.cuda.device_count() - 1)
    with torch.cuda.stream(torch.cuda.Stream(device)):
        w = torch.randn(10_000, device=device)
        want = torch.nn.functional.softshrink(w, 0.5)
        fastcl.ops.soft_threshold_([w], 0.5)
    torch.cuda.synchronize(device)
    torch.testing.assert_close(w, want)


@pytest.mark.gpu
def test_under_torch_compile_on_a_gpu() -> None:
    import fastcl

    e = torch.randn(1000, device="cuda", requires_grad=True)
    compiled = torch.compile(lambda e: fastcl.ops.annealed_mask(e, 3.0).square().sum(), fullgraph=True)
    compiled(e).backward()
    got, e.grad = e.grad, None
    fastcl.ops.annealed_mask(e, 3.0).square().sum().backward()
    torch.testing.assert_close(got, e.grad)
