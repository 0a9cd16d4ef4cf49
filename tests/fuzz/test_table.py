"""Every class of bad input at every argument of every op, and that bench/results/robustness.md says what happens."""

from __future__ import annotations

import pytest

from fastcl import _ops

from . import table


@pytest.mark.skipif(_ops.pure_python, reason="of the kernels: torch itself stops a reference at an inference tensor")
@pytest.mark.filterwarnings("ignore:.*[Ss]parse.*:UserWarning")
@pytest.mark.parametrize("name", _ops.catalogue)
def test_every_class_equals_the_reference_or_raises_as_the_page_says(name: str) -> None:
    """The page is written by `python -m tests.fuzz.table`."""
    found, policy = table.collect(name)
    written = [line for line in table.TARGET.read_text().splitlines() if line.startswith(f"| `{name}` |")]
    assert written == [table.row(name, found), *table.policy_rows(name, policy)]


def test_the_page_explains_itself_and_has_no_other_op() -> None:
    written = table.TARGET.read_text()
    assert "\n".join(line for line in written.splitlines() if not line.startswith("| `")) + "\n" == table.page({})
    named = {line.split("`")[1] for line in written.splitlines() if line.startswith("| `")}
    assert named == set(_ops.catalogue)
