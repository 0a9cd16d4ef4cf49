"""Every class of bad input at every argument of every op, and that bench/results/robustness.md says what happens."""

from __future__ import annotations

from typing import Any

import pytest

from fastcl import _ops

from ..samples import OPS, op_name
from . import table

cells: dict[str, Any] = {}
policies: dict[str, Any] = {}


@pytest.mark.skipif(_ops.pure_python, reason="of the kernels: torch itself stops a reference at an inference tensor")
@pytest.mark.filterwarnings("ignore:.*[Ss]parse.*:UserWarning")
@pytest.mark.parametrize("case", OPS)
def test_every_class_equals_the_reference_or_raises(case: str) -> None:
    found, policy = table.verdicts(case)
    name = op_name(case)
    cells.setdefault(name, {group: {} for group in table.GROUPS})
    for group, by_argument in found.items():
        for argument, outcomes in by_argument.items():
            cells[name][group].setdefault(argument, set()).update(outcomes)
    policies.setdefault(name, {})
    table.merge_policy(policies[name], policy)


def test_the_table_says_so() -> None:
    """Written by `python -m tests.fuzz.table`."""
    if set(cells) != set(_ops.catalogue):
        pytest.skip("needs all cases of the test above")
    written = table.TARGET.read_text()
    text = table.page({name: cells[name] for name in _ops.catalogue}, {name: policies[name] for name in _ops.catalogue})
    assert written == text
