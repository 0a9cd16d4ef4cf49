"""Learners, one file per published method."""

from .den import DEN
from .ewc import EWC
from .finetune import Finetune
from .hat import HAT
from .joint import Joint
from .mas import MAS
from .method import Method, Regularised
from .rwalk import RWalk
from .si import SI

METHODS: dict[str, type[Method]] = {m.name: m for m in (Finetune, Joint, EWC, MAS, SI, RWalk, HAT, DEN)}

__all__ = ["DEN", "EWC", "HAT", "MAS", "METHODS", "SI", "Finetune", "Joint", "Method", "RWalk", "Regularised"]
