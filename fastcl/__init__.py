"""fastcl: fused kernels for continual learning in PyTorch, and a thin, exact method layer above them."""

from importlib.metadata import PackageNotFoundError, version

from . import nn, ops, optim
from ._info import build_info
from .importance import EWC, MAS, SI, FallbackWarning, RWalk, fisher_diagonal, mas_importance
from .optim import protect

try:
    __version__ = version("fastcl")
except PackageNotFoundError:  # a source tree on the path, not installed
    __version__ = "0+unknown"

__all__ = [
    "EWC",
    "MAS",
    "SI",
    "FallbackWarning",
    "RWalk",
    "__version__",
    "build_info",
    "fisher_diagonal",
    "mas_importance",
    "nn",
    "ops",
    "optim",
    "protect",
]
