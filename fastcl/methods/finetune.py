"""Fine-tuning: no protection at all."""

from __future__ import annotations

from .method import Method


class Finetune(Method):
    """Trains on each task in turn; the lower bound that every table names.

    Example:
        >>> learner = Finetune.build(stream); learner.begin_task(stream.tasks[0])
        >>> learner.observe(*batch) > 0
        True
    """

    name = "finetune"
    paper = "baseline: sequential fine-tuning"
    seed = "generative-memory"
