"""How the annealing scale s of mask = sigmoid(s e) rises during training: plain functions of counts from 0."""

from __future__ import annotations


def hat_scale(batch: int, batches: int, s_max: float) -> float:
    r"""HAT's (Serra et al. 2018, eq. 3) within an epoch.

    :math:`s = \frac1{s_{max}} + (s_{max}-\frac1{s_{max}})\frac{b-1}{B-1}`.

    Args:
        batch: 0 to batches - 1 (the paper's b - 1). One batch in all gives s_max.
        batches: B.
        s_max: at least 1.

    Raises:
        ValueError: counts or s_max out of range.

    Example:
        >>> [hat_scale(b, 3, 400.0) for b in range(3)]
        [0.0025, 200.00125, 400.0]
    """
    _check(batch, batches, "batch", s_max)
    return _between(s_max, batch / (batches - 1) if batches > 1 else 1.0)


def dgm_scale(epoch: int, epochs: int, batch: int, batches: int, s_max: float, schedule: str = "monotone") -> float:
    r"""DGM's nested annealing (Ostapenko et al. 2019, eq. 3): over epochs a ceiling, within an epoch up to it.

    :math:`s_{max}^i = \frac1{s_{max}} + (s_{max}-\frac1{s_{max}})\,u` and
    :math:`s = \frac1{s_{max}^i} + (s_{max}^i-\frac1{s_{max}^i})\,v`.

    Args:
        epoch, epochs, batch, batches: from 0, of how many.
        s_max: at least 1.
        schedule: ``monotone``: u = i/I, v = b/B, and the ceiling is never below 1, so that s rises in every epoch;
            ``paper``: u = (i-1)/(I-1), v = (b-1)/(B-1) literally, by which s falls from s_max to 1/s_max in the
            first epoch, whose ceiling is 1/s_max; ``epoch``: s is the monotone ceiling (DGMa in the authors' code).

    Raises:
        ValueError: counts or s_max out of range, unknown schedule.

    Example:
        >>> dgm_scale(0, 100, 0, 50, 1e4, "paper"), dgm_scale(99, 100, 49, 50, 1e4)
        (10000.0, 10000.0)
    """
    _check(epoch, epochs, "epoch", s_max)
    _check(batch, batches, "batch", s_max)
    if schedule == "paper":
        ceiling = _between(s_max, epoch / (epochs - 1) if epochs > 1 else 1.0)
        return _between(ceiling, batch / (batches - 1) if batches > 1 else 1.0)
    if schedule not in ("monotone", "epoch"):
        raise ValueError(f"schedule is {schedule!r} but must be monotone, paper or epoch")
    ceiling = max(1.0, _between(s_max, (epoch + 1) / epochs))
    return ceiling if schedule == "epoch" else _between(ceiling, (batch + 1) / batches)


def _between(s_max: float, share: float) -> float:
    return s_max if share == 1 else 1 / s_max + (s_max - 1 / s_max) * share


def _check(index: int, count: int, name: str, s_max: float) -> None:
    if count < 1 or not 0 <= index < count:
        raise ValueError(f"{name} is {index} but must be from 0 to {count} - 1")
    if not 1 <= s_max < float("inf"):
        raise ValueError(f"s_max is {s_max} but must be finite and at least 1")
