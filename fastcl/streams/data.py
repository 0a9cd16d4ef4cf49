"""Data sets as plain tensors: x float32 in [0, 1], [N, channels, height, width]; y int64."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .idx import read_idx


@dataclass(frozen=True)
class Data:
    """A labelled data set with its test split.

    Example:
        >>> streams.load("digits").input_shape
        (1, 8, 8)
    """

    name: str
    x_train: Tensor
    y_train: Tensor
    x_test: Tensor
    y_test: Tensor
    n_classes: int

    @property
    def input_shape(self) -> tuple[int, ...]:
        return tuple(self.x_train.shape[1:])


def load(name: str, root: str | Path | None = None) -> Data:
    """``digits`` (scikit-learn's 1,797 real 8x8 digits, no download) or ``mnist`` (IDX files below `root`).

    Raises:
        ValueError: unknown name, malformed files.
        FileNotFoundError: files missing; the message names the places looked at.

    Example:
        >>> load("digits").x_train.shape
        torch.Size([1433, 1, 8, 8])
    """
    if name not in LOADERS:
        raise ValueError(f"data is {name!r} but must be one of {', '.join(LOADERS)}")
    return LOADERS[name](root)


def _digits(root: str | Path | None) -> Data:
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise ImportError("data 'digits' comes with scikit-learn: run `pip install 'fastcl[data]'`") from None
    bunch = load_digits()
    x = torch.from_numpy(bunch.images).float().div_(16).unsqueeze(1)
    y = torch.from_numpy(bunch.target).long()
    # every fifth example of each class is for testing: stratified, and the same on every machine
    test = torch.zeros(len(y), dtype=torch.bool)
    for c in range(10):
        test[(y == c).nonzero().flatten()[::5]] = True
    return Data("digits", x[~test], y[~test], x[test], y[test], 10)


def files(name: str, root: str | Path | None = None) -> list[Path]:
    """The files that :func:`load` would read, those that are there.

    Example:
        >>> files("digits")  # comes with scikit-learn
        []
    """
    return [path for path in _mnist_files(root)[1] if path is not None] if name == "mnist" else []


STEMS = ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1")


def _mnist_files(root: str | Path | None) -> tuple[list[Path], list[Path | None]]:
    """Where MNIST is looked for, and its four files or None."""
    root = Path(root if root is not None else os.environ.get("FASTCL_DATA", "data/mnist"))
    if "\0" in str(root):
        raise ValueError(f"data_root is {str(root)!r} but must have no NUL in it")
    folders = [root, root / "MNIST" / "raw", root / "raw", root / "mnist"]
    found = []
    for stem in STEMS:
        names = [stem + "-ubyte", stem + "-ubyte.gz", stem.replace("-idx", ".idx") + "-ubyte"]
        found.append(next((f / n for f in folders for n in names if (f / n).is_file()), None))
    return folders, found


def _mnist(root: str | Path | None) -> Data:
    folders, found = _mnist_files(root)
    parts = []
    for stem, path in zip(STEMS, found, strict=True):
        if path is None:
            looked = ", ".join(str(folder) for folder in folders)
            raise FileNotFoundError(f"data 'mnist': no {stem}-ubyte[.gz] in {looked}: give its folder as --data-root")
        parts.append((path, read_idx(path)))
    train, test = _pair(*parts[0], *parts[1]), _pair(*parts[2], *parts[3])
    if train[0].shape[1:] != test[0].shape[1:]:
        raise ValueError(
            f"{parts[2][0]} has images of {list(test[0].shape[2:])} but those of {parts[0][0]} are "
            f"{list(train[0].shape[2:])}"
        )
    return Data("mnist", *train, *test, 10)


def _pair(image_path: Path, images: np.ndarray, label_path: Path, labels: np.ndarray) -> tuple[Tensor, Tensor]:
    if images.ndim != 3 or images.dtype != np.uint8:
        raise ValueError(f"{image_path} has shape {list(images.shape)} of {images.dtype} but must be bytes [N, H, W]")
    if not images.size:
        raise ValueError(f"{image_path} has shape {list(images.shape)}: there is no pixel in it")
    if labels.ndim != 1 or labels.dtype != np.uint8:
        raise ValueError(f"{label_path} has shape {list(labels.shape)} of {labels.dtype} but must be bytes [N]")
    if len(images) != len(labels):
        raise ValueError(f"{label_path} has {len(labels)} labels for the {len(images)} images of {image_path}")
    if labels.max() > 9:
        raise ValueError(f"{label_path} has the label {labels.max()} but digits are 0 to 9")
    return torch.from_numpy(images).unsqueeze(1).float().div_(255), torch.from_numpy(labels).long()


LOADERS: dict[str, Callable[[str | Path | None], Data]] = {"digits": _digits, "mnist": _mnist}
