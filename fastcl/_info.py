"""What was built, and which kernels run here."""

from __future__ import annotations

import os
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from . import _ops


def build_info() -> dict[str, Any]:
    """Versions, compiler, CPU features and, for each op, which kernel answers on the CPU.

    ``triton`` is the version that answers for tensors on a GPU, None without one: they are refused then.

    Returns a plain dict (JSON-serialisable). ``kernels[op]`` is ``"c++"`` or ``"reference"``; without the compiled
    library every op runs its plain torch reference and ``pure_python`` is True.

    Example:
        >>> fastcl.build_info()["kernels"]["masked_grad_"]
        'c++'
    """
    info: dict[str, Any] = {
        "torch": torch.__version__,
        "pure_python": _ops.pure_python,
        "library": None if _ops.pure_python else str(_ops.LIBRARY),
        "triton": _version("triton"),
        "threads": torch.get_num_threads(),
        "forced_cpu": os.environ.get("FASTCL_CPU"),
        "kernels": {name: "c++" if _ops.has_kernel(name, "CPU") else "reference" for name in sorted(_ops.catalogue)},
    }
    info["extension"] = None if _ops.extension is None else _ops.extension.build_info()
    return info


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
