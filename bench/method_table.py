"""The table of fastcl/methods/README.md, made from the methods themselves and bench/results/*.jsonl:

    python bench/method_table.py

Nothing in it is typed: name, paper, settings and options are the classes', accuracies bench/experiments.py's.
"""

from __future__ import annotations

import argparse
import functools
import inspect
import json
import re
import statistics
import sys
from pathlib import Path
from typing import Any

from fastcl.methods import METHODS

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench" / "results"
PAGE = ROOT / "fastcl" / "methods" / "README.md"
SETTINGS = ("task", "domain", "class")
# the experiments that a cell may come from: the one with the most seeds, then the first
SPLIT, ONE_A_TASK = ("mnist", "importances", "masks", "neurogenesis"), ("generative",)
COLUMNS = ("average_accuracy", "acc_generated")  # of ONE_A_TASK
# variants that a table also has, and which are not the method as it stands
NOT_THE_METHOD = {"budget", "replay", "mode", "parallel", "binary"}
HIDDEN = {"setting", "lr", "optimizer", "seed", "hidden"}  # what every method takes


@functools.cache
def runs(table: str) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    path = RESULTS / f"{table}.jsonl"
    lines = map(json.loads, path.read_text().splitlines()) if path.exists() else ()
    return [(json.loads(line["key"]), line) for line in lines]


def measured(method: str, setting: str, table: str, column: str) -> list[list[float]]:
    """The seeds' values of every label that the table has for the method as it stands."""
    labels: dict[str, list[float]] = {}
    for key, line in runs(table):
        chosen = key["method"] == method and key["setting"] == setting and key["scenario"] == "split"
        usual = parameters(METHODS[key["method"]]) if chosen else {}
        varied = {k for k, v in key["options"].items() if k in NOT_THE_METHOD and (k not in usual or v != usual[k])}
        if chosen and not varied and line.get(column) is not None:
            labels.setdefault(key["label"], []).append(100 * line[column])
    return list(labels.values())


def shown(values: list[float], table: str) -> str:
    return f"[{statistics.mean(values):.1f}](../../bench/results/{table}.md) ({len(values)})"


def cell(method: str, setting: str, tables: tuple[str, ...], column: str) -> str:
    """Empty where nothing was measured."""
    found = [(table, measured(method, setting, table, column)) for table in tables]
    best = max(found, key=lambda pair: len(pair[1][0]) if pair[1] else 0)
    return shown(best[1][0], best[0]) if best[1] else ""


def parameters(method: type) -> dict[str, Any]:
    """The method's own keyword arguments and their defaults."""
    found: dict[str, Any] = {}
    for cls in reversed(method.__mro__):
        for name in ("__init__", "build"):
            if name in vars(cls):
                of = inspect.signature(getattr(cls, name)).parameters
                found |= {k: p.default for k, p in of.items() if p.kind is p.KEYWORD_ONLY and k not in HIDDEN}
    return found


def options(method: type) -> str:
    """As `fastcl run --option` takes them."""
    return ", ".join(f"{k}={default!r}".replace("'", "") for k, default in parameters(method).items())


def table() -> str:
    head = ["method", "paper", "seed", "settings", *SETTINGS, "one class a task", "of generated", "options"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for name, method in METHODS.items():
        paper = re.sub(r",.*", "", method.paper) if re.search(r"\d{4}", method.paper) else method.paper
        cells = [f"[{name}]({Path(inspect.getfile(method)).name})", paper, method.seed, ", ".join(method.settings)]
        cells += [cell(name, s, SPLIT, "average_accuracy") if s in method.settings else "-" for s in SETTINGS]
        cells += [cell(name, "class", ONE_A_TASK, column) for column in COLUMNS]
        lines.append(f"| {' | '.join([*cells, options(method)])} |")
    return "\n".join(lines)


def filled(text: str) -> str:
    start, end = "<!-- methods -->\n", "<!-- /methods -->"
    before, _, rest = text.partition(start)
    return f"{before}{start}{table()}\n{end}{rest.partition(end)[2]}"


def wrong(text: str) -> list[str]:
    """What the page says that neither the classes nor bench/results say. A mean over the runs of an earlier day, of
    the first few that stand there now, is not wrong: lines are only ever appended."""
    old, new = (t.partition("<!-- methods -->\n")[2].partition("\n<!-- /methods -->")[0] for t in (text, filled(text)))
    if len(old.splitlines()) != len(new.splitlines()):
        return ["the page does not have the methods that there are"]
    found = []
    for said, right in zip(old.splitlines(), new.splitlines(), strict=True):
        columns = list(zip(said.split(" | "), right.split(" | "), strict=True))
        for i, (a, b) in enumerate(columns):
            figure = re.fullmatch(r"\[[\d.]+\]\(../../bench/results/(\w+)\.md\) \((\d+)\)", a)
            if not figure and a and a != b:
                found.append(f"{a!r} where it must be {b!r}")
            if not figure:
                continue
            method = re.match(r"\| \[([\w-]+)\]", said)[1]  # type: ignore[index]
            setting, column = (SETTINGS[i - 4], COLUMNS[0]) if i < 7 else ("class", COLUMNS[i - 7])
            runs = measured(method, setting, figure[1], column)
            if a not in [shown(values[: int(figure[2])], figure[1]) for values in runs]:
                found.append(f"{a} of {method} does not stand in bench/results/{figure[1]}.jsonl")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing, say what the page says wrongly")
    text = PAGE.read_text()
    if parser.parse_args().check:
        for sentence in wrong(text):
            print(sentence)
        return bool(wrong(text))
    PAGE.write_text(filled(text))
    return 0


if __name__ == "__main__":
    sys.exit(main())
