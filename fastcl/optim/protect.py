"""The same protection for any torch optimizer, by hooks around its step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .reserved import Mask, Reserved, read_masks


def protect(optimizer: torch.optim.Optimizer, reserved: Reserved) -> Protection:
    """Makes any torch optimizer leave reserved weights alone: entries with r = 1 keep every bit.

    Before each step the gradients become g (1 - r); after it, the reserved entries of every parameter, and of every
    state tensor of its shape, get their old bits back: neither stale moments, nor weight decay, nor an update that
    mixes entries (Muon) moves them. State that a step creates starts with zeros in the reserved entries, as in
    :class:`MaskedSGD` and :class:`MaskedAdam`, which do the same in one pass. State of other shapes (a count,
    Adafactor's row and column statistics) belongs to no single entry and is left to the optimizer.

    Args:
        optimizer: any but LBFGS, which moves along directions over all parameters at once.
        reserved: parameter to mask, as for :class:`MaskedSGD`.

    Returns:
        A :class:`Protection`: ``remove()`` ends it, ``reserve(...)`` changes masks.

    Raises:
        ValueError: a bad mask, or one for a parameter that is not the optimizer's. TypeError: LBFGS.
        RuntimeError: in ``step``: sparse gradients of a masked parameter.

    Cost: each step copies every masked parameter and its state, and reads them again. With a closure the gradients are
    masked after each evaluation.

    Example:
        >>> w = torch.nn.Parameter(torch.ones(2)); w.grad = torch.ones(2); optimizer = torch.optim.Adagrad([w], lr=0.5)
        >>> guard = fastcl.protect(optimizer, {w: torch.tensor([True, False])}); optimizer.step(); w.data
        tensor([1.0000, 0.5000])
    """
    if isinstance(optimizer, torch.optim.LBFGS):
        raise TypeError("protect: LBFGS keeps its state over all parameters at once and cannot be protected")
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"protect: optimizer is {type(optimizer).__name__} but must be a torch.optim.Optimizer")
    return Protection(optimizer, reserved)


class Protection:
    """What :func:`protect` returns.

    Raises:
        ValueError: from `reserve`, a mask that does not fit. RuntimeError: from a step, sparse gradients.

    Example:
        >>> guard = fastcl.protect(optimizer, {model[0].weight: torch.ones(3, 4, dtype=torch.bool)})
        >>> before = model[0].weight.clone(); loss.backward(); optimizer.step(); torch.equal(model[0].weight, before)
        True
        >>> guard.remove()
    """

    def __init__(self, optimizer: torch.optim.Optimizer, reserved: Reserved) -> None:
        self._optimizer = optimizer
        self._masks: dict[Tensor, Mask] = read_masks("protect", optimizer.param_groups, reserved)
        self._frozen: dict[Tensor, Tensor] = {}
        self._before: list[tuple[Tensor, dict[str, Tensor]]] = []
        self._hooks = [
            optimizer.register_step_pre_hook(self._pre),
            optimizer.register_step_post_hook(self._post),
        ]

    def remove(self) -> None:
        """Takes the hooks off."""
        for hook in self._hooks:
            hook.remove()

    def reserve(self, reserved: Reserved) -> None:
        """Gives parameters new masks (None: no mask any more); raises before changing any."""
        self._masks.update(read_masks("protect", self._optimizer.param_groups, reserved))
        for param, given in reserved.items():
            self._frozen.pop(param, None)
            if given is None:
                self._masks.pop(param, None)

    @torch.no_grad()
    def _pre(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> Any:
        for p, mask in self._masks.items():
            if p.grad is not None and p.grad.layout != torch.strided:
                raise RuntimeError("protect does not support sparse gradients")
            if not mask.current(p):
                mask.read(p)
                self._frozen.pop(p, None)
            if p not in self._frozen:
                self._frozen[p] = mask.frozen(p)
        self._before = [(p, {"": p.clone(), **{name: t.clone() for name, t in self._state(p)}}) for p in self._masks]
        closure = args[1] if len(args) > 1 else kwargs.get("closure")  # args[0] is the optimizer
        if closure is None:
            self._mask_gradients()
            return None

        def masked() -> Any:
            loss = closure()
            self._mask_gradients()
            return loss

        if len(args) > 1:
            return (args[0], masked, *args[2:]), kwargs
        return args, {**kwargs, "closure": masked}

    @torch.no_grad()
    def _mask_gradients(self) -> None:
        for p, mask in self._masks.items():
            if p.grad is not None:
                share = mask.share(p)
                p.grad.copy_(torch.where(share == 0, 0, p.grad.to(share.dtype) * share))

    @torch.no_grad()
    def _post(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        for p, before in self._before:
            frozen = self._frozen[p]
            p.copy_(torch.where(frozen, before[""], p))
            for name, t in self._state(p):
                old = before.get(name)
                t.copy_(torch.where(frozen, torch.zeros_like(t) if old is None else old, t))
        self._before = []

    def _state(self, p: Tensor) -> list[tuple[str, Tensor]]:
        state = self._optimizer.state.get(p, {})
        return [(name, t) for name, t in state.items() if isinstance(t, Tensor) and t.shape == p.shape and p.dim()]
