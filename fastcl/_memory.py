"""The memory that large outputs of CPU kernels leave to the next ones (csrc/common/memory.cpp)."""

from __future__ import annotations

import ctypes

from ._ops import LIBRARY, pure_python


def release_memory() -> int:
    """Gives the memory kept for later outputs back to the system; returns its bytes.

    On Linux, with torch >= 2.11, CPU outputs of 4 MB and more (masked weights, gradients, samples, densities) are
    written where an earlier one of their size was: memory new to the process is zeroed first, which may take nearly
    as long as the kernel. At most 512 MB stay idle, ``FASTCL_KEEP_MB`` in the environment says otherwise (0: none), and
    the system takes all but 64 MB of them back by itself when it needs memory. Such an output has a storage that cannot
    grow. Never needed for correctness; safe to call from any thread, also while outputs are in use.

    Returns:
        The bytes given back; 0 where nothing is kept.

    Example:
        >>> del_me = fastcl.ops.annealed_mask(torch.zeros(2_000_000), 1.0)
        >>> del del_me; released = fastcl.release_memory(); fastcl.release_memory()
        0
    """
    if pure_python:
        return 0
    release = ctypes.CDLL(str(LIBRARY)).fastcl_release_memory  # the handle that is loaded already
    release.restype = ctypes.c_int64
    return release()
