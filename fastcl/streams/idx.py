"""IDX files (MNIST's format), gzip or not: everything is checked before an array is returned."""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from pathlib import Path
from typing import BinaryIO

import numpy as np

_DTYPES = {0x08: ">u1", 0x09: ">i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
CHUNK = 16 << 20  # read at once: what a header promises is not set aside before it is there
MAX_BYTES = 2 << 30  # MNIST's largest file is 47 MB; a header that asks for more than this is refused


def read_idx(path: str | Path) -> np.ndarray:
    """The array of one IDX file, in native byte order.

    Format: two zero bytes, a type byte, the number of dimensions, each size as big-endian uint32, then the values.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not IDX, truncated, with bytes after the end, not valid gzip, or larger than 2 GiB. At most the
            header's own size is ever decompressed, so a small file cannot fill the memory.

    Example:
        >>> read_idx("train-images-idx3-ubyte.gz").shape  # doctest: +SKIP
        (60000, 28, 28)
    """
    path = Path(path)
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} is not a file")  # a folder; or a pipe, which could be waited for without end
    with path.open("rb") as raw:
        zipped = raw.read(2) == b"\x1f\x8b"
        raw.seek(0)
        try:
            return _read(gzip.GzipFile(fileobj=raw) if zipped else raw, path)
        except (gzip.BadGzipFile, zlib.error, EOFError) as error:
            raise ValueError(f"{path} is not a valid gzip file: {error}") from None


def _read(file: BinaryIO | gzip.GzipFile, path: Path) -> np.ndarray:
    magic = file.read(4)
    if len(magic) < 4 or magic[:2] != b"\0\0" or magic[2] not in _DTYPES or not 1 <= magic[3] <= 8:
        raise ValueError(
            f"{path} begins with {magic.hex(' ') or 'nothing'} but an IDX file with 00 00, type, dimensions"
        )
    header = file.read(4 * magic[3])
    if len(header) < 4 * magic[3]:
        raise ValueError(f"{path} is truncated: its header has {4 + len(header)} bytes of {4 + 4 * magic[3]}")
    shape = struct.unpack(f">{magic[3]}I", header)
    dtype = np.dtype(_DTYPES[magic[2]])
    size = math.prod(shape) * dtype.itemsize
    # a zero among the sizes hides what the others would ask for, and numpy cannot hold them
    if max(size, math.prod(d or 1 for d in shape)) > MAX_BYTES:
        raise ValueError(
            f"{path} has a header for {size} bytes of shape {list(shape)} but at most {MAX_BYTES} are read"
        )
    body = bytearray()
    while len(body) < size and (more := file.read(min(size - len(body), CHUNK))):
        body += more
    if len(body) < size:
        raise ValueError(f"{path} is truncated: {len(body)} bytes of values where its header says {size}")
    if file.read(1):
        raise ValueError(f"{path} has bytes after the {size} that its header announces")
    return np.frombuffer(body, dtype).reshape(shape).astype(dtype.newbyteorder("="))
