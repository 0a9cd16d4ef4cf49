"""Which arithmetic a generative step runs in."""

from __future__ import annotations

import torch

PRECISIONS = ("auto", "float32", "bfloat16")


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


def mixed(device: torch.device, precision: str = "auto") -> torch.autocast:
    """A context whose convolutions and products run in bfloat16; parameters, losses and optimizers stay float32.

    Args:
        device: on which the step runs.
        precision: ``auto``, bfloat16 where :func:`has_fast_bfloat16` says so; ``float32``, never; ``bfloat16``, always.

    Raises:
        ValueError: another precision.

    Example:
        >>> with mixed(torch.device("cpu"), "bfloat16"): (torch.ones(2, 2) @ torch.ones(2, 2)).dtype
        torch.bfloat16
    """
    wanted = check_precision(precision) == "bfloat16" or (precision == "auto" and has_fast_bfloat16(device))
    return torch.autocast(device.type, torch.bfloat16, enabled=wanted)
