"""Learners, one file per published method."""

from .ewc import EWC
from .finetune import Finetune
from .hat import HAT
from .joint import Joint
from .method import Method

METHODS: dict[str, type[Method]] = {method.name: method for method in (Finetune, Joint, EWC, HAT)}

__all__ = ["EWC", "HAT", "METHODS", "Finetune", "Joint", "Method"]
