"""Optimizers that leave reserved weights alone, to the last bit."""

from .masked_adam import MaskedAdam
from .masked_sgd import MaskedSGD
from .protect import Protection, protect

__all__ = ["MaskedAdam", "MaskedSGD", "Protection", "protect"]
