"""Optimizers that leave reserved weights alone, to the last bit, and sparsity terms as proximal steps."""

from .masked_adam import MaskedAdam
from .masked_sgd import MaskedSGD
from .protect import Protection, protect
from .proximal import Proximal, proximal

__all__ = ["MaskedAdam", "MaskedSGD", "Protection", "Proximal", "protect", "proximal"]
