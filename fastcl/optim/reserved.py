"""Reserved masks as they are given to an optimizer, and as the kernels read them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..ops import _check, pack_mask

Given = Tensor | tuple[Tensor | None, Tensor | None]
Reserved = Mapping[Tensor, Given | None]


def tensors_of(given: Given) -> list[Tensor]:
    return [given] if isinstance(given, Tensor) else [t for t in given if t is not None]


class Mask:
    """One parameter's mask, checked once and copied into the form that a step reads: bits, floats or two vectors.

    Binary masks, however given, become one bit a weight. The given tensors are watched: after an in-place change
    (their version counter) or a change of the parameter's memory order the mask is checked and copied again.
    """

    def __init__(self, owner: str, name: str, param: Tensor, given: Given) -> None:
        self.owner, self.name, self.given = owner, name, given
        self.packed_for: tuple[int, ...] | None = None
        if not isinstance(given, (Tensor, tuple)):
            raise TypeError(
                f"{owner}: reserved of {name} is {type(given).__name__} but must be a tensor or a pair (rows, columns)"
            )
        if isinstance(given, tuple) and (len(given) != 2 or not tensors_of(given)):
            raise ValueError(f"{owner}: reserved of {name} must be a pair (rows, columns), of which one may be None")
        self.read(param)

    def versions(self) -> list[int]:
        return [0 if t.is_inference() else t._version for t in tensors_of(self.given)]

    def current(self, param: Tensor) -> bool:
        return self.seen == (self.versions(), param.shape, param.stride(), param.dtype, param.device)

    @torch.no_grad()
    def read(self, param: Tensor) -> None:
        """Checks the given mask and copies it; `rows`, `columns` are what the list ops take."""
        given, what = self.given, f"reserved of {self.name}"
        if isinstance(given, tuple):
            if param.dim() < 2:
                raise ValueError(f"{self.owner}: {what} is a pair (rows, columns) but its parameter has no columns")
            rows, columns = (
                t if t is not None else torch.ones(param.shape[d], device=param.device) for d, t in enumerate(given)
            )
            rows, columns = (t.float() if t.dtype == torch.bool else t for t in (rows, columns))
        else:
            rows, columns = given, None
            if given.dtype == torch.bool and given.shape == (0,) and param.numel():
                raise ValueError(f"{self.owner}: {what} has shape [0] but must have the shape of {self.name}")
        _check.mask(self.owner, what, rows, columns, self.name, param, True)
        wide = torch.float64 if param.dtype == torch.float64 else torch.float32
        self.inner: Tensor | None = None
        self.row = 0
        if columns is not None:
            self.rows, self.columns = rows.to(wide, copy=True), columns.to(wide, copy=True)
        else:
            self.columns = torch.empty(0, device=param.device)
            self.rows = self._copy(rows, param, wide)
        self.seen = (self.versions(), param.shape, param.stride(), param.dtype, param.device)

    def _copy(self, mask: Tensor, param: Tensor, wide: torch.dtype) -> Tensor:
        if param.numel() == 0:
            return torch.empty(0, dtype=torch.uint8, device=param.device)
        if mask.dtype == torch.uint8:
            if self.packed_for not in (None, param.stride()):
                raise ValueError(
                    f"{self.owner}: reserved of {self.name} is packed in the memory order that {self.name} had "
                    "before: give it again, by reserve()"
                )
            self.packed_for = param.stride()
            return mask.clone()
        like = _check.dense(param)
        if mask.dtype == torch.bool or ((mask == 0) | (mask == 1)).all():
            return pack_mask(torch.empty_like(like, dtype=torch.bool).copy_(mask == 1))
        return torch.empty_like(like, dtype=wide).copy_(mask)

    def share(self, param: Tensor) -> Tensor:
        """1 - r, of the parameter's shape."""
        share = _check.free_share(self.rows, self.columns, param)
        return torch.ones_like(param) if share is None else share  # None: an empty parameter

    def frozen(self, param: Tensor) -> Tensor:
        """Bool, of the parameter's shape: where it is reserved wholly."""
        return self.share(param) == 0

    def for_plan(self, param: Tensor) -> tuple[Tensor, Tensor | None, int]:
        """(mask, inner, row) of a plan's entry: see `MaskView` in csrc/common/masks.h."""
        if not self.columns.numel() or not param.numel():
            return self.rows, None, 0
        if param.shape[0] == 1 or param.stride(0) * param.shape[0] == param.numel():
            outer = 0
        elif param.stride(1) * param.shape[1] == param.numel():
            outer = 1
        else:  # one row is the whole weight: csrc/common/masks.cpp
            whole = torch.minimum(self.rows.unsqueeze(1), self.columns).reshape(
                *param.shape[:2], *[1] * (param.dim() - 2)
            )
            return self.rows.new_ones(1), torch.empty_like(param, dtype=whole.dtype).copy_(whole), param.numel()
        values = (self.columns, self.rows)[outer]
        row, size = param.numel() // param.shape[outer], param.shape[1 - outer]
        stride = param.stride(1 - outer) if size > 1 else param.numel()
        places = torch.arange(row).div(stride, rounding_mode="floor") % size
        return (self.rows, self.columns)[outer].contiguous(), values[places].contiguous(), row


def read_masks(owner: str, groups: Iterable[dict[str, Any]], reserved: Reserved | None) -> dict[Tensor, Mask]:
    """All masks checked, or an error that names the parameter; nothing is changed before."""
    if reserved is None:
        return {}
    if not isinstance(reserved, Mapping):
        raise TypeError(f"{owner}: reserved is {type(reserved).__name__} but must be a dict of parameter to mask")
    names = {
        p: f"parameter {i} of group {g} (shape {list(p.shape)})"
        for g, group in enumerate(groups)
        for i, p in enumerate(group["params"])
    }
    for param in reserved:
        if not isinstance(param, Tensor) or param not in names:
            kind = f"shape {list(param.shape)}" if isinstance(param, Tensor) else type(param).__name__
            raise ValueError(f"{owner}: reserved has a key ({kind}) that is not one of the optimizer's parameters")
    return {p: Mask(owner, names[p], p, given) for p, given in reserved.items() if given is not None}
