"""Data sets and the streams of tasks cut from them."""

from .data import Data, load
from .idx import read_idx
from .scenarios import SCENARIOS, SETTINGS, Stream, Task, make

__all__ = ["SCENARIOS", "SETTINGS", "Data", "Stream", "Task", "load", "make", "read_idx"]
