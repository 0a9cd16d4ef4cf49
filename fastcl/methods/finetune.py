"""Fine-tuning: no protection at all."""

from __future__ import annotations

from .method import Method


class Finetune(Method):
    """Trains on each task in turn; the lower bound that every table names."""

    name = "finetune"
    paper = "baseline: sequential fine-tuning"
    seed = "generative-memory"
