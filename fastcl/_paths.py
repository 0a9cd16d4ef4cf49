"""Whether results can be written where the caller wants them, asked before training and not after it."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path

from .checkpoint import is_own

PROBE = 4096  # bytes that must fit on the disk before a run begins


def check_outputs(
    files: Mapping[str, Path | None], folders: Mapping[str, Path | None] = {}, inputs: Iterable[Path] = ()
) -> None:
    """Every output (its option's name: its path, None if not asked for) must be possible to write.

    A few bytes are written to the nearest folder that exists, under no name, and are gone when this returns.

    Raises:
        ValueError: NUL in a path, a folder for a file or the other way round, a loop of links, a device or pipe, an
            input, a file of the checkpoint, the same file twice.
        OSError: a folder that cannot be written, or a full disk.

    Example:
        >>> check_outputs({"out": Path("result.json")}, {"checkpoint": Path("run")})
    """
    files, folders = ({k: p for k, p in given.items() if p is not None} for given in (files, folders))
    read = {os.path.realpath(p) for p in inputs}
    places: dict[str, str] = {}
    for name, path in (*folders.items(), *files.items()):
        if "\0" in str(path):
            raise ValueError(f"{name} is {str(path)!r} but must have no NUL in it")
        real = os.path.realpath(path)
        if os.path.islink(real):
            raise ValueError(f"{name} is {path}, a link that leads round to itself")
        if real in read:
            raise ValueError(f"{name} is {path} but that is an input of this run")
        if real in places:
            raise ValueError(f"{name} is {path} but so is {places[real]}")
        places[real] = name
        if name in folders and os.path.lexists(real) and not os.path.isdir(real):
            raise ValueError(f"{name} is the file {path} but must be a folder")
        if name in files and os.path.isdir(real):
            raise ValueError(f"{name} is the folder {path} but must be a file")
        if name in files and os.path.lexists(real) and not os.path.isfile(real):
            raise ValueError(f"{name} is {path}, a device or pipe, but must be a file: it would be replaced")
        for owner, folder in folders.items():
            if name in files and os.path.dirname(real) == os.path.realpath(folder) and is_own(os.path.basename(real)):
                raise ValueError(f"{name} is {path}, a file of the {owner} itself")
        try:
            os.lstat(f"{real}.12345678.tmp")  # it is written under such a name first
        except (FileNotFoundError, NotADirectoryError):
            pass
        except OSError as error:
            raise OSError(f"{name} is {str(path)[:60]}... but cannot be written: {reason(error)}") from None
        _probe(name, path, real if name in folders else os.path.dirname(real))


def _probe(name: str, path: Path, folder: str) -> None:
    while not os.path.lexists(folder):
        folder = os.path.dirname(folder)
    try:
        if not os.path.isdir(folder):
            raise NotADirectoryError(20, "Not a directory", folder)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(PROBE))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise OSError(f"{name} is {path} but cannot be written: {reason(error)} ({folder})") from None


def reason(error: OSError) -> str:
    return error.strerror or str(error)
