"""Per-parameter importances, estimated exactly, and the regularisers built on them."""

from .ewc import EWC
from .fallback import FallbackWarning
from .fisher import fisher_diagonal
from .mas import MAS, mas_importance
from .regulariser import Regulariser
from .rwalk import RWalk
from .si import SI

__all__ = ["EWC", "MAS", "SI", "FallbackWarning", "RWalk", "Regulariser", "fisher_diagonal", "mas_importance"]
