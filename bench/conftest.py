"""Contests: compare first, then time all contenders in one round-robin; medians, and ratios to fastcl.

    python -m pytest bench -s [--device cuda] [--benchmark-json out.json]
    python bench/report.py out.json bench/results/NAME.md

The machine may be shared: a slow second hits every contender alike, and ratios of medians stay. A contender that gives
another result than fastcl fails the benchmark before anything is timed.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch

ROUNDS = 11
MIN_SECONDS = 2e-3  # a round repeats a call until it takes this long
Call = Callable[[], Any]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", help="device of the tensors: cpu, cuda, cuda:1")
    parser.addoption("--no-compile", action="store_true", help="leave torch.compile out (quick look)")


@pytest.fixture
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.config.getoption("--device"))


@pytest.fixture
def compiled(request: pytest.FixtureRequest) -> Callable[[Call], dict[str, Call]]:
    """{"torch.compile": f} compiled, or nothing with --no-compile."""

    def make(f: Call) -> dict[str, Call]:
        if request.config.getoption("--no-compile"):
            return {}
        torch._dynamo.reset()
        return {"torch.compile": torch.compile(f, dynamic=False)}

    return make


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _seconds(call: Call, repeats: int, device: torch.device) -> float:
    _synchronise(device)
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    _synchronise(device)
    return (time.perf_counter() - start) / repeats


@pytest.fixture
def contest(benchmark: Any, device: torch.device, request: pytest.FixtureRequest) -> Callable[..., dict[str, float]]:
    """contest({"fastcl": f, "eager": g, ...}, check=..., floor=seconds) -> median seconds by name."""

    def run(
        contenders: dict[str, Call], check: Callable[[dict[str, Call]], None], floor: float | None = None
    ) -> dict[str, float]:
        check(contenders)
        repeats = {}
        for name, call in contenders.items():
            for _ in range(3):
                call()
            once = min(_seconds(call, 1, device) for _ in range(3))
            repeats[name] = max(1, int(MIN_SECONDS / max(once, 1e-7)))
        times: dict[str, list[float]] = {name: [] for name in contenders}
        for _ in range(ROUNDS):
            for name, call in contenders.items():
                times[name].append(_seconds(call, repeats[name], device))
        medians = {name: statistics.median(values) for name, values in times.items()}
        if floor is not None:
            medians["floor"] = floor
        benchmark.extra_info["medians"] = medians
        benchmark.extra_info["threads"] = torch.get_num_threads()
        benchmark.extra_info["device"] = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
        benchmark.extra_info["torch"] = torch.__version__
        benchmark.pedantic(contenders["fastcl"], rounds=ROUNDS, iterations=repeats["fastcl"])
        mine = medians["fastcl"]
        others = "  ".join(f"{name} {seconds / mine:.2f}x" for name, seconds in medians.items() if name != "fastcl")
        print(f"\n{request.node.name}: fastcl {_human(mine)}  {others}")
        return medians

    return run


def _human(seconds: float) -> str:
    return f"{seconds * 1e3:.3f} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.2f} us"


@pytest.fixture(scope="session")
def copy_rate() -> Callable[[torch.device, int], float]:
    """Bytes a second, read and written, of torch's copy at this size: what memory-bound ops are held against."""
    known: dict[tuple[str, int], float] = {}

    def rate(device: torch.device, n_bytes: int) -> float:
        key = (str(device), n_bytes)
        if key not in known:
            a = torch.zeros(max(1, n_bytes // 8), device=device)  # half read, half written
            b = torch.ones_like(a)
            best = min(_seconds(lambda: a.copy_(b), 5, device) for _ in range(9))
            known[key] = 2 * a.numel() * 4 / best
        return known[key]

    return rate


# Parameter shapes of the workloads in PERFORMANCE.md
def _linear(*sizes: int) -> list[tuple[int, ...]]:
    return [s for a, b in pairwise(sizes) for s in ((b, a), (b,))]


def _resnet18() -> list[tuple[int, ...]]:
    shapes: list[tuple[int, ...]] = [(64, 3, 3, 3), (64,), (64,)]
    width = 64
    for stage, out in enumerate((64, 128, 256, 512)):
        for block in range(2):
            shapes += [(out, width, 3, 3), (out,), (out,), (out, out, 3, 3), (out,), (out,)]
            if stage and not block:
                shapes += [(out, width, 1, 1), (out,), (out,)]
            width = out
    return [*shapes, (10, 512), (10,)]


WORKLOADS: dict[str, list[tuple[int, ...]]] = {
    "200 tiny tensors": [(16,)] * 200,
    "MLP 0.5M": _linear(784, 400, 400, 10),
    "DCGAN 1.5M": [(128, 256, 4, 4), (256, 128, 4, 4), (128, 64, 4, 4), (64, 3, 4, 4), (256, 100, 4, 4)],
    "DCGAN 9.9M": [(100, 512, 4, 4), (512, 512, 4, 4), (512, 256, 4, 4), (256, 512, 4, 4), (512, 64, 4, 4)],
    "ResNet-18 11.2M": _resnet18(),
}


@pytest.fixture(params=WORKLOADS, ids=lambda name: name.replace(" ", "-"))
def shapes(request: pytest.FixtureRequest) -> list[tuple[int, ...]]:
    return WORKLOADS[request.param]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:  # torch.compile's own imports warn; warnings are errors in tests, not here
        item.add_marker(pytest.mark.filterwarnings("ignore"))
