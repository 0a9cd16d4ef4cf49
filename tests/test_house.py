"""The rules of the house (CONTRIBUTING.md), read from the sources."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

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
        allowed = ["fastcl._ops", "fastcl.ops._check", f"fastcl.ops.{inside[1]}"]
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
        allowed = ["fastcl.methods.method", "fastcl.importance", "fastcl.nn", "fastcl.optim", "fastcl.ops"]
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
            standard = included in ("cstdint", "cstring")
            assert included == "../common/math.h" or (path.parent.name == "common" and standard), (path, included)


def test_namespace_is_written_once() -> None:
    for path in (PACKAGE / "ops").rglob("*.py"):
        code = re.sub(r'"""(?s:.*?)"""', "", path.read_text())
        assert "fastcl" not in code, f"{path}: relative imports and _ops.NAMESPACE only"


def test_import_is_light() -> None:
    code = (
        "import sys, fastcl, fastcl.methods; "
        "print(sorted({m.split('.')[0] for m in sys.modules} & "
        "{'sklearn', 'typer', 'rich', 'matplotlib', 'triton', 'safetensors', 'scipy'}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_files_are_short() -> None:
    for folder, pattern in (("fastcl", "**/*.py"), ("csrc", "**/*.[ch]*"), ("tests", "**/*.py"), ("bench", "**/*.py")):
        for path in (ROOT / folder).glob(pattern):
            assert len(path.read_text().splitlines()) <= 400, path
