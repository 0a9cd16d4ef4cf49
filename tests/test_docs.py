"""Every example in a docstring runs and prints what it says; README's code runs and its tables name real ops."""

from __future__ import annotations

import doctest
import importlib
import importlib.util
import pkgutil
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

import fastcl
from fastcl import _ops, streams

from .conftest import ROOT

NO_PYTHON = ("__main__", "libfastcl", "_C")
INSIDE = "fastcl.integrations."  # each needs its library


def present(name: str) -> bool:
    return not name.startswith(INSIDE) or importlib.util.find_spec(name.removeprefix(INSIDE)) is not None


MODULES = sorted(
    m.name
    for m in pkgutil.walk_packages(fastcl.__path__, "fastcl.")
    if not m.name.endswith(NO_PYTHON) and present(m.name)
)
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def names() -> dict[str, Any]:
    """What the examples take for granted."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    x, y = torch.randn(6, 4), torch.randint(0, 2, (6,))
    criterion = nn.CrossEntropyLoss()
    return {
        "torch": torch,
        "nn": nn,
        "fastcl": fastcl,
        "streams": streams,
        "model": model,
        "optimizer": optimizer,
        "x": x,
        "y": y,
        "criterion": criterion,
        "loss": criterion(model(x), y),
        "loader": [(x, y)],
    }


def examples(module: str) -> Iterator[doctest.DocTest]:
    found = doctest.DocTestFinder(exclude_empty=True).find(importlib.import_module(module))
    return (test for test in found if test.examples)


@pytest.mark.parametrize("module", MODULES)
def test_examples(module: str) -> None:
    for test in examples(module):
        test.globs |= names() | {**vars(importlib.import_module(module)), **names()}
        said: list[str] = []
        failed = doctest.DocTestRunner(optionflags=FLAGS).run(test, out=said.append).failed
        assert not failed, "".join(said)


def test_every_public_op_has_an_example() -> None:
    for name in fastcl.ops.__all__:
        assert ">>>" in (getattr(fastcl.ops, name).__doc__ or ""), name


README = (ROOT / "README.md").read_text()


def test_readmes_ops_exist() -> None:
    table = README[README.index("| op |") :].split("\n\n")[0]
    named = [name for line in table.splitlines() for name in re.findall(r"`(\w+)[(`]", line.split("|")[1])]
    assert set(named) <= set(fastcl.ops.__all__)
    assert len(named) >= 20
    for name in named:
        assert name in _ops.catalogue


def test_readmes_loop_runs() -> None:
    """The block that starts with `import fastcl`, on two tasks."""
    (code,) = re.findall(r"```python\n(import fastcl\n.*?)```", README, re.DOTALL)

    class Task:
        def __init__(self, loader: Any) -> None:
            self.loader = loader

    scope = names()
    before = [p.detach().clone() for p in scope["model"].parameters()]
    exec(code, scope | {"tasks": [Task(scope["loader"]), Task(scope["loader"])]})
    assert not all(torch.equal(p, b) for p, b in zip(scope["model"].parameters(), before, strict=True))
