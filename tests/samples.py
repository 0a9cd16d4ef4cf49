"""Sample inputs of every op: the table behind tests/test_catalogue.py. A new op needs a row here."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Shape = tuple[int, ...]
Layout = Callable[[Tensor], Tensor]

FLOATS = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
WIDTHS = [0, 1, 7, 8, 9, 15, 17, 63, 65, 1023, 16385]  # both sides of every vector width, and more than one chunk


def _sliced(t: Tensor) -> Tensor:
    return torch.stack([t, t], -1)[..., 0]


def _permuted(t: Tensor) -> Tensor:
    return t.transpose(0, -1).contiguous().transpose(0, -1) if t.dim() else t


LAYOUTS: dict[str, Layout] = {
    "contiguous": lambda t: t,
    "permuted": _permuted,  # dense, in another order
    "sliced": _sliced,  # with gaps
    "permuted and sliced": lambda t: _sliced(_permuted(t).transpose(0, -1)).transpose(0, -1) if t.dim() else _sliced(t),
    "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else _permuted(t),
}
# What element-wise ops are opchecked on: every layout that a shape can have.
FORMS: list[tuple[Shape, str]] = [
    *(((5, 13), layout) for layout in list(LAYOUTS)[:4]),
    ((2, 3, 4, 5), "channels_last"),
    *((shape, "contiguous") for shape in ((), (1,), (0,), (3, 0), (17,))),
]


@dataclass(frozen=True)
class Sample:
    """`make(shape, dtype, layout)` gives an op's arguments, `mutates` counts the leading ones that it writes."""

    make: Callable[[Shape, torch.dtype, Layout], tuple[Any, ...]]
    mutates: int = 0
    differentiable: bool = False
    shaped: bool = True  # element-wise: takes any shape; otherwise two sizes, batch and features
    large: Shape = (3, 40001)  # enough for several threads


def values(shape: Shape, dtype: torch.dtype, layout: Layout = lambda t: t) -> Tensor:
    return layout((0.1 + torch.randn(shape, dtype=torch.float64)).to(dtype))


def positive(shape: Shape, dtype: torch.dtype, layout: Layout = lambda t: t) -> Tensor:
    return layout((0.1 + torch.rand(shape, dtype=torch.float64)).to(dtype))


def _sums(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _masked(s: Shape, d: torch.dtype, layout: Layout) -> tuple[Any, ...]:
    grads = [values(s, d, layout), values(s, d), values(s, d, layout)]
    return grads, [torch.rand(s) > 0.5, layout(torch.rand(s) > 0.5), torch.rand(s, dtype=torch.float64).to(d)]


def _masked_by_other_floats(s: Shape, d: torch.dtype, layout: Layout) -> tuple[Any, ...]:
    others = [other for other in FLOATS if other != d]
    masks = [layout(torch.rand(s, dtype=torch.float64).to(other)) for other in others]
    return [values(s, d, layout) for _ in others], masks


def _problem(s: Shape, d: torch.dtype, layout: Layout, importance: torch.dtype | None = None) -> tuple[Any, ...]:
    params, anchors = [values(s, d, layout), values((3,), d)], [values(s, d), values((3,), d)]
    return params, anchors, [positive(s, importance or d, layout), positive((3,), importance or d)], 2.0


def _outer(s: Shape, d: torch.dtype, layout: Layout, positions: Shape = (7,)) -> tuple[Any, ...]:
    (n, o), i = s, s[1] + 37
    grad, activation = values((n, *positions, o), d, layout), values((n, *positions, i), d, layout)
    return positive((o, i), _sums(d), layout), grad, activation, 2


def _conv(s: Shape, d: torch.dtype, layout: Layout) -> tuple[Any, ...]:
    n, c = s[0], 2 * s[1]  # two groups
    out = positive((c + 2, c // 2, 3, 2), _sums(d), layout)
    return out, values((n, c + 2, 3, 4), d, layout), values((n, c, 5, 5), d, layout), [2, 1], [1, 0], [1, 1], 2, 2


def _conv1d(s: Shape, d: torch.dtype, layout: Layout) -> tuple[Any, ...]:
    n, c = s
    return (
        positive((4, c, 3), _sums(d)),
        values((n, 4, 9), d, layout),
        values((n, c, 9), d, layout),
        [1],
        [1],
        [1],
        1,
        1,
    )


def _affine(s: Shape, d: torch.dtype, layout: Layout) -> tuple[Any, ...]:
    n, c = s
    grad, x = values((n, 7, c), d, layout), values((n, 7, c), d, layout)
    shift, scale = values((c,), d).expand(n, 7, c), positive((n, 7, 1), d).expand(n, 7, c)
    return [positive((c,), _sums(d))], [positive((c,), _sums(d))], grad, [x, shift, scale], 2


def _reserved(s: Shape, d: torch.dtype) -> list[Tensor]:
    """A mask of each stored form, of contiguous tensors of shape s."""
    n = torch.Size(s).numel()
    bits = torch.randint(0, 256, ((n + 7) // 8,), dtype=torch.uint8)
    return [torch.rand(s) > 0.5, bits, torch.rand(s, dtype=torch.float64).to(d).round(decimals=1).clamp(0, 1)]


def _vectors(s: Shape, d: torch.dtype) -> tuple[Tensor, Tensor]:
    """The reserved mask and its columns: two vectors where the shape has two dimensions, else nothing reserved."""
    if len(s) < 2:
        return torch.zeros(0, dtype=torch.bool), torch.zeros(0)
    return torch.rand(s[0], dtype=torch.float64).to(d), torch.rand(s[1], dtype=torch.float64).to(d)


def _step(states: int, extra: Callable[[], list[Any]], options: tuple[Any, ...]) -> Callable[..., tuple[Any, ...]]:
    def make(s: Shape, d: torch.dtype, layout: Layout) -> tuple[Any, ...]:
        outer, columns = _vectors(s, d)
        params = [values(s, d, layout), *(values(s, d) for _ in range(3))]
        lists = [[positive(s, d, layout), *(positive(s, d) for _ in range(3))] for _ in range(states)]
        grads = [values(s, d), values(s, d, layout), values(s, d), values(s, d)]
        none = torch.zeros(0)
        reserved = [outer, *_reserved(s, d)]
        return (params, *lists, *extra(), grads, reserved, [columns, none, none, none], *options)

    return make


def _path(s: Shape, d: torch.dtype, layout: Layout, kinds: str) -> list[list[Tensor]]:
    """Lists for path.cpp, two tensors each. v: the parameters' dtype, w: the sums', b: bfloat16."""
    dtypes = {"v": d, "w": _sums(d), "b": torch.bfloat16}
    return [[positive(s, dtypes[kind], layout), positive((3,), dtypes[kind])] for kind in kinds]


def _mixture(s: Shape, d: torch.dtype, layout: Layout, kind: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """labels [N], x [N, D], means [3, D] and factors of a mixture."""
    (n, features), k = s, 3
    if kind == "full":
        scale = values((k, features, features), d).tril(-1) * 0.1 + torch.eye(features, dtype=d)
    else:
        scale = positive((k, features) if kind == "diagonal" else (k,), d)
    return torch.arange(n) % k, values(s, d, layout), values((k, features), d, layout), layout(scale)


def _sampled(s: Shape, d: torch.dtype, layout: Layout, kind: str = "full") -> tuple[Any, ...]:
    labels, _, means, scale = _mixture(s, d, layout, kind)
    return layout(labels), means, scale, torch.tensor([2**40 + 7])


def _weighted(s: Shape, d: torch.dtype, layout: Layout, kind: str) -> tuple[Any, ...]:
    _, x, means, scale = _mixture(s, d, layout, kind)
    return x, layout(torch.tensor([0.5, 0.0, 2.0], dtype=d)), means, scale


# The key is the op's name, and what is special about the sample after a colon.
OPS: dict[str, Sample] = {
    "masked_grad_": Sample(_masked, mutates=1),
    "masked_grad_:masks of other dtypes": Sample(_masked_by_other_floats, mutates=1),
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
        lambda s, d, layout: (
            values((), _sums(d)),
            [positive(s, d, layout), positive(s, d)],
            [torch.rand(s) > 0.5, positive(s, d) / 2],
        )
    ),
    "annealed_mask": Sample(lambda s, d, layout: (values(s, d, layout), 3.0), differentiable=True),
    "annealed_mask_backward": Sample(
        lambda s, d, layout: (values(s, d), values(s, d, layout), 3.0), differentiable=True
    ),
    "quadratic_penalty": Sample(lambda s, d, layout: (*_problem(s, d, layout), True), differentiable=True),
    "quadratic_penalty:importances in bf16": Sample(
        lambda s, d, layout: (*_problem(s, d, layout, torch.bfloat16), False), differentiable=True
    ),
    "quadratic_penalty_backward": Sample(
        lambda s, d, layout: (values((), _sums(d)), *_problem(s, d, layout)),
    ),
    "quadratic_penalty_grad_": Sample(
        lambda s, d, layout: ([values(s, d, layout), values((3,), d)], *_problem(s, d, layout, torch.float32), True),
        mutates=1,
    ),
    "accumulate_path_": Sample(lambda s, d, layout: tuple(_path(s, d, layout, "wvvv")), mutates=1),
    "accumulate_walk_": Sample(lambda s, d, layout: (*_path(s, d, layout, "wwwvvv"), 0.3), mutates=3),
    "score_walk_": Sample(lambda s, d, layout: (*_path(s, _sums(d), layout, "wwww"), 0.1), mutates=3),
    "consolidate_path_": Sample(lambda s, d, layout: (*_path(s, d, layout, "vwvv"), 0.1), mutates=3),
    "consolidate_path_:importances in bf16": Sample(
        lambda s, d, layout: (*_path(s, d, layout, "bwvv"), 0.1), mutates=3
    ),
    "merge_importances_": Sample(lambda s, d, layout: (*_path(s, d, layout, "ww"), 0.5, 2.0), mutates=1),
    "merge_importances_:importances in bf16": Sample(
        lambda s, d, layout: (*_path(s, d, layout, "bw"), 0.5, 2.0), mutates=1
    ),
    "merge_anchored_": Sample(lambda s, d, layout: tuple(_path(s, d, layout, "vvwv")), mutates=2),
    "gmm_sample": Sample(_sampled, shaped=False, large=(3000, 33)),
    "gmm_sample:diagonal": Sample(lambda s, d, layout: _sampled(s, d, layout, "diagonal"), shaped=False),
    "gmm_sample:spherical": Sample(lambda s, d, layout: _sampled(s, d, layout, "spherical"), shaped=False),
    "gmm_log_prob": Sample(lambda s, d, layout: _mixture(s, d, layout, "full")[1:], shaped=False, large=(3000, 33)),
    "gmm_log_prob:diagonal": Sample(
        lambda s, d, layout: _mixture(s, d, layout, "diagonal")[1:], shaped=False, large=(9000, 65)
    ),
    "gmm_log_prob:spherical": Sample(lambda s, d, layout: _mixture(s, d, layout, "spherical")[1:], shaped=False),
    "gmm_responsibilities": Sample(
        lambda s, d, layout: _weighted(s, d, layout, "full"), shaped=False, large=(3000, 33)
    ),
    "gmm_responsibilities:diagonal": Sample(lambda s, d, layout: _weighted(s, d, layout, "diagonal"), shaped=False),
    "gmm_statistics": Sample(
        lambda s, d, layout: (values(s, d, layout), values((s[0], 3), d, layout), values((3, s[1]), d), True),
        shaped=False,
        large=(3000, 33),
    ),
    "gmm_statistics:diagonal": Sample(
        lambda s, d, layout: (values(s, d, layout), positive((s[0], 3), d, layout), values((3, s[1]), d), False),
        shaped=False,
    ),
    "gmm_class_statistics": Sample(
        lambda s, d, layout: (values(s, d, layout), torch.arange(s[0]) % 3, values((3, s[1]), d, layout), True),
        shaped=False,
        large=(3000, 33),
    ),
    "soft_threshold_": Sample(lambda s, d, layout: ([values(s, d, layout), values(s, d)], 0.5), mutates=1),
    "group_soft_threshold_": Sample(
        lambda s, d, layout: ([values(s, d, layout), values((3, *s), d)], 0.5, 0),
        mutates=1,
        shaped=False,
        large=(301, 130),
    ),
    "group_soft_threshold_:columns": Sample(
        lambda s, d, layout: ([values(s, d, layout), values((*s, 3), d)], 0.5, 1),
        mutates=1,
        shaped=False,
        large=(301, 130),
    ),
    "drift_norms": Sample(
        lambda s, d, layout: ([values(s, d, layout), values((*s, 3), d)], [values(s, d), values((*s, 3), d)], 1),
        shaped=False,
        large=(301, 130),
    ),
    "accumulate_outer_": Sample(_outer, mutates=1, shaped=False, large=(60, 170)),
    "accumulate_outer_:one position": Sample(
        lambda s, d, layout: _outer(s, d, layout, ()), mutates=1, shaped=False, large=(300, 170)
    ),
    "accumulate_conv_": Sample(_conv, mutates=1, shaped=False, large=(40, 33)),
    "accumulate_conv_:1-d": Sample(_conv1d, mutates=1, shaped=False, large=(100, 130)),
    "accumulate_affine_": Sample(_affine, mutates=2, shaped=False, large=(50, 600)),
    "accumulate_affine_:a bias alone": Sample(
        lambda s, d, layout: ([], [positive((s[1],), _sums(d))], values((s[0], 7, s[1]), d, layout), [], 1),
        mutates=2,
        shaped=False,
        large=(50, 600),
    ),
}


def op_name(case: str) -> str:
    return case.split(":")[0]


def tensors(args: Any) -> list[Tensor]:
    """All tensors in nested arguments."""
    if isinstance(args, Tensor):
        return [args]
    return [t for a in args for t in tensors(a)] if isinstance(args, (list, tuple)) else []


def mapped(args: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The arguments with every tensor changed."""
    if isinstance(args, Tensor):
        return change(args)
    return type(args)(mapped(a, change) for a in args) if isinstance(args, (list, tuple)) else args


def same_strides(t: Tensor) -> Tensor:
    """A copy with the very strides of t, gaps and overlaps included (clone() would close them)."""
    return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype).copy_(t) if 0 not in t.stride() else t.clone()


def copied(args: Any) -> Any:
    return mapped(args, lambda t: same_strides(t.detach()))


def in_float64(args: Any) -> Any:
    return mapped(args, lambda t: t.detach().double().clone() if t.is_floating_point() else t.clone())


def replaced(args: Any, index: int, change: Callable[[Tensor], Tensor]) -> Any:
    """The arguments with the index-th tensor, in the order of `tensors`, changed."""
    counter = itertools.count()
    return mapped(args, lambda t: change(t) if next(counter) == index else t)
