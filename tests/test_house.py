"""The rules of the house (CONTRIBUTING.md), read from the sources."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import fastcl

from .conftest import ROOT

PACKAGE = ROOT / "fastcl"
STEMS = sorted(p.name for p in (ROOT / "csrc").iterdir() if p.is_dir() and p.name != "common" and any(p.iterdir()))
MODULES = sorted(p for p in PACKAGE.rglob("*.py"))


def imports(path: Path) -> set[str]:
    """Absolute names of the modules that a file imports, under TYPE_CHECKING or not."""
    package = ("fastcl", *path.relative_to(PACKAGE).parts[:-1])
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            name = ".".join((*base, *(node.module.split(".") if node.module else ())))
            found |= {name} | {f"{name}.{alias.name}" for alias in node.names}
    return found


def within(name: str, *packages: str) -> bool:
    return any(name == p or name.startswith(p + ".") for p in packages)


@pytest.mark.parametrize("stem", STEMS)
def test_every_stem_stands_in_every_tree(stem: str) -> None:
    assert (ROOT / "csrc" / stem / "math.h").is_file()
    for name in ("__init__.py", "reference.py", "triton.py"):
        assert (PACKAGE / "ops" / stem / name).is_file()
    assert (ROOT / "tests" / f"test_{stem}.py").is_file() or (ROOT / "tests" / f"test_{stem}_ops.py").is_file()
    assert (ROOT / "bench" / f"bench_{stem}.py").is_file()


def test_ops_have_no_other_stem() -> None:
    assert {p.name for p in (PACKAGE / "ops").iterdir() if p.is_dir() and p.name != "__pycache__"} == set(STEMS)


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_nothing_imports_upwards_or_sideways(path: Path) -> None:
    inside = path.relative_to(PACKAGE).parts
    mine = {name for name in imports(path) if within(name, "fastcl")} - {"fastcl"}
    if inside[0] == "ops" and len(inside) > 2:
        allowed = ["fastcl._ops", "fastcl.ops._check", "fastcl.ops._direct", f"fastcl.ops.{inside[1]}"]
        if inside[2].startswith("triton"):
            allowed += ["fastcl.ops._sweep", "fastcl.ops._triton"]
        if inside[2] == "reference.py":
            allowed = ["fastcl.ops._check"]
            outside = {name.split(".")[0] for name in imports(path)} - {"fastcl"}
            assert outside <= {"__future__", "torch", "math"}, "a reference is plain torch"
        assert all(within(name, *allowed) or name == "fastcl.ops" for name in mine), mine
    layers = {
        "importance": ["fastcl.ops", "fastcl.importance"],
        "nn": ["fastcl.ops", "fastcl.nn"],
        "optim": ["fastcl.ops", "fastcl.optim"],
        "streams": ["fastcl.streams"],
    }
    if inside[0] in layers:
        assert all(within(name, *layers[inside[0]]) for name in mine), mine
    if inside[0] == "methods" and inside[1] != "__init__.py":
        bases = [f"fastcl.methods.{name}" for name in ("method", "by_task", "progress")]
        allowed = [*bases, "fastcl.importance", "fastcl.nn", "fastcl.optim", "fastcl.ops"]
        types_only = "fastcl.streams"
        assert all(within(name, *allowed, types_only) or name == "fastcl.methods" for name in mine), mine


def test_methods_use_streams_for_types_only() -> None:
    for path in (PACKAGE / "methods").glob("*.py"):
        for node in ast.parse(path.read_text()).body:  # top level: what really runs
            if isinstance(node, ast.ImportFrom):
                assert node.module != "streams", path


def test_formulas_include_only_the_common_ones() -> None:
    for path in (ROOT / "csrc").glob("*/math.h"):
        for included in re.findall(r'#include\s+[<"](.+?)[>"]', path.read_text()):
            standard = included in ("cmath", "cstdint", "cstring")
            assert included == "../common/math.h" or (path.parent.name == "common" and standard), (path, included)


def test_one_compilers_words_stand_behind_an_if() -> None:
    """What only GCC and clang, or only Linux, know is left out elsewhere: macOS and Windows stay buildable."""
    words = re.compile(r"__attribute__|__builtin_|#pragma GCC|__restrict__|madvise|<sys/|<unistd|__int128|vector_size")
    found = 0
    for path in (ROOT / "csrc").rglob("*.[ch]*"):
        depth = 0
        for number, line in enumerate(path.read_text().splitlines(), 1):
            code = line.split("//")[0]
            depth += bool(re.match(r"\s*#\s*if", code)) - bool(re.match(r"\s*#\s*endif", code))
            if words.search(code):
                found += 1
                assert depth > 0, f"{path}:{number}: {line.strip()}"
        assert depth == 0, path
    assert found >= 10


def test_namespace_is_written_once() -> None:
    for path in (PACKAGE / "ops").rglob("*.py"):
        code = re.sub(r'"""(?s:.*?)"""', "", path.read_text())
        assert "fastcl" not in code, f"{path}: relative imports and _ops.NAMESPACE only"


HEAVY = {"avalanche", "lightning", "matplotlib", "rich", "safetensors", "scipy", "sklearn", "sympy", "triton", "typer"}
HEAVY |= {"torch._dynamo", "torch._inductor", "torch.distributed.tensor", "torch.fx.experimental", "torch.onnx"}


@pytest.mark.parametrize(
    ("what", "modules"),
    [("fastcl", r"(_ops|_C|ops(\..*)?)"), ("fastcl.methods, fastcl.streams, fastcl.metrics", r".*")],
    ids=["fastcl", "everything"],
)
def test_import_is_light(what: str, modules: str) -> None:
    """What comes on top of what torch has loaded itself; `import fastcl` alone reads the ops and no more."""
    code = f"import sys, torch; before = set(sys.modules); import {what}; print(*sorted(set(sys.modules) - before))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = done.stdout.split()
    assert "fastcl.ops" in loaded
    assert not [name for name in loaded if within(name, *HEAVY)]
    for name in loaded:
        if name.startswith("fastcl."):
            assert re.fullmatch(rf"fastcl\.{modules}", name), name
            assert not name.endswith(".triton"), name


def test_every_public_name_is_there() -> None:
    """Those that are read late too, in a fresh process; and what is not there says so."""
    code = "import fastcl; print([n for n in fastcl.__all__ if getattr(fastcl, n) is None], fastcl.__version__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert re.fullmatch(r"\[\] \d+[.+]\S+", done.stdout.strip())
    with pytest.raises(AttributeError, match="module 'fastcl' has no attribute 'EWS'"):
        fastcl.EWS  # noqa: B018


def test_files_are_short() -> None:
    for folder, pattern in (("fastcl", "**/*.py"), ("csrc", "**/*.[ch]*"), ("tests", "**/*.py"), ("bench", "**/*.py")):
        for path in (ROOT / folder).glob(pattern):
            assert len(path.read_text().splitlines()) <= 400, path
