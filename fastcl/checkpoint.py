"""State on disk: tensors in safetensors, the rest in JSON, written so that nothing is ever lost.

A checkpoint is a folder with ``state.json`` and the tensor file that it names by content hash. The tensor file is
written first, the JSON replaced last, so the pair is always whole; the previous pair stays until then.
Nothing is unpickled.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from torch import Tensor

FORMAT, VERSION = "fastcl-checkpoint", 1
_INDEX = "state.json"


class CheckpointError(ValueError):
    """A checkpoint that cannot be trusted; the message says which file and why."""


def write_atomically(path: Path, data: bytes) -> None:
    """`data` under a temporary name in the same folder, flushed to disk, then renamed."""
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

    Raises:
        TypeError: another type in `state`; nothing has been written.
        OSError: disk full or folder not writable; the previous checkpoint is untouched.

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
    name = f"tensors-{digest[:16]}.safetensors"
    index = {"format": FORMAT, "version": VERSION, "tensors": name, "sha256": digest, "state": tree}
    index["check"] = _check(index)
    if not (folder / name).exists():
        write_atomically(folder / name, data)
    write_atomically(folder / _INDEX, json.dumps(index).encode())
    for old in folder.glob("tensors-*.safetensors"):
        if old.name != name:
            old.unlink()


def load(folder: str | Path) -> dict[str, Any]:
    """What :func:`save` was given.

    Raises:
        CheckpointError: missing, truncated, altered, of a later version or of another format; says which.
    """
    from safetensors.torch import load as from_bytes

    folder = Path(folder)
    try:
        index = json.loads((folder / _INDEX).read_bytes())
    except FileNotFoundError:
        raise CheckpointError(f"{folder} has no {_INDEX}: it is not a checkpoint") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{folder / _INDEX} is damaged: {error}") from None
    if not isinstance(index, dict) or index.get("format") != FORMAT:
        raise CheckpointError(f"{folder / _INDEX} is not a {FORMAT} file")
    if index.get("version") != VERSION:
        raise CheckpointError(f"{folder / _INDEX} has version {index.get('version')!r}; this fastcl reads {VERSION}")
    if index.get("check") != _check(index):
        raise CheckpointError(f"{folder / _INDEX} is damaged: its checksum does not fit")
    path = folder / index["tensors"]
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing") from None
    if hashlib.sha256(data).hexdigest() != index["sha256"]:
        raise CheckpointError(f"{path} is damaged: its SHA-256 is not the one in {_INDEX}")
    return _unflatten(index["state"], from_bytes(data))


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
        return {key: _unflatten(v, tensors) for key, v in content}
    if kind == "list":
        return [_unflatten(v, tensors) for v in content]
    return content
