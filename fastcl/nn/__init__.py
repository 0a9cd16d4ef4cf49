"""Networks and layers: whatever holds parameters."""

from .mlp import mlp

__all__ = ["mlp"]
