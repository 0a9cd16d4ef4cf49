"""Data sets and the streams of tasks cut from them."""

from .data import Data, files, load
from .idx import read_idx
from .scenarios import SCENARIOS, SETTINGS, Stream, Task, make

__all__ = ["SCENARIOS", "SETTINGS", "Data", "Stream", "Task", "files", "load", "make", "read_idx"]
