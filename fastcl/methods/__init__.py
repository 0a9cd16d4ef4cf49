"""Learners, one file per published method."""

from .cln import CLN
from .den import DEN
from .dgm import DGMa, DGMw
from .dgr import DGR
from .ewc import EWC
from .finetune import Finetune
from .hat import HAT
from .joint import Joint
from .mas import MAS
from .mergan import MeRGANAlign, MeRGANJoint
from .method import ByTask, Generative, Method, Regularised
from .rwalk import RWalk
from .si import SI

METHODS: dict[str, type[Method]] = {
    m.name: m
    for m in (
        *(Finetune, Joint, EWC, MAS, SI, RWalk, HAT, DEN, CLN),
        *(DGR, MeRGANJoint, MeRGANAlign, DGMw, DGMa),
    )
}

__all__ = [
    "CLN",
    "DEN",
    "DGR",
    "EWC",
    "HAT",
    "MAS",
    "METHODS",
    "SI",
    "ByTask",
    "DGMa",
    "DGMw",
    "Finetune",
    "Generative",
    "Joint",
    "MeRGANAlign",
    "MeRGANJoint",
    "Method",
    "RWalk",
    "Regularised",
]
