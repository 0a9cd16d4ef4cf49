"""Every Triton kernel as it is launched, compiled for GPUs that are not here, and what the compiler made of it.

    python -m pytest tests/triton/compiled.py                    # the gate
    python -m tests.triton.compiled bench/results/triton.md      # the table

Gated: no more than a few bytes of spills, shared memory within the GPU's, 128-bit accesses in the hot path (64-bit for
bf16) of what streams through memory.
"""

from __future__ import annotations

import os
import sys
import warnings
from typing import Any

import pytest
import torch

from ..samples import OPS, op_name
from ..test_catalogue import args_of, op
from . import answer_on_the_cpu
from .offline import SHARED_BYTES, TARGETS, CompileFor, Report, triton_version

assert not os.environ.get("TRITON_INTERPRET"), "the interpreter's process cannot compile"
answer_on_the_cpu()

# ptxas versions differ by a few bytes; what is more is a mistake in a tile's size
SPILLS, SPILLS_OF = 16, {("accumulate_conv_", "sm_100"): 64}
STREAMING = [
    case for case, sample in OPS.items() if sample.shaped and op_name(case) not in ("pack_mask", "unpack_mask")
]
DTYPES = (torch.float32, torch.bfloat16)


def arguments(case: str, dtype: torch.dtype) -> Any:
    if OPS[case].shaped:
        return args_of(case, (64, 9000), dtype)
    return args_of(case, (8, 32) if "conv" in case else (64, 128), dtype)


def compiled(case: str, dtype: torch.dtype, target: str, disassembled: bool = False) -> list[Report]:
    with CompileFor(TARGETS[target]) as found, torch.no_grad():
        op(case)(*arguments(case, dtype))
    return found.reports(disassembled)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("target", "dtype"), [*((t, DTYPES[0]) for t in TARGETS), ("sm_90", DTYPES[1])], ids=str)
@pytest.mark.parametrize("case", OPS)
def test_compiles_as_it_is_launched(case: str, target: str, dtype: torch.dtype) -> None:
    found = compiled(case, dtype, target)
    assert found, "no kernel was launched"
    for kernel in found:
        allowed = SPILLS_OF.get((op_name(case), target), SPILLS)
        assert kernel.spills <= allowed, kernel
        assert kernel.shared <= SHARED_BYTES[target], kernel
        assert kernel.registers <= 255 or target == "gfx942", kernel
    if case in STREAMING:
        assert max(kernel.widest() for kernel in found) >= (128 if dtype == torch.float32 else 64), found


def test_the_gate_finds_a_spill() -> None:
    from fastcl.ops.importance import triton_samples as half

    torch.manual_seed(0)
    tile = half._tile
    half._tile = lambda size, largest=64: 256  # a tile that no register file holds
    try:
        found = compiled("accumulate_outer_", torch.float32, "sm_90")
    finally:
        half._tile = tile
    assert any(kernel.spills > SPILLS for kernel in found)


def table() -> str:
    text = [
        "# Triton kernels, compiled",
        "",
        f"`python -m tests.triton.compiled bench/results/triton.md`: triton {triton_version()}, every op's launch on",
        "[64, 9000] elements (64 samples of 128 features for the others), float32 and bf16. Spills, stack and shared",
        "memory in bytes; accesses by bits x how often they stand in the code. Compiled only: none of it ran on a GPU.",
        "",
        "| op | target | dtype | kernel | registers | spills | stack | shared | loads | stores |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for case in OPS:
        for target in TARGETS:
            for dtype in DTYPES:
                for kernel in compiled(case, dtype, target, disassembled=True):
                    text.append(f"| {case} | {target} | {str(dtype)[6:]} | {kernel.cells()} |")
    return "\n".join(text) + "\n"


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    text = table()
    with open(sys.argv[1], "w") as file:
        file.write(text)
