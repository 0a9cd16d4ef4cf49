"""Every op on each instruction set of this CPU against the baseline: the same values, bit for bit where nothing can be
fused or summed in another order. (Each against its float64 reference: test_catalogue.py.)
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fastcl import _ops

from .conftest import ROOT
from .samples import FLOATS, OPS, op_name, tensors

LEVELS = {"avx2": ("AVX2", "AVX512"), "avx512": ("AVX512",)}  # and where torch finds it
EXACT = {"masked_grad_", "masked_grad_any_", "pack_mask", "unpack_mask", "soft_threshold_"}


def record(path: str) -> None:
    """What every op gives on a few samples, on the instruction set that $FASTCL_CPU names."""
    found: dict[str, list[Tensor]] = {}
    for case, sample in OPS.items():
        for dtype in FLOATS:
            for shape in ((1023,), (3, 40, 41), (5, 13)) if sample.shaped else ((5, 13), (3, 49), (33, 70)):
                torch.manual_seed(0)
                args = sample.make(shape, dtype, lambda t: t)
                with torch.no_grad():
                    result = _ops.catalogue[op_name(case)](*args)
                found[f"{case} {dtype} {shape}"] = tensors(result) + tensors(args[: sample.mutates])
    torch.save(found, path)


def recorded(level: str, path: Path) -> dict[str, list[Tensor]]:
    environment = {**os.environ, "FASTCL_CPU": level, "OMP_NUM_THREADS": "1"}
    code = f"from tests.test_instruction_sets import record; record({str(path)!r})"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return torch.load(path)


@pytest.fixture(scope="module")
def baseline(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Tensor]]:
    return recorded("baseline", tmp_path_factory.mktemp("isa") / "baseline.pt")


def arithmetic(key: str, result: torch.dtype) -> torch.dtype:
    """What was computed in, or rounded to, whichever is coarser: moments are stored in double, taken in float."""
    return torch.float32 if result == torch.float64 and "torch.float64" not in key else result


@pytest.mark.skipif(_ops.pure_python, reason="built without a compiler")
@pytest.mark.parametrize("level", LEVELS)
def test_same_values_as_the_baseline(level: str, baseline: dict[str, list[Tensor]], tmp_path: Path) -> None:
    """A fused multiply-add leaves out one rounding of a product: an ulp of the largest term, which may cancel.

    Measured over this table, of the largest value: 2.2 eps in float32 and float64 (accumulate_outer_ in float64), 1 ulp
    in half precision, which is rounded once.
    """
    if torch.backends.cpu.get_cpu_capability() not in LEVELS[level]:
        pytest.skip(f"this CPU has no {level}")
    other = recorded(level, tmp_path / "other.pt")
    assert other.keys() == baseline.keys()
    differing = set()
    for key, want in baseline.items():
        for a, b in zip(other[key], want, strict=True):
            name = key.split(" ")[0].split(":")[0]
            if torch.equal(a, b):
                continue
            differing.add(name)
            assert a.is_floating_point(), key
            assert name not in EXACT, key
            eps = torch.finfo(arithmetic(key, a.dtype)).eps
            terms = want if name == "gmm_responsibilities" else [b]  # of a log density, which stands in an exponent
            largest = max(t.double().abs().max() for t in terms)
            allowed = (1 if a.dtype.itemsize == 2 else 4) * eps * largest
            assert (a.double() - b.double()).abs().max() <= allowed, key  # NaN fails too
    assert "accumulate_outer_" in differing  # else one instruction set was compared with itself
