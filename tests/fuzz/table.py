"""bench/results/robustness.md: every op against every class of bad input, from what the judge says.

    python -m tests.fuzz.table            # writes it
    python -m tests.fuzz.table --check    # compares

Each cell is one or more real calls: `=` all of them equal the float64 reference, `x` all raise and leave every argument
as it was, and where arguments differ, which ones do what. A call that does neither has no cell: it is an error.
"""

from __future__ import annotations

import sys
import warnings
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch

from fastcl import _ops

from ..conftest import ROOT
from ..samples import LAYOUTS, OPS, op_name
from .classes import GROUPS, examples
from .judge import ONLY_RAW, WAYS, Verdict, judge

TARGET = ROOT / "bench" / "results" / "robustness.md"
SHAPE = (4, 5)

# Bugs that are known and open, each until its kernel is mended: the judge must still object.
OPEN: dict[tuple[str, str, str], str] = {}

Found = dict[str, dict[str, set[str]]]  # group -> argument -> what happened

INTRODUCTION = """# Bad input, op by op

`python -m tests.fuzz.table` writes this page, `tests/fuzz/test_table.py` makes every call of it again. Each cell stands
for real calls: every class of the group, applied to every argument in turn, through `torch.ops` or `fastcl.ops`.

- `=`: the result equals the op's float64 reference (rounded to the result's dtype), nothing else was written;
- `x`: ValueError, TypeError or RuntimeError, every byte of every argument as it was, version counters too;
- `=: a, b; x: c`: the arguments differ, or (`= x`) the classes of the group do for that argument;
- `open`: a known bug, named in `OPEN` of tests/fuzz/table.py;
- `n/a`: the op has no argument that the group could be made of.
"""

GROUP_NOTES = {
    "NaN, infinity": "NaN, inf, -inf in one entry, and everywhere",
    "out of range": "all entries -1, 1.5, 0",
    "huge, tiny": "times 1e38, 1e20, 1e-20, 1e-40 (float64 to the 8th power), one argument or all by 1e19, 1e-19",
    "strides": "an offset, gaps, transposed, channels last",
    "overlaps itself": "expanded, sliding window",
    "another dtype": "one argument in each other float, int64, int32, uint8, bool, complex64",
    "all of one dtype": "all arguments in each float, and complex64",
    "another shape": "0-d, a dimension more, a row more, a row less, flattened",
    "empty": "no rows in one argument, in all; no elements at all",
    "lists": "empty (one, all), one less, one more, a tuple, a tensor instead, reversed",
    "another device": "one argument on meta",
    "all on meta": "shapes and dtypes only, as torch.compile asks",
    "aliases": "two arguments the same tensor, or overlapping views of one memory",
    "requires grad": "a leaf, or a result with a graph, for each argument",
    "odd tensors": "negative-bit view, sparse, inference tensor, a subclass",
    "no tensor": "None, a number, a numpy array",
    "numbers": "0, -1, 1e-40, 1e38, 2^31, 2^62, -2^63, NaN, infinities for every number",
    "no number": "None, a string, a complex number, 10^30",
}

POLICY = """
## NaN and infinity, argument by argument

What all entries NaN (inf) do: `propagates` to the result, as the reference has it; `refused`; `ignored`: the result is
finite. In short: arithmetic propagates; whatever is a promise about a range (masks, importances that are checked,
Gaussians' deviations, shares, scales, strengths) is refused; a reserved entry is written by nothing, not even NaN.
"""


def verdicts(case: str) -> tuple[Found, dict[str, dict[str, str]]]:
    """What happened, by group and argument; and the NaN policy, by argument and value."""
    found: Found = defaultdict(lambda: defaultdict(set))
    policy: dict[str, dict[str, str]] = defaultdict(dict)
    torch.set_num_threads(1)
    for group in GROUPS:
        found[group]  # every cell is there

    def args() -> Any:
        torch.manual_seed(0)
        return OPS[case].make(SHAPE, torch.float32, LAYOUTS["contiguous"])

    ways = [way for way in WAYS if way == "raw" or not op_name(case).endswith("_backward")]
    for k, (c, place, make) in enumerate(examples(case, args)):
        argument = c.argument(case, args(), place)
        everywhere = c.group == "NaN, infinity" and c.name.endswith("everywhere")
        way = "raw" if (op_name(case), argument) in ONLY_RAW else ways[k % len(ways)]
        if (op_name(case), argument, c.name.split()[0]) in OPEN:
            try:
                judge(case, make(), way)
            except AssertionError:
                found[c.group][argument].add("open")
                continue
            if _ops.pure_python:  # the reference never had it
                found[c.group][argument].add("open")
                continue
            raise AssertionError(f"{case}: {c.name} in {argument} is mended: take it out of OPEN")
        try:
            verdict = judge(case, make(), way)
        except AssertionError as error:
            raise AssertionError(f"{case} ({way}), {c.group}: {c.name}, {argument} {place}: {error}") from error
        found[c.group][argument].add("=" if verdict.outcome == "equals" else "x")
        if everywhere:
            value = c.name.split()[0]
            said = _policy(verdict)
            policy[argument][value] = said if policy[argument].get(value, said) == said else "by tensor"
    return found, policy


def _policy(verdict: Verdict) -> str:
    if verdict.outcome == "raises":
        return "refused"
    return "propagates" if verdict.nans else "ignored"


def cell(by_argument: dict[str, set[str]]) -> str:
    if not by_argument:
        return "n/a"
    groups: dict[str, list[str]] = defaultdict(list)
    for argument, outcomes in by_argument.items():
        groups[" ".join(sorted(outcomes))].append(argument)
    if len(groups) == 1:
        return next(iter(groups))
    return "; ".join(f"{outcome}: {', '.join(a or 'all' for a in names)}" for outcome, names in sorted(groups.items()))


def collect(name: str) -> tuple[Found, dict[str, dict[str, str]]]:
    """Of one op: its cases (diagonal, 1-d, ...) share a row."""
    cells: Found = defaultdict(lambda: defaultdict(set))
    policies: dict[str, dict[str, str]] = {}
    for case in OPS:
        if op_name(case) == name:
            found, policy = verdicts(case)
            for group, by_argument in found.items():
                cells[group]
                for argument, outcomes in by_argument.items():
                    cells[group][argument] |= outcomes
            merge_policy(policies, policy)
    return cells, policies


def merge_policy(into: dict[str, dict[str, str]], policy: dict[str, dict[str, str]]) -> None:
    for argument, values in policy.items():
        mine = into.setdefault(argument, dict(values))
        for value, said in values.items():
            mine[value] = said if mine.get(value, said) == said else "by tensor"


def row(name: str, found: Found) -> str:
    return f"| `{name}` | " + " | ".join(cell(found[group]) for group in GROUPS) + " |"


def policy_rows(name: str, by_argument: dict[str, dict[str, str]]) -> list[str]:
    rows = []
    for argument, values in by_argument.items():
        said = " | ".join(values.get(v, "n/a") for v in ("nan", "inf", "-inf"))
        rows.append(f"| `{name}` | {argument} | {said} |")
    return rows


def page(ops: dict[str, tuple[Found, dict[str, dict[str, str]]]]) -> str:
    lines = [INTRODUCTION, "| group | classes |", "|---|---|"]
    lines += [f"| {group} | {GROUP_NOTES[group]} |" for group in GROUPS]
    lines += ["", "| op | " + " | ".join(GROUPS) + " |", "|---" * (len(GROUPS) + 1) + "|"]
    lines += [row(name, found) for name, (found, _) in ops.items()]
    lines += [POLICY, "| op | argument | NaN | inf | -inf |", "|---|---|---|---|---|"]
    for name, (_, policy) in ops.items():
        lines += policy_rows(name, policy)
    lines += ["", "`by tensor`: not the same for all tensors of the list (what is reserved there takes no NaN).", ""]
    return "\n".join(lines)


def main() -> int:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        text = page({name: collect(name) for name in _ops.catalogue})
    if "--check" in sys.argv:
        return 0 if Path(TARGET).read_text() == text else 1
    TARGET.write_text(text)
    print(f"{TARGET}: {len(_ops.catalogue)} ops, {len(GROUPS)} groups")
    return 0


if __name__ == "__main__":
    sys.exit(main())
