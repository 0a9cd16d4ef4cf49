"""Sample inputs of every op: the table behind tests/test_catalogue.py. A new op needs a row here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

FLOATS = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
WIDTHS = [0, 1, 7, 8, 9, 15, 17, 63, 65, 1023, 16385]  # both sides of every vector width, and more than one chunk
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda t: t,
    "permuted": lambda t: t.transpose(0, -1).contiguous().transpose(0, -1),
    "sliced": lambda t: torch.stack([t, t], -1)[..., 0],
    "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last),
}


@dataclass(frozen=True)
class Sample:
    """One op: `make(shape, dtype, layout)` gives its arguments, `mutates` counts the leading ones that it writes."""

    make: Callable[[tuple[int, ...], torch.dtype, Callable[[Tensor], Tensor]], tuple[Any, ...]]
    mutates: int = 0
    differentiable: bool = False
    shaped: bool = True  # element-wise: takes any shape


def values(shape: tuple[int, ...], dtype: torch.dtype, layout: Callable[[Tensor], Tensor] = lambda t: t) -> Tensor:
    return layout((0.1 + torch.randn(shape, dtype=torch.float64)).to(dtype))


def positive(shape: tuple[int, ...], dtype: torch.dtype, layout: Callable[[Tensor], Tensor] = lambda t: t) -> Tensor:
    return layout((0.1 + torch.rand(shape, dtype=torch.float64)).to(dtype))


def _sums(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _conv(s: Any, d: torch.dtype, layout: Callable[[Tensor], Tensor]) -> tuple[Any, ...]:
    return (
        positive((4, 2, 3, 2), _sums(d)),
        values((5, 4, 3, 4), d),
        values((5, 4, 5, 5), d),
        [2, 1],
        [1, 0],
        [1, 1],
        2,
        2,
    )


def _affine(s: Any, d: torch.dtype, layout: Callable[[Tensor], Tensor]) -> tuple[Any, ...]:
    grad, x = values((5, 7, 6), d), values((5, 7, 6), d)
    shift, scale = values((6,), d).expand(5, 7, 6), positive((5, 7, 1), d).expand(5, 7, 6)
    return [positive((6,), _sums(d))], [positive((6,), _sums(d))], grad, [x, shift, scale], 2


def _reserved(s: Any, d: torch.dtype) -> list[Tensor]:
    """A mask of each stored form, of contiguous tensors of shape s."""
    n = torch.Size(s).numel()
    bits = torch.randint(0, 256, ((n + 7) // 8,), dtype=torch.uint8)
    return [torch.rand(s) > 0.5, bits, torch.rand(s, dtype=torch.float64).to(d).round(decimals=1).clamp(0, 1)]


def _vectors(s: Any, d: torch.dtype) -> tuple[Tensor, Tensor]:
    """The reserved mask and its columns: two vectors where the shape has two dimensions, else nothing reserved."""
    if len(s) < 2:
        return torch.zeros(0, dtype=torch.bool), torch.zeros(0)
    return torch.rand(s[0], dtype=torch.float64).to(d), torch.rand(s[1], dtype=torch.float64).to(d)


def _step(states: int, extra: Callable[[], list[Any]], options: tuple[Any, ...]) -> Callable[..., tuple[Any, ...]]:
    def make(s: Any, d: torch.dtype, layout: Callable[[Tensor], Tensor]) -> tuple[Any, ...]:
        outer, columns = _vectors(s, d)
        params = [values(s, d, layout), *(values(s, d) for _ in range(3))]
        lists = [[positive(s, d, layout), *(positive(s, d) for _ in range(3))] for _ in range(states)]
        grads = [values(s, d), values(s, d, layout), values(s, d), values(s, d)]
        none = torch.zeros(0)
        reserved = [outer, *_reserved(s, d)]
        return (params, *lists, *extra(), grads, reserved, [columns, none, none, none], *options)

    return make


OPS: dict[str, Sample] = {
    "masked_grad_any_": Sample(
        lambda s, d, layout: (
            [values(s, d, layout), *(values(s, d) for _ in range(3))],
            [_vectors(s, d)[0], *_reserved(s, d)],
            [_vectors(s, d)[1], *[torch.zeros(0)] * 3],
        ),
        mutates=1,
    ),
    "pack_mask": Sample(lambda s, d, layout: (layout(torch.rand(s) > 0.5),)),
    "unpack_mask": Sample(lambda s, d, layout: (_reserved(s, d)[1], values(s, d, layout))),
    "masked_sgd_": Sample(_step(1, list, (0.1, 0.9, 0.2, 0.1, False, True, False, True)), mutates=2),
    "masked_adam_": Sample(
        _step(3, lambda: [[torch.full((), 3.0) for _ in range(4)]], (0.1, 0.8, 0.9, 1e-3, 0.1, True, False, True)),
        mutates=5,
    ),
    "compensated_mask": Sample(lambda s, d, layout: (values(s, d, layout), 3.0, 7.0, False), differentiable=True),
    "compensated_mask_backward": Sample(
        lambda s, d, layout: (values(s, d), values(s, d, layout), 3.0, 7.0, False),
    ),
    "masked_weight": Sample(
        lambda s, d, layout: (values(s, d, layout), values(s, d), 3.0, torch.rand(s) > 0.5, 7.0, 1), differentiable=True
    ),
    "masked_weight_kept": Sample(
        lambda s, d, layout: (values(s, d), values(s, d, layout), 3.0, torch.rand(s) > 0.5, 0.0, 0), differentiable=True
    ),
    "masked_weight_backward": Sample(
        lambda s, d, layout: (
            values(s, d),
            values((), _sums(d)),
            values(s, d, layout),
            values(s, d, layout),
            3.0,
            None,
            0.0,
            0,
        ),
        differentiable=True,
    ),
    "mask_sparsity": Sample(
        lambda s, d, layout: ([positive(s, d, layout), positive(s, d)], [torch.rand(s) > 0.5, positive(s, d) / 2]),
        differentiable=True,
    ),
    "mask_sparsity_backward": Sample(
        lambda s, d, layout: (values((), _sums(d)), [positive(s, d, layout)], [torch.rand(s) > 0.5])
    ),
    "masked_grad_": Sample(
        lambda s, d, layout: (
            [values(s, d, layout), values(s, d), values(s, d, layout)],
            [torch.rand(s) > 0.5, layout(torch.rand(s) > 0.5), torch.rand(s, dtype=torch.float64).to(d)],
        ),
        mutates=1,
    ),
    "annealed_mask": Sample(lambda s, d, layout: (values(s, d, layout), 3.0), differentiable=True),
    "annealed_mask_backward": Sample(
        lambda s, d, layout: (values(s, d), values(s, d, layout), 3.0), differentiable=True
    ),
    "quadratic_penalty": Sample(
        lambda s, d, layout: ([values(s, d, layout)], [values(s, d)], [positive(s, d, layout)], 2.0, True),
        differentiable=True,
    ),
    "quadratic_penalty_backward": Sample(
        lambda s, d, layout: (values((), _sums(d)), [values(s, d, layout)], [values(s, d)], [positive(s, d)], 2.0)
    ),
    "quadratic_penalty_grad_": Sample(
        lambda s, d, layout: (
            [values(s, d, layout)],
            [values(s, d)],
            [values(s, d, layout)],
            [positive(s, torch.float32)],
            2.0,
            True,
        ),
        mutates=1,
    ),
    "soft_threshold_": Sample(lambda s, d, layout: ([values(s, d, layout), values(s, d)], 0.5), mutates=1),
    "accumulate_outer_": Sample(
        lambda s, d, layout: (positive((9, 50), _sums(d)), values((5, 7, 9), d), values((5, 7, 50), d), 2),
        mutates=1,
        shaped=False,
    ),
    "accumulate_conv_": Sample(_conv, mutates=1, shaped=False),
    "accumulate_affine_": Sample(_affine, mutates=2, shaped=False),
}


def tensors(args: Any) -> list[Tensor]:
    """All tensors in nested arguments."""
    if isinstance(args, Tensor):
        return [args]
    return [t for a in args for t in tensors(a)] if isinstance(args, (list, tuple)) else []


def copied(args: Any, change: Callable[[Tensor], Tensor] = lambda t: t) -> Any:
    """The arguments with every tensor cloned (memory order kept), then changed."""
    if isinstance(args, Tensor):
        return change(args.clone() if not args.is_floating_point() else args.detach().clone())
    return type(args)(copied(a, change) for a in args) if isinstance(args, (list, tuple)) else args


def in_float64(args: Any) -> Any:
    return copied(args, lambda t: t.double() if t.is_floating_point() else t)
