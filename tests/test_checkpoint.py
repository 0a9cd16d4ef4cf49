from __future__ import annotations

import json
from pathlib import Path

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
    checkpoint.save(tmp_path / "run", {"x": torch.ones(2)})  # replaced, and the old tensors gone
    assert same(checkpoint.load(tmp_path / "run"), {"x": torch.ones(2)})
    assert len(list((tmp_path / "run").iterdir())) == 2


def test_aliased_and_strided_tensors(tmp_path: Path) -> None:
    w = torch.randn(4, 6)
    checkpoint.save(tmp_path, {"w": w, "row": w[0], "t": w.T})
    assert same(checkpoint.load(tmp_path), {"w": w, "row": w[0], "t": w.T.contiguous()})


def test_every_flipped_byte_and_truncation_is_refused(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, {"w": torch.randn(8), "epoch": 3})
    for path in list(tmp_path.iterdir()):
        good = path.read_bytes()
        for k in range(0, len(good), max(1, len(good) // 60)):
            path.write_bytes(good[:k] + bytes([good[k] ^ 1]) + good[k + 1 :])
            with pytest.raises(CheckpointError):
                checkpoint.load(tmp_path)
            path.write_bytes(good[:k])
            with pytest.raises(CheckpointError):
                checkpoint.load(tmp_path)
        path.write_bytes(good)
    assert checkpoint.load(tmp_path)["epoch"] == 3


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
