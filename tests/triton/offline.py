"""Compiling kernels for GPUs that are not here: no driver, no CUDA, no ROCm; registers, spills and access widths.

`with CompileFor(target) as found:` runs the real launchers on CPU tensors; every launch is compiled for the target as
it would be there (alignment, divisibility, constants) and recorded instead of launched. Triton 3.6 to 3.9; the process
must not have TRITON_INTERPRET set.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler.compiler import CompiledKernel
from triton.runtime.driver import driver

from fastcl.ops import _sweep

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
SHARED_BYTES = {"sm_80": 166912, "sm_90": 232448, "sm_100": 232448, "gfx942": 65536}


@dataclass
class Report:
    """What the compiler made of one kernel: bytes of spills and of local stack, accesses by width in bits."""

    kernel: str
    registers: int
    spills: int
    stack: int
    shared: int
    loads: Counter[int] = field(default_factory=Counter)
    stores: Counter[int] = field(default_factory=Counter)

    def widest(self) -> int:
        return max([*self.loads, *self.stores, 0])

    def cells(self) -> str:
        def widths(found: Counter[int]) -> str:
            return ", ".join(f"{bits} x {n}" for bits, n in sorted(found.items(), reverse=True)) or "none"

        numbers = f"{self.registers} | {self.spills} | {self.stack} | {self.shared}"
        return f"{self.kernel} | {numbers} | {widths(self.loads)} | {widths(self.stores)}"


def report(kernel: Any, target: GPUTarget, disassembled: bool) -> Report:
    return _amd(kernel) if target.backend == "hip" else _nvidia(kernel, target, disassembled)


def _nvidia(kernel: Any, target: GPUTarget, disassembled: bool) -> Report:
    with tempfile.TemporaryDirectory() as folder:  # spills are only ever printed by ptxas -v
        ptx = Path(folder, "kernel.ptx")
        ptx.write_text(kernel.asm["ptx"])
        architecture = f"sm_{target.arch}" + ("a" if target.arch >= 90 else "")
        command = [get_ptxas(target.arch).path, "-v", f"--gpu-name={architecture}", str(ptx), "-o", f"{folder}/cubin"]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    registers = re.search(r"Used (\d+) registers", said)
    frame = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", said)
    stack, stored, loaded = map(int, frame.groups()) if frame else (0, 0, 0)
    result = Report(kernel.name, int(registers[1]), max(stored, loaded), stack, kernel.metadata.shared)  # type: ignore[index]
    (_count_sass if disassembled else _count_ptx)(result, kernel)
    return result


def _count_sass(result: Report, kernel: Any) -> None:
    for line in kernel.asm["sass"].splitlines():
        found = re.search(r"\b(LDG|LDGSTS|STG)((?:\.[A-Za-z0-9_]+)*)\s", line)
        if found:
            width = re.search(r"\.(?:256|128|64|[US]?16|[US]?8)\b", found[2])
            bits = int(re.sub(r"\D", "", width[0])) if width else 32
            (result.stores if found[1] == "STG" else result.loads)[bits] += 1


def _count_ptx(result: Report, kernel: Any) -> None:
    """What the machine code will have at least: disassembling takes half a second a kernel."""
    for kind, vector, bits in re.findall(
        r"\b(ld|st)\.global(?:\.(?!v\d)[a-z]\w*|::\w+)*?(?:\.v(\d))?\.[bsuf](\d+)\s", kernel.asm["ptx"]
    ):
        (result.loads if kind == "ld" else result.stores)[int(vector or 1) * int(bits)] += 1
    for size in re.findall(r"\bcp\.async\.\w+\.shared\.global\s.*?,\s*0x([0-9a-f]+)", kernel.asm["ptx"]):
        result.loads[8 * int(size, 16)] += 1


def _amd(kernel: Any) -> Report:
    text = kernel.asm["amdgcn"]

    def number(name: str) -> int:
        found = re.search(rf"\.{name}:?\s+(\d+)", text)
        return int(found[1]) if found else 0

    # counts registers that went to scratch, not bytes
    spills, stack = 4 * number("vgpr_spill_count"), number("private_segment_fixed_size")
    result = Report(kernel.name, number("vgpr_count"), spills, stack, kernel.metadata.shared)
    bits = {"dwordx4": 128, "dwordx3": 96, "dwordx2": 64, "dword": 32, "ushort": 16, "short": 16, "ubyte": 8, "byte": 8}
    for kind, width in re.findall(r"\b(?:global|buffer)_(load|store)_(dwordx\d|dword|u?short|u?byte)", text):
        (result.loads if kind == "load" else result.stores)[bits[width]] += 1
    return result


class CompileFor:
    """Collects the kernels that the launchers inside would launch on `target`."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target
        self.kernels: dict[str, Any] = {}

    def __enter__(self) -> CompileFor:
        kept = self

        class Absent:
            """A driver without a device."""

            binary_ext = "cubin"

            def get_current_device(self) -> Any:
                return ("compile only", kept.target.backend, kept.target.arch)

            def get_current_stream(self, device: Any = None) -> int:
                return 0

            def get_current_target(self) -> GPUTarget:
                return kept.target

            def get_active_torch_device(self) -> torch.device:
                return torch.device("cpu")

        def record(kernel: Any) -> Any:
            return lambda *launch: kept.kernels.setdefault(kernel.hash, kernel)

        _sweep._prepared.clear()  # keyed by addresses, which come back: made for another target, their warps are wrong
        self.saved = driver._active, CompiledKernel.run, CompiledKernel._init_handles, torch.version.hip
        driver.set_active(Absent())
        CompiledKernel.run = property(record)
        CompiledKernel._init_handles = lambda kernel: None  # it would load the binary
        torch.version.hip = "6.0" if self.target.backend == "hip" else None  # type: ignore[assignment]
        return self

    def __exit__(self, *exception: Any) -> None:
        driver._active, CompiledKernel.run, CompiledKernel._init_handles, torch.version.hip = self.saved

    def reports(self, disassembled: bool = False) -> list[Report]:
        """With the accesses of the machine code, or of the PTX that it was made from."""
        return [report(kernel, self.target, disassembled) for kernel in self.kernels.values()]


def triton_version() -> str:
    return triton.__version__
