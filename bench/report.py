"""A benchmark JSON as a markdown table: python bench/report.py out.json bench/results/NAME.md

README and the ops' pages quote these tables: `python bench/speeds.py` afterwards.
"""

from __future__ import annotations

import json
import platform
import sys
from pathlib import Path

from fastcl.bench import human, processor


def main(source: str, target: str) -> None:
    runs = json.loads(Path(source).read_text())["benchmarks"]
    info = runs[0]["extra_info"]
    lines = [
        f"# {Path(target).stem}",
        "",
        f"`python -m pytest bench --benchmark-json {Path(source).name}`: medians of interleaved rounds; "
        "ratios are the contender's time over fastcl's, above 1 where fastcl is faster. `floor`: the bytes that must "
        "move, at this machine's measured copy rate for that many bytes.",
        "",
        f"torch {info['torch']}, {info['device']}, {processor()}, {info['threads']} threads, "
        f"Python {platform.python_version()}.",
    ]
    group = None
    for run in sorted(runs, key=lambda r: r["fullname"].split("::")[0]):
        name = run["fullname"].split("::")[0].rsplit("/", 1)[-1]
        if name != group:
            lines += ["", f"## {name}", "", "| case | fastcl | others, as ratios |", "|---|---|---|"]
            group = name
        medians = run["extra_info"]["medians"]
        mine = medians["fastcl"]
        others = ", ".join(f"{k} **{v / mine:.2f}**" for k, v in medians.items() if k != "fastcl")
        lines.append(f"| {run['name'].removeprefix('test_')} | {human(mine)} | {others} |")
    Path(target).parent.mkdir(parents=True, exist_ok=True)
    Path(target).write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
