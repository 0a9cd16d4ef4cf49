"""Contests: compare first, then time all contenders in one round-robin; medians, and ratios to fastcl.

    python -m pytest bench -s [--device cuda] [--benchmark-json out.json]
    python bench/report.py out.json bench/results/NAME.md

The machine may be shared: a slow second hits every contender alike, and ratios of medians stay. A contender that gives
another result than fastcl fails the benchmark before anything is timed.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

# scikit-learn's threads would spin into the next contender's turn; read when numpy is loaded
os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", "4")

import pytest
import torch

import fastcl.bench
from fastcl.bench import SHAPES, Contest, human, race

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


@pytest.fixture
def contest(benchmark: Any, device: torch.device, request: pytest.FixtureRequest) -> Callable[..., dict[str, float]]:
    """contest({"fastcl": f, "eager": g, ...}, check=..., floor=seconds) -> median seconds by name."""

    def run(
        contenders: dict[str, Call],
        check: Callable[[dict[str, Call]], None],
        floor: float | None = None,
        before: dict[str, Call] | None = None,
    ) -> dict[str, float]:
        medians = race(Contest(contenders, check, before=before or {}), device, ROUNDS, MIN_SECONDS)
        if floor is not None:
            medians["floor"] = floor
        benchmark.extra_info["medians"] = medians
        benchmark.extra_info["threads"] = torch.get_num_threads()
        benchmark.extra_info["device"] = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
        benchmark.extra_info["torch"] = torch.__version__
        benchmark.pedantic(contenders["fastcl"], rounds=ROUNDS, iterations=max(1, int(MIN_SECONDS / medians["fastcl"])))
        mine = medians["fastcl"]
        others = "  ".join(f"{name} {seconds / mine:.2f}x" for name, seconds in medians.items() if name != "fastcl")
        print(f"\n{request.node.name}: fastcl {human(mine)}  {others}")
        return medians

    return run


@pytest.fixture
def play(contest: Callable[..., Any], copy_rate: Callable[..., float], device: torch.device) -> Callable[..., Any]:
    """One of the package's contests (fastcl/bench), with its floor."""

    def run(given: Contest) -> dict[str, float]:
        floor = None if given.n_bytes is None else given.n_bytes / copy_rate(device, given.n_bytes)
        return contest(given.contenders, given.check, floor=floor, before=given.before)

    return run


@pytest.fixture(scope="session")
def copy_rate() -> Callable[[torch.device, int], float]:
    """Bytes a second, read and written, of torch's copy at this size: what memory-bound ops are held against."""
    known: dict[tuple[str, int], float] = {}

    def rate(device: torch.device, n_bytes: int) -> float:
        key = (str(device), n_bytes)
        if key not in known:
            known[key] = fastcl.bench.copy_rate(device, n_bytes)
        return known[key]

    return rate


@pytest.fixture(params=SHAPES, ids=lambda name: name.replace(" ", "-"))
def shapes(request: pytest.FixtureRequest) -> list[tuple[int, ...]]:
    return SHAPES[request.param]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:  # torch.compile's own imports warn; warnings are errors in tests, not here
        item.add_marker(pytest.mark.filterwarnings("ignore"))
