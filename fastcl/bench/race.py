"""Compare first, then time all contenders in one round-robin: a slow second on a shared machine hits each alike."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

Call = Callable[[], Any]
SETTLE = 0.005  # seconds: OpenMP threads of the contender before spin for a while, waiting for more
WARM_UP = 0.02  # seconds: after that sleep a core takes about so long to run at its full speed again
LONGEST = 120.0  # seconds of a contest's rounds, about

Compiled = Callable[[Call], dict[str, Call]]  # {"torch.compile": compiled f}, or nothing where it is left out


@dataclass
class Contest:
    """Ways to the same result, "fastcl" among them; `check` raises where one of them gives another.

    `n_bytes` is what must be read and written at least, for contests that memory decides. `before[name]` runs untimed
    before every call of that contender: what comes before it where it is used, and leaves the caches to other things.
    """

    contenders: dict[str, Call]
    check: Callable[[dict[str, Call]], None]
    n_bytes: int | None = None
    before: dict[str, Call] = field(default_factory=dict)


def race(contest: Contest, device: torch.device, rounds: int = 11, min_seconds: float = 2e-3) -> dict[str, float]:
    """Median seconds of a call by contender, after `check`; in a round it is called untimed for `WARM_UP`, at
    least once, then until `min_seconds` are over. Where calls take seconds there are fewer rounds, at least three.

    Raises:
        AssertionError: a contender gives another result than the others; nothing is timed then.

    Example:
        >>> from fastcl.bench.race import Contest, race
        >>> medians = race(Contest({"fastcl": lambda: 1}, lambda contenders: None), torch.device("cpu"), rounds=3)
    """
    contest.check(contest.contenders)
    repeats, total = {}, 0.0
    for name, call in contest.contenders.items():
        first = seconds(call, 1, device)
        for _ in range(2 if first < 1 else 0):
            call()
        once = min(seconds(call, 1, device) for _ in range(3 if first < 1 else 1))
        repeats[name] = max(1, int(min_seconds / max(once, 1e-7)))
        total += 2 * once
    rounds = max(3, min(rounds, int(LONGEST / max(total, 1e-7))))
    times: dict[str, list[float]] = {name: [] for name in contest.contenders}
    for _ in range(rounds):
        for name, call in contest.contenders.items():
            time.sleep(SETTLE)
            warm = time.perf_counter() + WARM_UP
            call()
            while time.perf_counter() < warm:
                call()
            if (before := contest.before.get(name)) is None:
                times[name].append(seconds(call, repeats[name], device))
                continue
            for _ in range(3):
                before()
                times[name].append(seconds(call, 1, device))
    return {name: statistics.median(values) for name, values in times.items()}


def seconds(call: Call, repeats: int, device: torch.device) -> float:
    """Wall time of one of `repeats` calls, the device's queue included."""
    _synchronise(device)
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    _synchronise(device)
    return (time.perf_counter() - start) / repeats


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def copy_rate(device: torch.device, n_bytes: int) -> float:
    """Bytes a second, read and written, of torch's copy at this size: what memory-bound ops are held against."""
    a = torch.zeros(max(1, n_bytes // 8), device=device)  # half read, half written
    b = torch.ones_like(a)
    return 2 * a.numel() * 4 / min(seconds(lambda: a.copy_(b), 5, device) for _ in range(9))


def processor() -> str:
    """The CPU's name."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:  # not Linux
        pass
    return platform.processor() or platform.machine()


def human(time_s: float) -> str:
    return f"{time_s * 1e3:.2f} ms" if time_s >= 1e-3 else f"{time_s * 1e6:.2f} us"
