"""What a user sees when something is missing: one clear sentence with the command to run."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch

import fastcl

from .conftest import ROOT


def python(code: str, *path: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path)), **environment}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, cwd=ROOT.anchor)


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    """The Python files of the package, without what the compiler made."""
    source = Path(fastcl.__file__).parent
    shutil.copytree(source, tmp_path / "fastcl", ignore=shutil.ignore_patterns("*.so", "*.pyd", "__pycache__"))
    return tmp_path


def test_import_without_kernels_says_what_to_run(bare: Path) -> None:
    done = python("import fastcl", bare, FASTCL_PURE_PYTHON="0")
    assert done.returncode == 1
    assert "ImportError: fastcl's kernels are not built: run `pip install -e . --no-build-isolation`" in done.stderr


@pytest.mark.parametrize("how", ["environment", "marker"])
def test_pure_python_works_and_says_so(bare: Path, how: str) -> None:
    if how == "marker":
        (bare / "fastcl" / "PURE_PYTHON").touch()
    code = """
import torch, fastcl
info = fastcl.build_info()
g = torch.ones(3); fastcl.ops.masked_grad_([g], [torch.tensor([True, False, True])])
print(info["pure_python"], set(info["kernels"].values()), g.tolist())
"""
    done = python(code, bare, FASTCL_PURE_PYTHON="1" if how == "environment" else "0")
    assert done.stdout.strip() == "True {'reference'} [0.0, 1.0, 0.0]", done.stderr


def test_too_old_torch_says_what_to_run() -> None:
    done = python("import torch; torch.__version__ = '2.9.1'; import fastcl", ROOT)
    assert "ImportError: fastcl needs torch >= 2.10, found 2.9.1: run `pip install -U torch`" in done.stderr


def test_too_old_torch_at_build() -> None:
    code = "import sys, torch; torch.__version__ = '2.9.1'; sys.argv = ['setup.py', '--version']; "
    code += "exec(open('setup.py').read())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1
    assert "fastcl needs torch >= 2.10, found 2.9.1" in done.stderr


def test_missing_compiler_says_what_to_install(tmp_path: Path) -> None:
    for name in ("csrc", "fastcl", "setup.py", "pyproject.toml", "README.md", "LICENSE"):
        source = ROOT / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, tmp_path / name)
    done = subprocess.run(
        [sys.executable, "setup.py", "build_ext"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "CXX": "/nonexistent/g++", "CC": "/nonexistent/gcc"},
    )
    assert done.returncode != 0
    assert "Install a C++17 compiler" in done.stderr
    assert "FASTCL_PURE_PYTHON=1 pip install ." in done.stderr


def test_build_info_is_complete() -> None:
    info = fastcl.build_info()
    assert info["torch"] == torch.__version__
    assert set(info["kernels"]) >= {"masked_grad_", "annealed_mask", "quadratic_penalty", "accumulate_outer_"}
    if not info["pure_python"]:
        assert info["extension"]["torch_target"] == "2.10"


def test_works_without_the_python_extension(bare: Path) -> None:
    """Kernels are Python-free: a Python that has no fastcl._C still runs them."""
    if fastcl.build_info()["pure_python"]:
        pytest.skip("built without a compiler")
    shutil.copy(fastcl.build_info()["library"], bare / "fastcl")
    code = "import sys; sys.modules['fastcl._C'] = None; "  # an editable install would find it elsewhere
    code += "import fastcl; i = fastcl.build_info(); print(i['extension'], i['kernels']['masked_grad_'])"
    assert python(code, bare).stdout.strip() == "None c++"


def test_sdist_is_whole_and_reproducible(tmp_path: Path) -> None:
    """Headers and tests are in it, and two of them are equal to the byte, whenever and by whomever they were made."""
    made = []
    for i, mask in enumerate(("022", "077")):
        source = tmp_path / str(i)
        ignore = shutil.ignore_patterns("*.so", "__pycache__", "results")
        for name in ("csrc", "fastcl", "tests", "bench"):
            shutil.copytree(ROOT / name, source / name, ignore=ignore, copy_function=shutil.copyfile)
        for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "Makefile"):
            shutil.copyfile(ROOT / name, source / name)
        command = f"umask {mask} && {shlex.quote(sys.executable)} setup.py -q sdist"
        env = {**os.environ, "SOURCE_DATE_EPOCH": "1700000000", "FASTCL_PURE_PYTHON": "1"}
        done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, cwd=source, env=env)
        assert done.returncode == 0, done.stderr
        made += (source / "dist").glob("*.tar.gz")
    first, second = made
    assert first.read_bytes() == second.read_bytes()
    with tarfile.open(first) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    for path in (*(ROOT / "csrc").rglob("*.[hc]*"), *(ROOT / "tests").rglob("*.py"), *(ROOT / "fastcl").rglob("*.py")):
        assert str(path.relative_to(ROOT)) in names
    assert {"setup.py", "pyproject.toml", "README.md", "LICENSE", "Makefile"} <= names
    assert not any(name.endswith((".so", ".pyc")) for name in names)


def test_kernels_keep_to_the_stable_abi() -> None:
    """Whatever torch 2.10 or later is here tomorrow, today's library loads (`pip install torch-abi-audit`)."""
    audit = shutil.which(
        "torch-abi-audit", path=os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
    )
    if audit is None:
        pytest.skip("torch-abi-audit is not installed")
    if fastcl.build_info()["pure_python"]:
        pytest.skip("built without a compiler")
    done = subprocess.run([audit, fastcl.build_info()["library"]], capture_output=True, text=True)
    assert re.search(r"Torch ABI:\s+STABLE\n\s*Min torch:\s+2\.10\.", done.stdout), done.stdout + done.stderr
