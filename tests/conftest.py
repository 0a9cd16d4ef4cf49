"""What every test shares: determinism (uninitialised memory is NaN), a seed, and where the real data lies."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parent.parent
OPCHECKS = pytest.StashKey[Counter[str]]()


def mnist_root() -> Path | None:
    for candidate in (
        os.environ.get("FASTCL_DATA"),
        ROOT / "data" / "mnist",
        ROOT.parent / "shared" / "data" / "mnist",
    ):
        if candidate and any(Path(candidate).glob("train-images*")):
            return Path(candidate)
    return None


def pytest_configure(config: pytest.Config) -> None:
    config.stash[OPCHECKS] = Counter()
    if hasattr(config, "workerinput"):  # of pytest-xdist: the workers share the processors, with those they start
        threads = max(1, (os.cpu_count() or 1) // config.workerinput["workercount"])
        torch.set_num_threads(threads)
        os.environ.setdefault("OMP_NUM_THREADS", str(threads))


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["opchecks"] = dict(session.config.stash[OPCHECKS])


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    node.config.stash[OPCHECKS].update(getattr(node, "workeroutput", {}).get("opchecks", {}))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    missing = {
        "mnist": "real MNIST not found: set FASTCL_DATA" if mnist_root() is None else None,
        "gpu": None if torch.cuda.is_available() else "no CUDA or ROCm device",
        "large": None if os.environ.get("FASTCL_LARGE") == "1" else "set FASTCL_LARGE=1",
    }
    for item in items:
        for marker, reason in missing.items():
            if reason and item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    passed = config.stash[OPCHECKS]
    if passed:
        ops = ", ".join(f"{name} {n}" for name, n in sorted(passed.items()))
        terminalreporter.write_line(f"opcheck: {passed.total()} passed on {len(passed)} ops ({ops})")


@pytest.fixture
def opcheck(request: pytest.FixtureRequest) -> Callable[[Any, tuple[Any, ...]], None]:
    """torch.library.opcheck with all its tests; those that passed are counted for the summary line."""

    def check(op: Any, args: tuple[Any, ...]) -> None:
        results = torch.library.opcheck(op, args)
        assert len(results) == 4
        assert set(results.values()) == {"SUCCESS"}
        request.config.stash[OPCHECKS][op._opname] += 1

    return check


@pytest.fixture
def mnist() -> Path:
    root = mnist_root()
    assert root is not None, "mark the test with `mnist`"
    return root


@pytest.fixture(autouse=True)
def _repeatable() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(threads)
