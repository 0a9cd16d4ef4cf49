"""Which arithmetic a generative step runs in."""

from __future__ import annotations

import torch
from torch import nn

PRECISIONS = ("auto", "float32", "bfloat16")
# With fewer pairs of channels autocast's copies, and torch's convolutions instead of those with the batch last, cost a
# CPU more than AMX saves: `pytest bench/bench_methods.py -k precision`.
WIDE = 15_000


def check_precision(precision: str) -> str:
    """Raises ValueError for what is none of PRECISIONS."""
    if precision not in PRECISIONS:
        raise ValueError(f"precision is {precision!r} but must be one of {', '.join(PRECISIONS)}")
    return precision


def has_fast_bfloat16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 matrices faster than float32 ones: a CPU with AMX, a GPU since Ampere.

    Example:
        >>> has_fast_bfloat16(torch.device("meta"))
        False
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu":
        return False
    amx = getattr(torch.cpu, "_is_amx_tile_supported", None)  # private: there is no public question
    return bool(amx is not None and amx())


def is_wide(network: nn.Module) -> bool:
    """Whether one of its convolutions has at least WIDE pairs of channels.

    Example:
        >>> is_wide(nn.Conv2d(64, 128, 5)), is_wide(nn.Conv2d(96, 192, 5))
        (False, True)
    """
    return any(p.dim() > 2 and p.shape[0] * p.shape[1] >= WIDE for p in network.parameters())


def mixed(device: torch.device, precision: str = "auto", network: nn.Module | None = None) -> torch.autocast:
    """A context whose convolutions and products run in bfloat16; parameters, losses and optimizers stay float32.

    Args:
        device: on which the step runs.
        precision: ``auto``, bfloat16 where :func:`has_fast_bfloat16` says so, on a CPU only if :func:`is_wide` does
            too; ``float32``, never; ``bfloat16``, always.
        network: what most of the step's time goes to; None: taken as wide.

    Raises:
        ValueError: another precision.

    Example:
        >>> with mixed(torch.device("cpu"), "bfloat16"): (torch.ones(2, 2) @ torch.ones(2, 2)).dtype
        torch.bfloat16
    """
    wanted = check_precision(precision) == "bfloat16"
    if precision == "auto":
        wanted = has_fast_bfloat16(device) and (device.type != "cpu" or network is None or is_wide(network))
    return torch.autocast(device.type, torch.bfloat16, enabled=wanted)
