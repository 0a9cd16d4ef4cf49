from __future__ import annotations

import hashlib
import json
import os
import random
import re
import shutil
import struct
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from fastcl import checkpoint
from fastcl.checkpoint import CheckpointError

STATE = {
    "weights": {"a": torch.randn(3, 4), "b": torch.arange(5), "empty": torch.zeros(0, 2)},
    "optimizer": {"state": {0: {"step": torch.tensor(3.0)}, 1: {}}, "groups": [{"lr": 1e-3, "betas": [0.9, 0.999]}]},
    "name": "ewc",
    "flags": [True, None, -1, 0.1],
}


def same(a: object, b: object) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b) and a.dtype == b.dtype
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b and type(a) is type(b)


def test_round_trip(tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "run", STATE)
    assert same(checkpoint.load(tmp_path / "run"), STATE)
    for k in (1, 2):  # replaced, the one before kept, older tensors gone
        checkpoint.save(tmp_path / "run", {"x": torch.full((2,), k)})
    assert same(checkpoint.load(tmp_path / "run"), {"x": torch.full((2,), 2)})
    assert same(checkpoint.load(tmp_path / "run", previous=True), {"x": torch.full((2,), 1)})
    assert len(list((tmp_path / "run").iterdir())) == 4


def test_aliased_and_strided_tensors(tmp_path: Path) -> None:
    w = torch.randn(4, 6)
    checkpoint.save(tmp_path, {"w": w, "row": w[0], "t": w.T})
    assert same(checkpoint.load(tmp_path), {"w": w, "row": w[0], "t": w.T.contiguous()})


def test_every_flipped_bit_and_truncation_is_refused(tmp_path: Path) -> None:
    """1,000 flips and 1,000 truncations, half of them of each file."""
    checkpoint.save(tmp_path, {"w": torch.zeros(8)})
    checkpoint.save(tmp_path, {"w": torch.randn(8), "epoch": 3, "rates": [1e-05, 2.5e20], "name": "caf\u00e9"})
    index = tmp_path / "state.json"
    rng = random.Random(0)
    for path in (index, tmp_path / json.loads(index.read_text())["tensors"]):
        good = path.read_bytes()
        for _ in range(500):
            at, bit = rng.randrange(len(good)), 1 << rng.randrange(8)
            for bad in (good[:at] + bytes([good[at] ^ bit]) + good[at + 1 :], good[: rng.randrange(len(good))]):
                path.write_bytes(bad)
                reason = "is damaged|is not a fastcl-checkpoint file|has version"
                with pytest.raises(CheckpointError, match=rf"{path.name} ({reason})"):
                    checkpoint._state_of(tmp_path, "state.json")
        with pytest.raises(CheckpointError, match="the one before it is whole"):
            checkpoint.load(tmp_path)
        path.write_bytes(good)
    assert checkpoint.load(tmp_path)["epoch"] == 3


def test_fallback_is_explicit_and_survives_the_next_save(tmp_path: Path) -> None:
    for epoch in (1, 2):
        checkpoint.save(tmp_path, {"w": torch.full((3,), epoch), "epoch": epoch})
    (tmp_path / json.loads((tmp_path / "state.json").read_text())["tensors"]).write_bytes(b"gone")
    with pytest.raises(CheckpointError, match=r"SHA-256 .*; the one before it is whole: previous=True \(--previous\)"):
        checkpoint.load(tmp_path)
    assert checkpoint.load(tmp_path, previous=True)["epoch"] == 1
    checkpoint.save(tmp_path, {"w": torch.ones(3), "epoch": 3})
    assert checkpoint.load(tmp_path)["epoch"] == 3
    assert checkpoint.load(tmp_path, previous=True)["epoch"] == 1  # not the damaged one
    checkpoint.save(tmp_path / "one", {"epoch": 1})
    with pytest.raises(CheckpointError, match=r"no previous\.json"):
        checkpoint.load(tmp_path / "one", previous=True)


def test_a_damaged_tensor_file_is_written_again(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, {"w": torch.ones(2)})
    (tmp_path / json.loads((tmp_path / "state.json").read_text())["tensors"]).write_bytes(b"gone")
    checkpoint.save(tmp_path, {"w": torch.ones(2)})
    assert checkpoint.load(tmp_path)["w"].tolist() == [1.0, 1.0]


def test_dying_at_any_step_leaves_a_whole_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder is copied before every call of a save to the disk: each copy is what a SIGKILL there leaves."""
    run = tmp_path / "run"
    for epoch in (1, 2):
        checkpoint.save(run, {"w": torch.full((3,), epoch), "epoch": epoch})
    copies: list[Path] = []
    copying = []

    def watch(owner: Any, name: str) -> None:
        real = getattr(owner, name)

        def watched(*args: Any, **kwargs: Any) -> Any:
            if not copying:
                copying.append(True)
                copies.append(tmp_path / f"copy{len(copies)}")
                shutil.copytree(run, copies[-1])
                copying.clear()
            return real(*args, **kwargs)

        monkeypatch.setattr(owner, name, watched)

    for name in ("fsync", "replace", "chmod"):
        watch(os, name)
    watch(Path, "unlink")
    checkpoint.save(run, {"w": torch.full((3,), 3), "epoch": 3})
    monkeypatch.undo()
    found = []
    for copy in copies:
        epochs = checkpoint.load(copy)["epoch"], checkpoint.load(copy, previous=True)["epoch"]
        assert checkpoint.load(copy)["w"].tolist() == [epochs[0]] * 3
        found.append((*epochs, bool(list(copy.glob("*.tmp")))))
        checkpoint.save(copy, {"w": torch.full((3,), 3), "epoch": 3})
        checkpoint.save(copy, {"w": torch.full((3,), 4), "epoch": 4})
        assert len(list(copy.iterdir())) == 4  # what the dead writer left is gone
    assert {(2, 1, True), (2, 2, True), (2, 2, False), (3, 2, False)} <= set(found)
    assert len(copies) >= 13


def test_only_its_own_leftovers_are_cleaned(tmp_path: Path) -> None:
    for name in ("notes.tmp", "state.json.bak", "x.tensors-0123456789abcdef.safetensors.a.tmp"):
        (tmp_path / name).write_text("mine")
    (tmp_path / "state.json.k3j_x9.tmp").write_text("half")
    (tmp_path / "tensors-0123456789abcdef.safetensors.abc.tmp").write_text("half")
    checkpoint.save(tmp_path, {"epoch": 1})
    assert len(list(tmp_path.iterdir())) == 3 + 2
    assert not list(tmp_path.glob("*.k3j_x9.tmp"))


def test_a_second_writer_waits(tmp_path: Path) -> None:
    """Its temporary file belongs to somebody: it must not be cleaned while that one lives."""
    pytest.importorskip("fcntl")
    other = threading.Thread(target=checkpoint.save, args=(tmp_path, {"epoch": 2}))
    with checkpoint._alone(tmp_path) as alone:
        assert alone
        (tmp_path / "state.json.mine.tmp").write_text("under way")
        other.start()
        other.join(0.5)
        assert other.is_alive()
        assert (tmp_path / "state.json.mine.tmp").exists()
    other.join(60)
    assert checkpoint.load(tmp_path)["epoch"] == 2
    assert not (tmp_path / "state.json.mine.tmp").exists()


def forged(folder: Path, state: Any, data: bytes | None = None, **changes: Any) -> None:
    """A checkpoint whose checksums fit, whatever is in it."""
    checkpoint.save(folder, {"w": torch.ones(2)})
    index = json.loads((folder / "state.json").read_text())
    del index["check"]
    if data is not None:
        index["sha256"] = hashlib.sha256(data).hexdigest()
        (folder / index["tensors"]).write_bytes(data)
    index = {**index, "state": state, **changes}
    index["check"] = checkpoint._check(index)
    (folder / "state.json").write_text(json.dumps(index))


def deep(kind: str, n: int) -> Any:
    node: Any = {"value": 0}
    for _ in range(n):
        node = {kind: [node]}
    return node


def tensors(header: Any, body: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


TENSOR = {"dict": [["w", {"tensor": "0"}]]}
FORGED: dict[str, tuple[dict[str, Any], str]] = {
    "path traversal": ({"tensors": "../../x"}, "names the tensor file '../../x'"),
    "absolute path": ({"tensors": "/etc/passwd"}, "names the tensor file"),
    "traversal behind a good name": ({"tensors": "tensors-0123456789abcdef.safetensors/../x"}, "names the tensor file"),
    "no name": ({"tensors": None}, "names the tensor file None"),
    "a list for a name": ({"tensors": ["x"]}, "names the tensor file"),
    "NUL": ({"tensors": "tensors-0123456789abcdef.safetensors\0"}, "names the tensor file"),
    "no state": ({"state": None}, "AttributeError"),
    "a number": ({"state": {"value": 3}}, "holds a int but must hold a dict"),
    "two kinds": ({"state": {"value": 3, "list": []}}, "too many values"),
    "unknown kind": ({"state": {"pickle": "x"}}, "kind 'pickle'"),
    "a tree for a value": ({"state": {"value": {"a": 1}}}, "kind 'value'"),
    "no such tensor": ({"state": {"dict": [["w", {"tensor": "7"}]]}}, "KeyError: '7'"),
    "unhashable tensor": ({"state": {"dict": [["w", {"tensor": []}]]}}, "TypeError"),
    "unhashable key": ({"state": {"dict": [[[], {"value": 1}]]}}, "neither str nor int"),
    "no pairs": ({"state": {"dict": [1]}}, "TypeError"),
    "nested deep": ({"state": deep("list", 250)}, "holds a list"),
    "header beyond the file": ({"data": struct.pack("<Q", 1 << 62) + b"{}"}, "SafetensorError"),
    "header of 99 MB": ({"data": struct.pack("<Q", 99 << 20) + b"{}"}, "SafetensorError"),
    "header cut": ({"data": b"\1"}, "SafetensorError"),
    "header not JSON": ({"data": tensors(b"{{{{")}, "SafetensorError"),
    "header nested deep": ({"data": tensors(b'{"0":' * 100_000)}, "SafetensorError"),
    "huge shape": (
        {"data": tensors({"0": {"dtype": "F32", "shape": [1 << 40, 1 << 40], "data_offsets": [0, 8]}}, b"8" * 8)},
        "SafetensorError",
    ),
    "offsets outside": (
        {"data": tensors({"0": {"dtype": "F32", "shape": [2], "data_offsets": [8, 16]}}, b"8" * 8)},
        "SafetensorError",
    ),
    "unknown type": (
        {"data": tensors({"0": {"dtype": "X99", "shape": [2], "data_offsets": [0, 8]}}, b"8" * 8)},
        "SafetensorError",
    ),
}


@pytest.mark.parametrize("case", FORGED)
def test_forged_checkpoints_are_refused(case: str, tmp_path: Path) -> None:
    changes, message = FORGED[case]
    forged(tmp_path, **{"state": TENSOR, **changes})
    with pytest.raises(CheckpointError, match=re.escape(message)):
        checkpoint.load(tmp_path)


def test_json_bombs_are_refused(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, {"w": torch.ones(2)})
    path = tmp_path / "state.json"
    for bomb in (b"[" * 1_000_000, b'{"a":' * 1_000_000, b"1" * 1_000_000, b"[" * 900 + b"]" * 900, b"\xff\xfe", b"\0"):
        path.write_bytes(bomb)
        with pytest.raises(CheckpointError, match=r"state\.json is (damaged|not a fastcl-checkpoint file)"):
            checkpoint.load(tmp_path)
        checkpoint.save(tmp_path / "again", {"w": torch.ones(2)})
    with path.open("wb") as file:
        file.truncate(checkpoint.MAX_INDEX + 1)  # a hole: no bytes on the disk
    with pytest.raises(CheckpointError, match=r"at most 67108864 are read"):
        checkpoint.load(tmp_path)
    path.unlink()
    path.mkdir()
    with pytest.raises(CheckpointError, match="is not a file"):
        checkpoint.load(tmp_path)
    path.rmdir()
    os.mkfifo(path)  # would wait for ever
    with pytest.raises(CheckpointError, match="is not a file"):
        checkpoint.load(tmp_path)
    path.unlink()
    path.symlink_to(path)
    with pytest.raises(CheckpointError, match=r"state\.json"):
        checkpoint.load(tmp_path)


def test_missing_later_and_foreign_files(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no state\.json: it is not a checkpoint"):
        checkpoint.load(tmp_path)
    checkpoint.save(tmp_path, {"w": torch.ones(2)})
    index = json.loads((tmp_path / "state.json").read_text())
    (tmp_path / "state.json").write_text(json.dumps({**index, "version": 2}))
    with pytest.raises(CheckpointError, match="has version 2; this fastcl reads 1"):
        checkpoint.load(tmp_path)
    (tmp_path / "state.json").write_text("[1]")
    with pytest.raises(CheckpointError, match="is not a fastcl-checkpoint file"):
        checkpoint.load(tmp_path)
    (tmp_path / "state.json").write_text(json.dumps(index))
    (tmp_path / index["tensors"]).unlink()
    with pytest.raises(CheckpointError, match="is missing"):
        checkpoint.load(tmp_path)


def test_bad_state_writes_nothing(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, {"w": torch.ones(2)})
    with pytest.raises(TypeError, match=r"state\.model is a Linear"):
        checkpoint.save(tmp_path, {"w": torch.zeros(2), "model": torch.nn.Linear(1, 1)})
    with pytest.raises(TypeError, match="key that is neither str nor int"):
        checkpoint.save(tmp_path, {(1, 2): 3})
    assert checkpoint.load(tmp_path)["w"].tolist() == [1.0, 1.0]


def test_failed_write_keeps_the_previous(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint.save(tmp_path, {"w": torch.ones(2)})

    def full(_handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        checkpoint.save(tmp_path, {"w": torch.zeros(2)})
    monkeypatch.undo()
    assert checkpoint.load(tmp_path)["w"].tolist() == [1.0, 1.0]
    assert not list(tmp_path.glob("*.tmp"))
