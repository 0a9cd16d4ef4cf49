"""Per-parameter importances, estimated exactly, and the regularisers built on them."""

from .ewc import EWC
from .fallback import FallbackWarning
from .fisher import fisher_diagonal

__all__ = ["EWC", "FallbackWarning", "fisher_diagonal"]
