"""Hypothesis over every op: any input equals the float64 reference or raises before writing (judge.py).

Derandomised and short here; `make fuzz` (.ci/fuzz) runs thousands of random examples an op. FASTCL_FUZZ: how many.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from fastcl import _ops

from ..samples import FLOATS, LAYOUTS, OPS, op_name
from .classes import CLASSES, GROUPS, NO
from .judge import ONLY_RAW, WAYS, judge

EXAMPLES = int(os.environ.get("FASTCL_FUZZ", "0"))
QUICK = 12  # a case, on top of the whole grid of test_table.py
SHAPES = [(), (0,), (1,), (7,), (17,), (65,), (3, 0), (5, 13), (1, 1), (2, 3, 5), (2, 3, 4, 5), (4, 33)]
PLANES = [(1, 1), (2, 3), (5, 6), (4, 17), (9, 2), (0, 3)]


def ways(case: str) -> list[str]:
    return [way for way in WAYS if way == "raw" or not op_name(case).endswith("_backward")]


@st.composite
def calls(draw: st.DrawFn, case: str) -> tuple[Any, str, str]:
    """Arguments of a valid call, changed by up to three classes, and a way to make it."""
    shape = draw(st.sampled_from(SHAPES if OPS[case].shaped else PLANES))
    dtype, layout = draw(st.sampled_from(FLOATS)), draw(st.sampled_from(sorted(LAYOUTS)))
    torch.manual_seed(draw(st.integers(0, 2**16)))
    args = OPS[case].make(shape, dtype, LAYOUTS[layout])
    said = [f"{shape} {dtype} {layout}"]
    possible = ways(case)
    for _ in range(draw(st.integers(0, 3))):
        c = draw(st.sampled_from(CLASSES))
        try:
            places = c.at(case, args)
            place = draw(st.sampled_from(places)) if places else None
            changed = c.make(args, place) if places else NO
            owner = c.argument(case, args, place) if places else ""
        except (RuntimeError, TypeError, IndexError, AttributeError, NotImplementedError):
            continue  # of what an earlier class has left (a sparse or a missing tensor) this one cannot be made
        if changed is not NO:
            args = changed
            if (op_name(case), owner) in ONLY_RAW:
                possible = ["raw"]
            said.append(f"{c.group}: {c.name}")
    return args, draw(st.sampled_from(possible)), "; ".join(said)


def test_no_op_is_missing() -> None:
    """What is fuzzed is the catalogue, and every class of the table belongs to one of its columns."""
    assert {op_name(case) for case in OPS} == set(_ops.catalogue)
    assert len({(c.group, c.name, c.kind) for c in CLASSES}) == len(CLASSES)
    assert {c.group for c in CLASSES} == set(GROUPS)


@pytest.mark.filterwarnings("ignore:.*sparse.*:UserWarning")
@pytest.mark.parametrize("case", OPS)
def test_equals_the_reference_or_raises_before_writing(case: str) -> None:
    torch.set_num_threads(1)

    @settings(
        max_examples=EXAMPLES or QUICK,
        derandomize=not EXAMPLES,
        database=None,
        deadline=None,
        phases=[Phase.generate] if not EXAMPLES else [Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    @given(calls(case))
    def run(call: tuple[Any, str, str]) -> None:
        args, way, said = call
        try:
            judge(case, args, way)
        except AssertionError as error:
            raise AssertionError(f"{case} ({way}), {said}: {error}") from error

    run()
