"""Learners, one file per published method."""

from .by_task import ByTask
from .cln import CLN
from .den import DEN
from .dgm import DGMa, DGMw
from .dgr import DGR
from .ewc import EWC
from .finetune import Finetune
from .hat import HAT
from .icarl import ICaRL
from .joint import Joint
from .latent_generative_memory import LatentGenerativeMemory
from .latent_space_alignment import LatentSpaceAlignment
from .lwf import LwF
from .mas import MAS
from .mergan import MeRGANAlign, MeRGANJoint
from .method import Generative, Method, Regularised, entropy_within_tasks
from .online_generative_memory import OnlineGenerativeMemory
from .rwalk import RWalk
from .si import SI

METHODS: dict[str, type[Method]] = {
    m.name: m
    for m in (
        *(Finetune, Joint, EWC, MAS, SI, RWalk, LwF, ICaRL, HAT, DEN, CLN),
        *(DGR, MeRGANJoint, MeRGANAlign, DGMw, DGMa),
        *(LatentGenerativeMemory, LatentSpaceAlignment, OnlineGenerativeMemory),
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
    "ICaRL",
    "Joint",
    "LatentGenerativeMemory",
    "LatentSpaceAlignment",
    "LwF",
    "MeRGANAlign",
    "MeRGANJoint",
    "Method",
    "OnlineGenerativeMemory",
    "RWalk",
    "Regularised",
    "entropy_within_tasks",
]
