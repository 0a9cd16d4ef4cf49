"""State on disk: tensors in safetensors, the rest in JSON, written so that nothing is ever lost.

A checkpoint is a folder with ``state.json`` and the tensor file that it names by content hash, and the pair before it,
``previous.json`` and its tensors. Every file is written under another name and renamed, ``state.json`` last: whenever
the writer dies, a whole pair is there. Nothing is unpickled, and nothing outside the folder is read.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

try:
    import fcntl
except ImportError:  # not posix
    fcntl = None  # type: ignore[assignment]

FORMAT, VERSION = "fastcl-checkpoint", 1
MAX_INDEX = 64 << 20  # bytes of JSON; everything large is a tensor
_INDEX, _PREVIOUS = "state.json", "previous.json"
_TENSORS = re.compile(r"tensors-[0-9a-f]{16}\.safetensors")
_LEFT_OVER = re.compile(r"(state\.json|previous\.json|tensors-[0-9a-f]{16}\.safetensors)\..+\.tmp")


def is_own(name: str) -> bool:
    """Whether a file of this name in a checkpoint's folder belongs to the checkpoint.

    Example:
        >>> is_own("state.json"), is_own("result.json")
        (True, False)
    """
    return name in (_INDEX, _PREVIOUS) or bool(_TENSORS.fullmatch(name) or _LEFT_OVER.fullmatch(name))


class CheckpointError(ValueError):
    """A checkpoint that cannot be trusted; the message says which file and why."""


def write_atomically(path: Path, data: bytes) -> None:
    """`data` under a temporary name in the same folder, flushed to disk, then renamed.

    Example:
        >>> write_atomically(folder / "result.json", b"{}"); (folder / "result.json").read_bytes()
        b'{}'
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=path.name + ".", suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o666 & ~_umask())
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    if os.name == "posix":  # the rename itself must reach the disk
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def save(folder: str | Path, state: dict[str, Any]) -> None:
    """Writes `state` (nested dicts and lists of tensors, numbers, strings, bools, None; int or str keys).

    The checkpoint that was there becomes the previous one, if it is whole; the one before that goes.

    Raises:
        TypeError: another type in `state`; nothing has been written.
        ValueError: more than 64 MiB that is not tensors; nothing has been written.
        OSError: disk full or folder not writable; the checkpoint that was there is untouched.

    Example:
        >>> save("run/checkpoint", {"weight": torch.ones(2), "epoch": 3})
        >>> load("run/checkpoint")["epoch"]
        3
    """
    from safetensors.torch import save as to_bytes

    folder, tensors = Path(folder), {}
    tree = _flatten(state, "state", tensors)
    data = to_bytes(tensors)
    digest = hashlib.sha256(data).hexdigest()
    index = {
        "format": FORMAT,
        "version": VERSION,
        "tensors": f"tensors-{digest[:16]}.safetensors",
        "sha256": digest,
        "state": tree,
    }
    index["check"] = _check(index)
    text = json.dumps(index).encode()
    if len(text) > MAX_INDEX:
        raise ValueError(f"state has {len(text)} bytes beside its tensors but at most {MAX_INDEX} are written")
    folder.mkdir(parents=True, exist_ok=True)
    with _alone(folder) as alone:
        if alone:  # then no living process is writing these
            for file in folder.iterdir():
                if _LEFT_OVER.fullmatch(file.name):
                    file.unlink(missing_ok=True)
        try:
            before = _read(folder, _INDEX)[0]
        except CheckpointError:  # none, or damaged: the previous one stays what it is
            before = None
        write_atomically(folder / index["tensors"], data)
        if before is not None and before != text:
            write_atomically(folder / _PREVIOUS, before)
        write_atomically(folder / _INDEX, text)
        named = {index["tensors"], _named_by(folder / _PREVIOUS)}
        for old in folder.iterdir():
            if _TENSORS.fullmatch(old.name) and old.name not in named:
                old.unlink(missing_ok=True)


def load(folder: str | Path, *, previous: bool = False) -> dict[str, Any]:
    """What :func:`save` was given; `previous`: what it was given the time before.

    Raises:
        CheckpointError: missing, truncated, altered, of a later version or of another format; says which, and whether
            the previous checkpoint can be read.

    Example:
        >>> save(folder / "run", {"weight": torch.ones(2)}); load(folder / "run")
        {'weight': tensor([1., 1.])}
    """
    folder = Path(folder)
    if previous:
        return _state_of(folder, _PREVIOUS)
    try:
        return _state_of(folder, _INDEX)
    except CheckpointError as error:
        try:
            _state_of(folder, _PREVIOUS)
        except CheckpointError:
            raise error from None
        raise CheckpointError(f"{error}; the one before it is whole: previous=True (--previous) reads it") from None


def _state_of(folder: Path, name: str) -> dict[str, Any]:
    from safetensors.torch import load as from_bytes

    _, index, data = _read(folder, name)
    try:
        state = _unflatten(index["state"], from_bytes(data))
    except Exception as error:  # checksums that fit are no proof of an honest writer
        what = f"{type(error).__name__}: {error}"
        raise CheckpointError(f"{folder / name} or its tensors are not what fastcl writes: {what}") from None
    if not isinstance(state, dict):
        raise CheckpointError(f"{folder / name} holds a {type(state).__name__} but must hold a dict")
    return state


def _read(folder: Path, name: str) -> tuple[bytes, dict[str, Any], bytes]:
    """The index as it stands in the file, parsed and checked, and its tensors' bytes, checked."""
    path = folder / name
    text = _bytes_of(path, MAX_INDEX, f"{folder} has no {name}: it is not a checkpoint")
    try:
        index = json.loads(text)
    except (ValueError, RecursionError) as error:  # not JSON, not UTF-8, a number of 5,000 digits, nested too deep
        raise CheckpointError(f"{path} is damaged: {error}") from None
    if not isinstance(index, dict) or index.get("format") != FORMAT:
        raise CheckpointError(f"{path} is not a {FORMAT} file")
    if index.get("version") != VERSION:
        raise CheckpointError(f"{path} has version {str(index.get('version'))[:20]}; this fastcl reads {VERSION}")
    try:
        # the second comparison sees what JSON does not: 1e-5 for 1E-5, a space more
        fits = index.get("check") == _check(index) and json.dumps(index).encode() == text
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from None
    if not fits:
        raise CheckpointError(f"{path} is damaged: its checksum does not fit")
    tensors = index.get("tensors")
    if not isinstance(tensors, str) or not _TENSORS.fullmatch(tensors):
        raise CheckpointError(f"{path} names the tensor file {tensors!r:.100} but it must be tensors-*.safetensors")
    data = _bytes_of(folder / tensors, None, f"{folder / tensors} is missing")
    if hashlib.sha256(data).hexdigest() != index.get("sha256"):
        raise CheckpointError(f"{folder / tensors} is damaged: its SHA-256 is not the one in {name}")
    return text, index, data


def _bytes_of(path: Path, limit: int | None, missing: str) -> bytes:
    try:
        if not path.exists():
            raise CheckpointError(missing)
        if not path.is_file():  # a pipe or a device could be read for ever
            raise CheckpointError(f"{path} is not a file")
        if limit is not None and path.stat().st_size > limit:
            raise CheckpointError(f"{path} has {path.stat().st_size} bytes but at most {limit} are read")
        return path.read_bytes()
    except (OSError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path} cannot be read: {error}") from None


def _named_by(path: Path) -> str | None:
    try:
        return json.loads(path.read_bytes())["tensors"]
    except (OSError, ValueError, RecursionError, TypeError, KeyError):
        return None


@contextmanager
def _alone(folder: Path) -> Iterator[bool]:
    """One writer at a time in `folder`; a killed one's lock is gone with it. False where there are no locks."""
    if fcntl is None:
        yield False
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
        except OSError:  # some network file systems have none
            yield False
        else:
            yield True
    finally:
        os.close(handle)


def _check(index: dict[str, Any]) -> str:
    content = {key: value for key, value in index.items() if key != "check"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _flatten(value: Any, where: str, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        key = str(len(tensors))
        tensors[key] = value.detach().cpu().contiguous().clone()  # safetensors refuses shared memory
        return {"tensor": key}
    if isinstance(value, dict):
        if not all(isinstance(key, (str, int)) for key in value):
            raise TypeError(f"{where} has a key that is neither str nor int")
        return {"dict": [[key, _flatten(v, f"{where}.{key}", tensors)] for key, v in value.items()]}
    if isinstance(value, (list, tuple)):
        return {"list": [_flatten(v, f"{where}[{i}]", tensors) for i, v in enumerate(value)]}
    if value is None or isinstance(value, (bool, int, float, str)):
        return {"value": value}
    raise TypeError(f"{where} is a {type(value).__name__}: a state holds tensors, numbers, strings, dicts and lists")


def _unflatten(node: Any, tensors: dict[str, Tensor]) -> Any:
    ((kind, content),) = node.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        if not all(isinstance(key, (str, int)) for key, _ in content):
            raise ValueError("a key that is neither str nor int")
        return {key: _unflatten(v, tensors) for key, v in content}
    if kind == "list":
        return [_unflatten(v, tensors) for v in content]
    if kind != "value" or not (content is None or isinstance(content, (bool, int, float, str))):
        raise ValueError(f"a value of the kind {kind!r:.40}")
    return content
