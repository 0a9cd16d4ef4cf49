"""Learners, one file per published method."""

from .ewc import EWC
from .finetune import Finetune
from .joint import Joint
from .method import Method

METHODS: dict[str, type[Method]] = {method.name: method for method in (Finetune, Joint, EWC)}

__all__ = ["EWC", "METHODS", "Finetune", "Joint", "Method"]
