"""Benchmark JSONs of the same contests as a markdown table: python bench/report.py RUN.json ... bench/results/NAME.md

Of several runs it shows the medians, and from where to where a ratio went: what malloc and the neighbours do differs
more from process to process than from round to round. README and the ops' pages quote these tables: `python
bench/speeds.py` afterwards.
"""

from __future__ import annotations

import json
import platform
import statistics
import sys
from pathlib import Path

from fastcl.bench import human, processor


def ratios(medians: list[dict[str, float]], name: str) -> str:
    found = [of_run[name] / of_run["fastcl"] for of_run in medians]
    spread = f" ({min(found):.2f} to {max(found):.2f})" if len(found) > 1 else ""
    return f"{name} **{statistics.median(found):.2f}**{spread}"


def main(*sources: str) -> None:
    *names, target = sources
    cases: dict[str, list[dict[str, float]]] = {}  # full name -> the medians of every run
    for name in names:
        runs = json.loads(Path(name).read_text())["benchmarks"]
        for run in runs:
            cases.setdefault(run["fullname"], []).append(run["extra_info"]["medians"])
    info = runs[0]["extra_info"]
    counts = [len(medians) for medians in cases.values()]
    times = str(min(counts)) if min(counts) == max(counts) else f"{min(counts)} to {max(counts)}"
    of_several = f", {times} times, medians of the runs and the ratios' range" if max(counts) > 1 else ""
    lines = [
        f"# {Path(target).stem}",
        "",
        f"`python -m pytest bench`{of_several}: medians of interleaved rounds; "
        "ratios are the contender's time over fastcl's, above 1 where fastcl is faster. `floor`: the bytes that must "
        "move, at this machine's measured copy rate for that many bytes.",
        "",
        f"torch {info['torch']}, {info['device']}, {processor()}, {info['threads']} threads, "
        f"Python {platform.python_version()}.",
    ]
    group = None
    for full_name in sorted(cases, key=lambda name: name.split("::")[0]):
        path, _, case = full_name.partition("::")
        name, medians = path.rsplit("/", 1)[-1], cases[full_name]
        if name != group:
            lines += ["", f"## {name}", "", "| case | fastcl | others, as ratios |", "|---|---|---|"]
            group = name
        mine = statistics.median(of_run["fastcl"] for of_run in medians)
        others = ", ".join(ratios(medians, k) for k in medians[0] if k != "fastcl")
        lines.append(f"| {case.removeprefix('test_')} | {human(mine)} | {others} |")
    Path(target).parent.mkdir(parents=True, exist_ok=True)
    Path(target).write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
