"""Builds csrc/ into fastcl/libfastcl.so (kernels, Python-free) and fastcl._C (pybind11); see CONTRIBUTING.md."""

import gzip
import os
import sys
import tarfile
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_py import build_py
from setuptools.command.sdist import sdist

PURE = os.environ.get("FASTCL_PURE_PYTHON") == "1"
HELP = "or build without a compiler: FASTCL_PURE_PYTHON=1 pip install ."


class Sdist(sdist):
    """With headers, tests and benchmarks; the same bytes from the same sources (their time is SOURCE_DATE_EPOCH)."""

    def make_release_tree(self, base_dir: str, files: list[str]) -> None:
        patterns = ("csrc/**/*.h", "csrc/**/*.cpp", "tests/**/*.py", "bench/*.py", "*.md", "Makefile")
        more = {str(path) for pattern in patterns for path in Path().glob(pattern)}
        super().make_release_tree(base_dir, sorted({*files, *more}))

    def make_archive(self, base_name, format, root_dir=None, base_dir=None, **_options):  # type: ignore[override]
        time, name = int(os.environ.get("SOURCE_DATE_EPOCH", 315532800)), f"{base_name}.tar.gz"
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        with gzip.GzipFile(name, "wb", mtime=time) as file, tarfile.open(fileobj=file, mode="w") as archive:
            for path in sorted(Path(base_dir).rglob("*")):
                entry = archive.gettarinfo(path)
                entry.mtime, entry.mode, entry.uid, entry.gid = time, 0o755 if entry.mode & 0o100 else 0o644, 0, 0
                entry.uname = entry.gname = ""
                with open(path, "rb") if path.is_file() else open(os.devnull, "rb") as content:
                    archive.addfile(entry, content)
        return name


if PURE:

    class Marked(build_py):
        """Leaves the marker by which fastcl knows that no kernels were meant to be there."""

        def run(self) -> None:
            super().run()
            (Path(self.build_lib) / "fastcl" / "PURE_PYTHON").touch()

    extensions, commands = [], {"build_py": Marked}
else:
    try:
        import torch
        from torch.utils import cpp_extension
    except ImportError:
        sys.exit("fastcl builds against torch: run `pip install 'torch>=2.10'` first (with --no-build-isolation).")
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 10):
        sys.exit(f"fastcl needs torch >= 2.10, found {torch.__version__}: run `pip install -U torch`.")
    import pybind11

    class Build(cpp_extension.BuildExtension):
        """torch's ninja build, with one plain name everywhere for the library that knows no Python."""

        def get_ext_filename(self, name: str) -> str:
            if name.split(".")[-1] != "libfastcl":
                return super().get_ext_filename(name)
            return os.path.join(*name.split(".")) + ".so"

        def get_export_symbols(self, ext: Extension) -> list[str]:  # Windows: no PyInit_ in what knows no Python
            return [] if ext.name.endswith("libfastcl") else super().get_export_symbols(ext)

        def build_extensions(self) -> None:
            try:
                super().build_extensions()
            except Exception as error:  # whatever the compiler said stands above; this line says what to do
                raise SystemExit(
                    f"fastcl: compiling failed ({error}). Install a C++17 compiler (Debian: apt-get "
                    f"install g++; macOS: xcode-select --install), {HELP}"
                ) from error

    target = ["/O2", "/permissive-"]
    if os.name != "nt":
        target = ["-O3", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi", "-g0"]
        # gcc would split a loop's clamps into cases, and compute every case for every element
        target.append("-fno-thread-jumps")
    target += os.environ.get("FASTCL_CFLAGS", "").split()  # after ours, so that they win: .ci/sanitize
    common = dict(library_dirs=cpp_extension.library_paths(), language="c++")
    extensions = [
        Extension(
            "fastcl.libfastcl",
            sorted(map(str, Path("csrc").glob("*/*.cpp"))),
            libraries=["torch_cpu"],
            include_dirs=cpp_extension.include_paths(),
            extra_compile_args=target,
            define_macros=[("TORCH_TARGET_VERSION", "0x020a000000000000"), ("FASTCL_NS", "fastcl")],
            **common,
        ),
        Extension(
            "fastcl._C",
            sorted(map(str, Path("csrc").glob("*.cpp"))),
            include_dirs=[pybind11.get_include()],
            extra_compile_args=target,
            define_macros=[("FASTCL_TORCH_HEADERS", f'"{torch.__version__}"')],
            **common,
        ),
    ]
    commands = {"build_ext": Build}

setup(ext_modules=extensions, cmdclass={**commands, "sdist": Sdist})
