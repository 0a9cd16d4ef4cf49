"""SGD that leaves reserved weights alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import ops
from .masked import Item, MaskedStep
from .reserved import Reserved


class MaskedSGD(MaskedStep, torch.optim.SGD):
    r""":class:`torch.optim.SGD` on the gradients :math:`g\,(1 - r)`; entries with r = 1 keep every bit.

    HAT (Serra et al. 2018, eq. 2) and DGM (Ostapenko et al. 2019, eq. 4) mask gradients only, and a reserved weight
    then still moves with stale momentum and weight decay. Here it does not, nor does its momentum: mask, momentum,
    decay and update are one pass over memory. Without a mask the results are torch's, to rounding.

    Args:
        params, lr, momentum, dampening, weight_decay, nesterov, maximize: torch's. `foreach` and `fused` are accepted
            and change nothing: there is one implementation. Parameters may be float32, float64, bfloat16 or float16,
            on the CPU or (plain torch operations) elsewhere.
        reserved: parameter to mask r. A mask is bool; floating point in [0, 1] (soft: it scales the gradient, weight
            decay stays whole); packed bits (:func:`fastcl.ops.pack_mask`, in the parameter's memory order); or a
            pair (rows, columns) of vectors, r = min(rows[i], columns[j]) over dimensions 0 and 1, of which one may be
            None (all ones). Masks are checked and copied (binary ones to one bit a weight) now, and again after an
            in-place change of the given tensor. They are not part of ``state_dict()``, which is torch's own.

    Raises:
        ValueError: torch's complaints; a mask of the wrong shape, dtype or range, or for a parameter that is not here;
            complex parameters; differentiable=True.
        RuntimeError: in ``step``: sparse gradients.

    Cost of a step: 20 bytes a float32 parameter (12 without momentum) and 1/8 for bits, 4 for soft masks; 1.3 us a
    tensor.

    Example:
        >>> w = torch.nn.Parameter(torch.ones(2)); w.grad = torch.ones(2)
        >>> fastcl.optim.MaskedSGD([w], lr=0.5, reserved={w: torch.tensor([True, False])}).step(); w.data
        tensor([1.0000, 0.5000])
    """

    _kernel = "masked_sgd_entries"
    _deciding = ("momentum",)
    _options = ("lr", "momentum", "dampening", "weight_decay")
    _flags = ("nesterov", "maximize")

    def __init__(
        self, params: Any, lr: Any = 1e-3, *args: Any, reserved: Reserved | None = None, **kwargs: Any
    ) -> None:
        kwargs["fused"] = None  # torch's would claim to do GradScaler's part
        torch.optim.SGD.__init__(self, params, lr, *args, **kwargs)
        self._start(reserved)

    def _state_of(self, group: dict[str, Any], p: Tensor) -> bool:
        if group["momentum"] == 0:
            return False
        state = self.state[p]
        if state.get("momentum_buffer") is not None:
            return False
        state["momentum_buffer"] = torch.zeros_like(p, memory_format=torch.preserve_format)
        return True

    def _used(self, group: dict[str, Any]) -> tuple[str, ...]:
        return ("momentum_buffer",) if group["momentum"] else ()

    def _by_lists(self, group: dict[str, Any], items: list[Item], first: bool) -> None:
        grads, reserved, columns = self._lists(items)
        buffers = [item.slots[0] for item in items] if group["momentum"] else []
        params = [item.param for item in items]
        ops.masked_sgd_(params, buffers, grads, reserved, columns, *self._numbers(group), first, False)
