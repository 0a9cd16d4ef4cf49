"""fastcl: fused kernels for continual learning in PyTorch, and a thin, exact method layer above them."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from . import ops

if TYPE_CHECKING:
    from . import importance, methods, metrics, nn, optim, streams
    from ._info import build_info
    from ._memory import release_memory
    from .importance import EWC, MAS, SI, FallbackWarning, RWalk, fisher_diagonal, mas_importance
    from .optim import protect

    __version__: str

__all__ = [
    "EWC",
    "MAS",
    "SI",
    "FallbackWarning",
    "RWalk",
    "__version__",
    "build_info",
    "fisher_diagonal",
    "importance",
    "mas_importance",
    "methods",
    "metrics",
    "nn",
    "ops",
    "optim",
    "protect",
    "release_memory",
    "streams",
]

# The ops are registered at once; what stands above them is read when first asked for: half of what an import costs.
_MODULES = ("importance", "methods", "metrics", "nn", "optim", "streams")
_NAMES = {
    **dict.fromkeys(("EWC", "MAS", "SI", "RWalk", "FallbackWarning"), "importance"),
    **dict.fromkeys(("fisher_diagonal", "mas_importance"), "importance"),
    "build_info": "_info",
    "protect": "optim",
    "release_memory": "_memory",
}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f".{name}", __name__)
    if name in _NAMES:
        value = getattr(importlib.import_module(f".{_NAMES[name]}", __name__), name)
    elif name == "__version__":
        value = _version()
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("fastcl")
    except PackageNotFoundError:  # a source tree on the path, not installed
        return "0+unknown"
