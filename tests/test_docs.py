"""Every example in a docstring runs and prints what it says; the pages' code runs, in Python and in C++, their excerpts
stand in the sources, their links lead somewhere, their figures are bench/results'."""

from __future__ import annotations

import doctest
import functools
import importlib
import importlib.util
import inspect
import os
import pkgutil
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import is_dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

import fastcl
from fastcl import _ops, streams
from fastcl.methods import METHODS

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
        "stream": digits(),
        "batch": tuple(part[:32] for part in digits().tasks[0].train()),
        "result": {
            "method": "ewc",
            "data": "digits",
            "scenario": "split",
            "setting": "task",
            "accuracy": [[0.9, 0.5], [0.8, 0.7]],
            "average_accuracy": 0.75,
            "forgetting": 0.1,
        },
    }


@functools.cache
def digits() -> streams.Stream:
    return streams.make(streams.load("digits"), "split", "class")


def examples(module: str) -> Iterator[doctest.DocTest]:
    found = doctest.DocTestFinder(exclude_empty=True).find(importlib.import_module(module))
    return (test for test in found if test.examples)


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.filterwarnings("ignore::fastcl.FallbackWarning")
def test_examples(module: str, tmp_path: Path) -> None:
    for test in examples(module):
        test.globs |= {**vars(importlib.import_module(module)), **names(), "folder": tmp_path}
        said: list[str] = []
        failed = doctest.DocTestRunner(optionflags=FLAGS).run(test, out=said.append).failed
        assert not failed, "".join(said)


# modules without __all__: what they define
PUBLIC = ["fastcl", *(f"fastcl.{name}" for name in ("ops", "nn", "optim", "methods", "importance", "streams"))]
PUBLIC += [f"fastcl.{name}" for name in ("metrics", "checkpoint", "plots", "runner", "integrations.mammoth")]


def public() -> dict[str, Any]:
    """Every public class and function, by its full name."""
    found = {}
    for module in map(importlib.import_module, PUBLIC):
        own = [n for n, o in vars(module).items() if n[0] != "_" and getattr(o, "__module__", "") == module.__name__]
        for name in getattr(module, "__all__", own):
            thing = getattr(module, name)
            if inspect.isclass(thing) or inspect.isfunction(thing):
                found[f"{thing.__module__}.{thing.__qualname__}"] = thing
    return found


@pytest.mark.parametrize("name", sorted(public()))
def test_public_names_are_documented(name: str) -> None:
    """A summary; what its tensors are; what it raises; an example (which test_examples runs)."""
    thing = public()[name]
    doc = thing.__doc__ or ""
    assert doc.strip(), "a summary"
    if inspect.isclass(thing) and issubclass(thing, Exception):
        return
    assert ">>>" in doc, "an Example"
    if inspect.isclass(thing) and ("__init__" not in vars(thing) or is_dataclass(thing)):
        return  # arguments are inherited, and so is their description
    function = inspect.unwrap(thing.__init__ if inspect.isclass(thing) else thing)
    if re.search(r"^\s+raise \w+Error", inspect.getsource(function), re.MULTILINE):
        assert "Raises" in doc, "Raises"
    if any("Tensor" in str(p.annotation) for p in inspect.signature(function).parameters.values()):
        assert "Args" in doc or re.search(r"\[\w+(, [\w.*/ ]+)*\]", doc), "Args or shapes"


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


# ---- the pages beside the code ----

PAGES = [ROOT / "fastcl" / "ops" / "README.md", *sorted((ROOT / "fastcl" / "ops").glob("*/README.md"))]
PAGES += [ROOT / "fastcl" / "methods" / "README.md", ROOT / "csrc" / "README.md"]
BLOCK = re.compile(r"^```(\w+)(?: (\S+))?\n(.*?)^```", re.DOTALL | re.MULTILINE)  # language, file of an excerpt, code


def blocks(page: Path, language: str) -> list[str]:
    """What a reader would run: excerpts of files are left out."""
    return [code for what, path, code in BLOCK.findall(page.read_text()) if what == language and not path]


def page_id(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_pages_code_runs(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in METHODS:
        monkeypatch.setitem(METHODS, name, METHODS[name])
    scope, before = names(), dict(METHODS)
    try:
        for code in blocks(page, "python"):
            exec(compile(code, page_id(page), "exec"), scope)
    finally:
        METHODS.clear()
        METHODS.update(before)  # a page may add one


def test_every_op_has_its_page() -> None:
    for name in fastcl.ops.__all__:
        stem = getattr(fastcl.ops, name).__module__.split(".")[2]
        assert f"`{name}" in (ROOT / "fastcl" / "ops" / stem / "README.md").read_text(), name


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_pages_excerpts_stand_in_their_files(page: Path) -> None:
    for _, path, code in BLOCK.findall(page.read_text()):
        assert not path or code in (ROOT / path).read_text(), (path, code)


@pytest.mark.parametrize("page", [*PAGES, *(ROOT / n for n in ("README.md", "CONTRIBUTING.md"))], ids=page_id)
def test_links_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", BLOCK.sub("", page.read_text()))
    here = [target for target in targets if "://" not in target]
    assert [target for target in here if not (page.parent / target).exists()] == []


compiles = pytest.mark.skipif(
    _ops.pure_python or os.name == "nt" or shutil.which("g++") is None, reason="needs g++ and the kernels"
)


def compile_cpp(source: Path, target: Path, *options: str) -> None:
    """As fastcl/ops/README.md and csrc/README.md say it."""
    home = Path(torch.__file__).parent
    command = ["g++", "-std=c++17", "-O0", "-DTORCH_TARGET_VERSION=0x020a000000000000", f"-I{home / 'include'}"]
    command += [str(source), "-o", str(target), f"-L{home / 'lib'}", f"-Wl,-rpath,{home / 'lib'}", *options]
    done = subprocess.run([*command, "-ltorch_cpu", "-lc10"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@compiles
def test_extensions_of_the_pages(tmp_path: Path) -> None:
    """All of them as one file, so that torch's headers are compiled once."""
    files = []
    for page in PAGES[1:6]:
        (code,) = blocks(page, "cpp")
        files.append(tmp_path / f"{page.parent.name}.h")
        files[-1].write_text(code)
    (tmp_path / "mine.cpp").write_text("".join(f'#include "{file.name}"\n' for file in files))
    compile_cpp(tmp_path / "mine.cpp", tmp_path / "mine.so", "-fPIC", "-shared")
    torch.ops.load_library(str(tmp_path / "mine.so"))
    mine = torch.ops.mine

    g = torch.ones(3)
    version = g._version
    mine.freeze(g, torch.tensor([True, False, True]))
    assert g.tolist() == [0.0, 1.0, 0.0]
    assert g._version > version  # the guards of fastcl's op hold
    with pytest.raises(RuntimeError):
        mine.freeze(torch.nn.Parameter(torch.ones(3)), torch.ones(3, dtype=torch.bool))

    e, same = (torch.tensor([-1.0, 2.0], requires_grad=True) for _ in range(2))
    mine.gate(e, 3.0).sum().backward()
    fastcl.ops.annealed_mask(same, 3.0).sum().backward()
    assert torch.equal(e.grad, same.grad)

    g, a, fisher = torch.randn(5, 2), torch.randn(5, 3), torch.zeros(2, 3)
    mine.add_fisher(fisher, g, a)
    torch.testing.assert_close(fisher, (g.double().T.square() @ a.double().square()).float())

    y, key = torch.tensor([0, 1]), torch.tensor([7])
    means, factors = torch.randn(2, 4), torch.rand(2, 4)
    assert torch.equal(mine.replay(y, means, factors, key), torch.ops.fastcl.gmm_sample(y, means, factors, key))

    w = torch.tensor([-2.0, 0.5])
    mine.shrink([w], 1.0)
    assert w.tolist() == [-1.0, 0.0]


@compiles
def test_a_program_without_python(tmp_path: Path) -> None:
    (code,) = blocks(ROOT / "csrc" / "README.md", "cpp")
    (tmp_path / "main.cpp").write_text(code)
    compile_cpp(tmp_path / "main.cpp", tmp_path / "main", "-ldl")
    done = subprocess.run([tmp_path / "main", _ops.LIBRARY], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "-1 0 2\n"), done.stderr


def bench(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "bench" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_speeds_are_the_results() -> None:
    speeds = bench("speeds")
    assert all("<!-- speeds" in page.read_text() for page in speeds.PAGES)
    assert speeds.stale() == [], "run python bench/speeds.py"


def test_speeds_notices_another_figure() -> None:
    speeds = bench("speeds")
    text = next(page for page in speeds.PAGES if page.parent.name == "proximal").read_text()
    assert speeds.filled(re.sub(r"eager \*\*[\d.]+", "eager **99.99", text)) == text


def test_method_table_says_what_was_measured() -> None:
    assert bench("method_table").wrong((ROOT / "fastcl" / "methods" / "README.md").read_text()) == []


@pytest.mark.parametrize(
    "change", [("Serra et al.", "Sierra et al."), ("s_max=400.0", "s_max=800.0"), ("[59.6]", "[69.6]")]
)
def test_method_table_notices_another_word_or_figure(change: tuple[str, str]) -> None:
    text = (ROOT / "fastcl" / "methods" / "README.md").read_text()
    assert change[0] in text
    (sentence,) = bench("method_table").wrong(text.replace(*change, 1))
    assert change[1] in sentence


def accuracies(name: str) -> dict[tuple[str, str], tuple[float, ...]]:
    """(heading, method) to accuracy and forgetting, of a table that bench/experiments.py wrote."""
    found, heading, columns = {}, "", []
    for line in (ROOT / "bench" / "results" / f"{name}.md").read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("## "):
            heading = line.removeprefix("## ")
        elif cells[0] == "method":
            columns = [cells.index("accuracy"), cells.index("forgetting")]
        elif line.startswith("| "):
            # the first of a method's rows: the others are of smaller networks
            found.setdefault((heading, cells[0]), tuple(float(cells[c].split()[0]) for c in columns))
    return found


def test_readmes_accuracies_are_the_results() -> None:
    rows = {cells[0]: cells[1:] for cells in (re.split(r" *\| *", r.strip("| ")) for r in README.splitlines()) if cells}
    importances, masks, growth = map(accuracies, ("importances", "masks", "growth"))
    says = []
    for label in ("EWC", "online EWC", "SI", "MAS", "RWalk"):
        there = "EWC (separate anchors)" if label == "EWC" else label
        for setting, cell in zip(("task", "domain", "class"), rows[label], strict=True):
            says.append((cell, importances[f"split MNIST, {setting} setting", there][0]))
    hat = rows["HAT, binary masks"]
    says.append((hat[0], masks["split MNIST, task setting", "HAT"][0]))
    says.append((hat[2], masks["split MNIST, class setting", "HAT, task inferred by entropy"][0]))
    says += [(cell, n) for cell, n in zip(rows["DEN"], growth["variation MNIST, task setting", "DEN"], strict=False)]
    assert len(says) == 19
    for cell, figure in says:
        assert abs(float(re.match(r"[\d.]+", cell)[0]) - figure) < 0.051, (cell, figure)  # type: ignore[index]
