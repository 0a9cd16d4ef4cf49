"""One launch over all elements of a model, through a table of addresses.

The cut into chunks, and so every sum, depends on the tensors' sizes alone.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import chain
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._ops import form
from . import _check
from ._triton import BOOL, COLUMNS, FLOATS, NO_MASK, NUMEL_, PACKED, VECTORS, WIDTH_, many, single

TYPES = {
    torch.float32: tl.float32,
    torch.float64: tl.float64,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.bool: tl.uint8,
    torch.uint8: tl.uint8,
    torch.int64: tl.int64,
}
OPTIONS = {"enable_fp_fusion": True}  # Triton 3.10 changes the default
# 4 elements a thread: one layout serves float32 in 128 bits, bf16 in 64, masks in 32, without shuffling between them.
BLOCK, CHUNK, THREADS = 512, 4096, 128


class Mask(NamedTuple):
    """A reserved mask as a kernel reads it: data in the weight's memory order, or two vectors."""

    kind: int
    data: Tensor | None = None
    inner: Tensor | None = None
    row: int = 0


def mask_of(reserved: Tensor | None, columns: Tensor | None, weight: Tensor) -> Mask:
    """`reserved` and `columns` as in :func:`fastcl.ops.masked_grad_any_`, checked; `weight` without gaps."""
    if reserved is None or weight.numel() == 0 or (reserved.dtype == torch.bool and reserved.shape == (0,)):
        return Mask(NO_MASK.value)
    if columns is not None and columns.numel():
        order = _check._memory_order(weight)
        if order[0] != 0:  # dimension 0 is not the outermost in memory (a rare layout): the matrix after all
            shape = [*weight.shape[:2], *[1] * (weight.dim() - 2)]
            wide = arithmetic(weight)
            matrix = torch.minimum(reserved.to(wide).unsqueeze(1), columns.to(wide)).reshape(shape).expand(weight.shape)
            return Mask(FLOATS.value, torch.empty_like(weight, dtype=wide).copy_(matrix))
        inner = columns.reshape(-1, *[1] * (weight.dim() - 2)).expand(weight.shape[1:])
        inner = torch.empty_like(weight[0], dtype=columns.dtype).copy_(inner)
        return Mask(VECTORS.value, reserved.contiguous(), inner, weight.numel() // weight.shape[0])
    if reserved.dtype == torch.uint8:
        return Mask(PACKED.value, reserved.contiguous())
    data = in_order(reserved, weight)
    return Mask(BOOL.value, data.view(torch.uint8)) if data.dtype == torch.bool else Mask(FLOATS.value, data)


def in_order(t: Tensor, like: Tensor) -> Tensor:
    """`t` in the memory order of `like`, which has no gaps."""
    pairs = zip(t.shape, t.stride(), like.stride(), strict=True)
    if all(a == b for size, a, b in pairs if size > 1):
        return t
    return torch.empty_like(like, dtype=t.dtype).copy_(t)


def arithmetic(*tensors: Tensor) -> torch.dtype:
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def on(device: torch.device) -> AbstractContextManager[Any]:
    if device.type != "cuda" or device.index in (None, torch.cuda.current_device()):
        return nullcontext()
    return torch.cuda.device(device)


class Row(NamedTuple):
    """One tensor from each list, its mask, and a tensor of its own."""

    tensors: tuple[Tensor, ...]
    mask: Mask
    aux: Tensor | None


class Launch(NamedTuple):
    """A kernel with all it needs but the numbers: tensors of the same types, their chunks, the first one's place."""

    kernel: Any
    chunks: int
    arguments: tuple[Any, ...]
    constants: dict[str, Any]
    place: int


_prepared: OrderedDict[tuple[Any, ...], list[Launch]] = OrderedDict()


def sweep(
    body: Any,
    lists: Sequence[Sequence[Tensor]],
    numbers: Sequence[float] = (),
    flags: tuple[Any, ...] = (),
    *,
    written: int,
    masks: Sequence[Mask] | None = None,
    aux: Sequence[Tensor | None] | None = None,
    own_numbers: Sequence[tuple[float, ...]] | None = None,
    total: bool = False,
) -> Tensor | None:
    """Runs `body` over all elements of `lists`, of which the first `written` are written; one launch for tensors of
    the same types.

    The first list's tensors without gaps give the memory order; the others are brought to it. `own_numbers` follow
    `numbers` and may differ from tensor to tensor (a launch for each set). With `total` the sum of what the body
    returns, 0-d float64, summed in a fixed order.
    """
    mixed = own_numbers is not None and own_numbers.count(own_numbers[0]) < len(own_numbers)  # type: ignore[attr-defined]
    key = None
    if not mixed:  # nothing but the numbers changes from step to step
        kinds = [mask.kind for mask in masks] if masks else []
        extra = [t for mask in masks or () for t in (mask.data, mask.inner) if t is not None]
        extra += [t for t in aux or () if t is not None]
        rows = [mask.row for mask in masks] if masks else []
        key = (body, flags, written, total, len(lists), *kinds, *rows, *form([*chain(*lists), *extra]))
    copies: list[tuple[Tensor, Tensor]] = []
    launches = _prepared.get(key) if key else None
    if launches is None:
        launches, copies, alive = _prepare(body, lists, flags, written, masks, aux, own_numbers, total)
        if key and alive is None:
            _prepared[key] = launches
            if len(_prepared) > 32:
                _prepared.popitem(last=False)
    device = lists[0][0].device if lists[0] else torch.device("cpu")
    count = sum(launch.chunks for launch in launches) if total else 1
    partials = torch.empty(count, dtype=torch.float64, device=device)
    at = 0
    with on(device):
        for launch in launches:
            s = [*numbers, *(own_numbers[launch.place] if own_numbers else ())]
            padded = *map(float, s), *[0.0] * (10 - len(s))
            launch.kernel[(launch.chunks,)](
                *launch.arguments, partials[at:] if at else partials, *padded, **launch.constants
            )
            at += launch.chunks if total else 0
    for original, copy in copies:
        original.copy_(copy)
    return partials.sum() if total else None


def _prepare(
    body: Any,
    lists: Sequence[Sequence[Tensor]],
    flags: tuple[Any, ...],
    written: int,
    masks: Sequence[Mask] | None,
    aux: Sequence[Tensor | None] | None,
    own_numbers: Sequence[tuple[float, ...]] | None,
    total: bool,
) -> tuple[list[Launch], list[tuple[Tensor, Tensor]], Any]:
    """The launches, what must be copied back after them, and what must live until then: None if nothing was copied,
    so that the launches hold for the same addresses again."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    places: dict[tuple[Any, ...], int] = {}
    copies: list[tuple[Tensor, Tensor]] = []
    lasting = True
    for i, first in enumerate(lists[0]):
        if first.numel() == 0:
            continue
        like = _check.dense(first)
        given = [list_[i] for list_ in lists]
        tensors = [like, *(in_order(t, like) for t in given[1:])]
        lasting &= all(a is b for a, b in zip(tensors, given, strict=True))
        copies += [(a, b) for a, b in zip(given[:written], tensors, strict=False) if a is not b]
        mask = masks[i] if masks else Mask(NO_MASK.value)
        extra = aux[i] if aux else None
        types = (*(t.dtype for t in (*tensors, mask.data, mask.inner, extra) if t is not None),)
        key = (types, mask.kind, own_numbers[i] if own_numbers else ())
        groups.setdefault(key, []).append(Row(tuple(tensors), mask, extra))
        places.setdefault(key, i)
    launches = [_launch(body, groups[k], flags, total, places[k]) for k in groups]
    # what is launched without a table holds its tensors: it must not outlive the call
    lasting &= all(launch.kernel is many for launch in launches)
    return launches, copies, None if lasting else groups


def _launch(body: Any, rows: list[Row], flags: tuple[Any, ...], total: bool, place: int) -> Launch:
    tensors, mask, aux = rows[0]
    constants = {
        "BODY": body, "F": flags, "MASK": mask.kind, "A": TYPES[arithmetic(*tensors)], "SUM": total,
        "CHUNK": CHUNK, "BLOCK": BLOCK, "num_warps": THREADS // (64 if torch.version.hip else 32), **OPTIONS,
    }  # fmt: skip
    like = tensors[0]
    padded = (*tensors, *[like] * (COLUMNS - len(tensors)))
    data, inner, own = (t if t is not None else like for t in (mask.data, mask.inner, aux))
    chunks = sum(triton.cdiv(row.tensors[0].numel(), CHUNK) for row in rows)
    if len(rows) == 1:
        return Launch(single, chunks, (*padded, data, inner, mask.row, own, like.numel()), constants, place)
    table, starts, align = _table(rows)
    constants |= {"T": tuple(TYPES[t.dtype] for t in (*padded, data, inner, own)), "ALIGN": align}
    return Launch(many, chunks, (table, starts), constants, place)


_tables: OrderedDict[tuple[Any, ...], tuple[Tensor, Tensor]] = OrderedDict()


def _table(rows: list[Row]) -> tuple[Tensor, Tensor, int]:
    """The table of addresses and the chunks on the device, and what all addresses are multiples of. A table is a
    function of its cells alone: it is kept, and made anew only for a new address or size."""
    cells: list[int] = []
    addresses: list[int] = []
    for tensors, mask, aux in rows:
        row = [*(t.data_ptr() for t in tensors), *[0] * (COLUMNS - len(tensors))]
        row += [0 if t is None else t.data_ptr() for t in (mask.data, mask.inner)]
        addresses += row
        cells += [*row, mask.row, 0 if aux is None else aux.data_ptr(), tensors[0].numel()]
    device = rows[0].tensors[0].device
    key = (device, *cells)
    if key not in _tables:
        numels = cells[NUMEL_.value :: WIDTH_.value]
        chunks = [x for t, n in enumerate(numels) for c in range(triton.cdiv(n, CHUNK)) for x in (t, c)]
        host = torch.tensor([*cells, *chunks], dtype=torch.int64)
        if device.type == "cuda":  # a CUDA graph reads it again at every replay: it must stay, and in pinned memory
            host = host.pin_memory()
        _tables[key] = host, host.to(device, non_blocking=True)
        if len(_tables) > 64:
            _tables.popitem(last=False)
    on_device = _tables[key][1]
    align = 16 if all(a % 16 == 0 for a in addresses) else 1
    return on_device[: len(cells)], on_device[len(cells) :], align
