"""Adam and AdamW that leave reserved weights alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import ops
from .masked import Item, MaskedStep
from .reserved import Reserved


class MaskedAdam(MaskedStep, torch.optim.Adam):
    r""":class:`torch.optim.Adam` on the gradients :math:`g\,(1 - r)`; entries with r = 1 keep every bit.

    HAT and DGM mask gradients only; Adam's stale moments and weight decay then still move a reserved weight (the
    papers' codes hide it by making a new optimizer for every task). Here neither the weight nor its moments change:
    mask, moments, decay and update are one pass over memory. Without a mask the results are torch's, to rounding.

    Args:
        params, lr, betas, eps, weight_decay, amsgrad, maximize: torch's; ``decoupled_weight_decay=True`` is AdamW.
            `foreach` and `fused` are accepted and change nothing: there is one implementation.
        reserved: parameter to mask, as for :class:`MaskedSGD`. Adam divides constant factors out, so that a soft value
            0 < r < 1 hardly slows a weight down; only r = 1 protects.

    Raises:
        ValueError, RuntimeError: as :class:`MaskedSGD`; capturable=True.

    Cost of a step: 28 bytes a float32 parameter (36 with amsgrad) and 1/8 for bits, 4 for soft masks; 1.4 us a tensor.

    Example:
        >>> w = torch.nn.Parameter(torch.ones(2)); w.grad = torch.ones(2)
        >>> fastcl.optim.MaskedAdam([w], lr=0.5, reserved={w: torch.tensor([True, False])}).step(); w.data
        tensor([1.0000, 0.5000])
    """

    _kernel = "masked_adam_entries"
    _deciding = ("amsgrad",)
    _options = ("lr", "betas", "eps", "weight_decay")
    _flags = ("decoupled_weight_decay", "maximize")

    def __init__(
        self, params: Any, lr: Any = 1e-3, *args: Any, reserved: Reserved | None = None, **kwargs: Any
    ) -> None:
        kwargs["fused"] = None  # torch's would claim to do GradScaler's part
        torch.optim.Adam.__init__(self, params, lr, *args, **kwargs)
        self._start(reserved)

    def _state_of(self, group: dict[str, Any], p: Tensor) -> bool:
        state = self.state[p]
        if "step" not in state:
            wide = torch.get_default_dtype() == torch.float64
            state["step"] = torch.zeros((), dtype=torch.float64 if wide else torch.float32)
            state["exp_avg"] = torch.zeros_like(p, memory_format=torch.preserve_format)
            state["exp_avg_sq"] = torch.zeros_like(p, memory_format=torch.preserve_format)
        if group["amsgrad"] and "max_exp_avg_sq" not in state:
            state["max_exp_avg_sq"] = torch.zeros_like(p, memory_format=torch.preserve_format)
        return False

    def _used(self, group: dict[str, Any]) -> tuple[str, ...]:
        return ("exp_avg", "exp_avg_sq", "max_exp_avg_sq") if group["amsgrad"] else ("exp_avg", "exp_avg_sq")

    def _by_lists(self, group: dict[str, Any], items: list[Item], first: bool) -> None:
        grads, reserved, columns = self._lists(items)
        lists = [[item.slots[i] for item in items] for i in range(len(self._used(group)))]
        lists += [[]] * (3 - len(lists)) + [[item.step for item in items]]
        ops.masked_adam_([i.param for i in items], *lists, grads, reserved, columns, *self._numbers(group), False)
