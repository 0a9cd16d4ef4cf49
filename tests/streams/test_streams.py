from __future__ import annotations

import gzip
import os
import struct
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastcl import streams


def idx(array: np.ndarray, code: int = 0x08) -> bytes:
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, code, array.ndim, *array.shape) + array.tobytes()


@pytest.mark.parametrize("zipped", [False, True])
def test_idx_round_trip(tmp_path: Path, zipped: bool) -> None:
    images = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    (tmp_path / "f").write_bytes(gzip.compress(idx(images)) if zipped else idx(images))
    assert np.array_equal(streams.read_idx(tmp_path / "f"), images)
    floats = np.array([1.5, -2.0], dtype=">f4")
    (tmp_path / "f").write_bytes(idx(floats, 0x0D))
    assert streams.read_idx(tmp_path / "f").tolist() == [1.5, -2.0]


GOOD = idx(np.arange(6, dtype=np.uint8).reshape(2, 3))
BAD = {
    "empty": (b"", "begins with nothing"),
    "not IDX": (b"PK\3\4 something else", "begins with 50 4b 03 04"),
    "type": (b"\0\0\7\1" + GOOD[4:], "begins with 00 00 07 01"),
    "no dimensions": (b"\0\0\x08\0", "begins with 00 00 08 00"),
    "short header": (GOOD[:9], "truncated: its header has 9 bytes of 12"),
    "short body": (GOOD[:-1], "truncated: 5 bytes of values where its header says 6"),
    "long body": (GOOD + b"x", "bytes after the 6"),
    "huge": (struct.pack(">BBBB3I", 0, 0, 8, 3, 2**31, 2**31, 4), "at most 2147483648 are read"),
    "broken gzip": (gzip.compress(GOOD)[:-12] + b"\0" * 12, "not a valid gzip file"),
    "cut gzip": (gzip.compress(GOOD)[:15], "not a valid gzip file"),
    "huge behind a zero": (struct.pack(">BBBB3I", 0, 0, 8, 3, 0, 2**31, 2**31), "at most 2147483648 are read"),
    "overflow": (struct.pack(">BBBB8I", 0, 0, 14, 8, *[2**32 - 1] * 8), "at most 2147483648 are read"),
    "gzip bomb": (gzip.compress(GOOD + b"\0" * 10**7), "bytes after the 6"),
}


@pytest.mark.parametrize("case", BAD)
def test_malformed_idx(tmp_path: Path, case: str) -> None:
    data, message = BAD[case]
    (tmp_path / "train-images").write_bytes(data)
    with pytest.raises(ValueError, match=message) as error:
        streams.read_idx(tmp_path / "train-images")
    assert "train-images" in str(error.value)


def test_every_truncation_and_flipped_header_is_refused_or_read(tmp_path: Path) -> None:
    """Never another exception, whatever the bytes."""
    packed = gzip.compress(GOOD)
    for data in (GOOD, packed):
        for k in range(len(data)):
            for changed in (data[:k], data[:k] + bytes([data[k] ^ 0xFF]) + data[k + 1 :]):
                (tmp_path / "f").write_bytes(changed)
                try:
                    streams.read_idx(tmp_path / "f")
                except ValueError:
                    continue


@settings(max_examples=300, deadline=None, suppress_health_check=[*HealthCheck])
@given(data=st.data(), zipped=st.booleans())
def test_any_bytes_are_refused_or_are_what_they_say(tmp_path: Path, data: st.DataObject, zipped: bool) -> None:
    """Headers of any type and sizes, bodies of any length, then a few bytes changed; at most what fits is read."""
    sizes = data.draw(st.lists(st.integers(0, 5) | st.integers(0, 2**32 - 1), max_size=8))
    kind = data.draw(st.sampled_from([8, 9, 11, 12, 13, 14]) | st.integers(0, 255))
    body = data.draw(st.binary(max_size=200) | st.integers(0, 4000).map(bytes))
    made = bytearray(struct.pack(f">BBBB{len(sizes)}I", 0, 0, kind, len(sizes), *sizes) + body)
    if zipped:
        made = bytearray(gzip.compress(bytes(made)))
    for at, value in data.draw(st.lists(st.tuples(st.integers(0, len(made) - 1), st.integers(0, 255)), max_size=2)):
        made[at] = value
    (tmp_path / "f").write_bytes(made)
    try:
        found = streams.read_idx(tmp_path / "f")
    except ValueError as error:
        assert str(tmp_path / "f") in str(error)  # noqa: PT017
    else:
        assert found.nbytes <= max(len(made), 4100)
        assert found.dtype.isnative


def test_what_is_not_a_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is not a file"):
        streams.read_idx(tmp_path)
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe")  # would wait for ever
        with pytest.raises(ValueError, match="is not a file"):
            streams.read_idx(tmp_path / "pipe")
    with pytest.raises(FileNotFoundError):
        streams.read_idx(tmp_path / "none")


def test_a_bomb_stays_small(tmp_path: Path) -> None:
    """64 MiB of zeros in 64 KiB; no more than the header says, and a byte, is unpacked."""
    packed = zlib.compressobj(9, wbits=31)
    parts = [packed.compress(struct.pack(">BBBBI", 0, 0, 8, 1, 100))]
    parts += [packed.compress(bytes(1 << 24)) for _ in range(4)]
    (tmp_path / "f").write_bytes(b"".join([*parts, packed.flush()]))
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match="bytes after the 100"):
            streams.read_idx(tmp_path / "f")
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def write_mnist(root: Path, *, labels: int = 20, worst: int = 9, suffix: str = ".gz") -> None:
    root.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for part in ("train", "t10k"):
        images = rng.integers(0, 256, (20, 28, 28), dtype=np.uint8)
        y = (np.arange(labels) % 10).astype(np.uint8)
        y[y == 9] = worst
        for stem, array in ((f"{part}-images-idx3-ubyte", images), (f"{part}-labels-idx1-ubyte", y)):
            data = idx(array)
            (root / (stem + suffix)).write_bytes(gzip.compress(data) if suffix else data)


@pytest.mark.parametrize(("folder", "suffix"), [(".", ".gz"), (".", ""), ("MNIST/raw", ".gz"), ("MNIST/raw", "")])
def test_mnist_in_either_layout(tmp_path: Path, folder: str, suffix: str) -> None:
    write_mnist(tmp_path / folder, suffix=suffix)
    data = streams.load("mnist", tmp_path)
    assert data.x_train.shape == (20, 1, 28, 28)
    assert 0 <= data.x_train.min() < data.x_train.max() <= 1
    assert data.y_test.dtype == torch.int64


def test_bad_mnist(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no train-images-idx3-ubyte\[.gz\] in .*--data-root"):
        streams.load("mnist", tmp_path)
    write_mnist(tmp_path, labels=19)
    with pytest.raises(ValueError, match="19 labels for the 20 images"):
        streams.load("mnist", tmp_path)
    write_mnist(tmp_path, worst=11)
    with pytest.raises(ValueError, match="has the label 11"):
        streams.load("mnist", tmp_path)
    write_mnist(tmp_path)
    images, labels = (tmp_path / f"t10k-{kind}-ubyte.gz" for kind in ("images-idx3", "labels-idx1"))
    good = images.read_bytes(), labels.read_bytes()
    for bad, message in (
        (gzip.compress(GOOD), r"must be bytes \[N, H, W\]"),
        (good[1], r"t10k-images-idx3-ubyte.gz has shape \[20\] of uint8 but must be bytes \[N, H, W\]"),
        (gzip.compress(idx(np.zeros((20, 14, 14), np.uint8))), r"t10k.* has images of \[14, 14\] but .* \[28, 28\]"),
        (gzip.compress(idx(np.zeros((0, 28, 28), np.uint8))), "there is no pixel in it"),
    ):
        images.write_bytes(bad)
        with pytest.raises(ValueError, match=message):
            streams.load("mnist", tmp_path)
    images.write_bytes(good[0])
    labels.write_bytes(good[0])
    with pytest.raises(ValueError, match=r"labels-idx1.* has shape \[20, 28, 28\] of uint8 but must be bytes \[N\]"):
        streams.load("mnist", tmp_path)


def test_digits_are_real_and_stratified() -> None:
    data = streams.load("digits")
    assert len(data.x_train) + len(data.x_test) == 1797
    assert data.input_shape == (1, 8, 8)
    assert (torch.bincount(data.y_test) - 36).abs().max() <= 1
    assert torch.equal(data.x_train, streams.load("digits").x_train)


@pytest.mark.parametrize("setting", ["task", "domain", "class"])
def test_split(setting: str) -> None:
    data = streams.load("digits")
    stream = streams.make(data, "split", setting)
    assert stream.n_outputs == (2 if setting == "domain" else 10)
    total = 0
    for task in stream.tasks:
        for x, y in (task.train(), task.test()):
            assert set(y.tolist()) == set(task.classes)
            total += len(x)
        assert task.classes == ((0, 1) if setting == "domain" else (2 * task.index, 2 * task.index + 1))
    assert total == 1797


@pytest.mark.parametrize("setting", ["task", "domain", "class"])
@pytest.mark.parametrize("scenario", ["permuted", "rotated"])
def test_transformed(scenario: str, setting: str) -> None:
    data = streams.load("digits")
    stream = streams.make(data, scenario, setting, tasks=3, seed=1)
    assert stream.n_outputs == (10 if setting == "domain" else 30)
    x0, _ = stream.tasks[0].train()
    assert torch.equal(x0, data.x_train)
    for task in stream.tasks[1:]:
        x, y = task.train()
        assert x.shape == data.x_train.shape
        assert not torch.equal(x, x0)
        assert torch.equal(y, data.y_train + (0 if setting == "domain" else 10 * task.index))
        assert torch.equal(x, task.train()[0])  # made anew, the same
        if scenario == "permuted":
            assert torch.equal(x.flatten(1).sort(1).values, x0.flatten(1).sort(1).values)


def test_rotation_turns_the_picture() -> None:
    """A quarter turn of a quarter turn's stream position: 90 (T - 1) / T degrees at most; 45 of 2 tasks."""
    x = torch.zeros(1, 1, 9, 9)
    x[0, 0, 4, 8] = 1.0  # right edge, middle
    data = streams.Data("one", x, torch.zeros(1).long(), x, torch.zeros(1).long(), 1)
    turned = streams.make(data, "rotated", "domain", tasks=2).tasks[1].train()[0][0, 0]
    row, column = divmod(int(turned.argmax()), 9)
    assert abs(row - 4) == abs(column - 4) >= 2


def test_seed_makes_the_permutation() -> None:
    data = streams.load("digits")
    a, b, c = (streams.make(data, "permuted", seed=s).tasks[1].train()[0] for s in (3, 3, 4))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def test_bad_arguments() -> None:
    data = streams.load("digits")
    with pytest.raises(ValueError, match="data is 'cifar1000' but must be one of digits, mnist"):
        streams.load("cifar1000")
    with pytest.raises(ValueError, match="scenario is 'shuffled'"):
        streams.make(data, "shuffled")
    with pytest.raises(ValueError, match="setting is 'both'"):
        streams.make(data, "split", "both")
    with pytest.raises(ValueError, match="tasks is 3 but must divide the 10 classes"):
        streams.make(data, "split", tasks=3)
    with pytest.raises(ValueError, match="tasks is 0"):
        streams.make(data, "rotated", tasks=0)


@pytest.mark.mnist
def test_real_mnist(mnist: Path) -> None:
    data = streams.load("mnist", mnist)
    assert data.x_train.shape == (60000, 1, 28, 28)
    assert data.x_test.shape == (10000, 1, 28, 28)
    assert torch.bincount(data.y_train).tolist() == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
