"""Layers whose weights or units a task chooses by annealed masks (HAT, DGM)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..ops._state import misfit

PLAIN = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d)


class MaskedLayer:
    r"""What the masked layers share; mixed into torch's own layer, whose arguments come first.

    Args of every masked layer, after torch's:
        mask: ``"weight"``: :math:`W \circ \sigma(s\,e)` with an embedding for every weight, 0 at a task's start (DGMw,
            Ostapenko et al. 2019); ``"unit"``: the output is multiplied by :math:`\sigma(s\,e)`, an embedding for every
            output unit or channel, drawn from N(0, 1) (HAT, Serra et al. 2018; DGMa).
        activation: for unit masks, applied to the output before the mask (the papers' place for it).
        s_max: the scale at which masks are recorded and compared.
        binary: for unit masks, record m >= 0.5 instead of m at s_max (HAT's own are soft). Weight masks are
            always binary, one bit a weight and task.
        compensate: whether the embedding's gradient is HAT's compensated one.

    In training ``scale`` is s and ``task`` None. ``begin_task()`` starts a new embedding, ``end_task()`` records its
    mask; under :func:`use_task` the layer runs on a recorded one. ``reserved()`` is what all recorded tasks use.

    Raises:
        ValueError: an unknown mask, an s_max below 1, an activation with a weight mask; a task that is not recorded.

    Example:
        >>> layer = MaskedLinear(4, 2); y = layer(torch.zeros(1, 4)); layer.end_task()
        >>> layer.tasks
        1
    """

    weight: nn.Parameter
    bias: nn.Parameter | None
    embedding: nn.Parameter
    masks: Tensor  # weight: uint8 [T, bytes], packed in contiguous order; unit: float32 [T, units]

    def __init__(
        self,
        *args: Any,
        mask: str = "weight",
        activation: Callable[[Tensor], Tensor] | None = None,
        s_max: float = 400.0,
        binary: bool = True,
        compensate: bool = True,
        **kwargs: Any,
    ) -> None:
        if mask not in ("weight", "unit"):
            raise ValueError(f"mask is {mask!r} but must be weight or unit")
        if not 1 <= s_max < float("inf"):
            raise ValueError(f"s_max is {s_max} but must be finite and at least 1")
        if activation is not None and mask == "weight":
            raise ValueError("activation is for unit masks: a weight mask leaves the output alone")
        super().__init__(*args, **kwargs)  # torch's layer
        self.mask, self.activation, self.s_max = mask, activation, float(s_max)
        self.binary, self.compensate = binary or mask == "weight", compensate
        self.scale, self.task = float(s_max), None
        self.kept: Tensor | None = None  # sum of m (1 - r) of the last forward pass, for `sparsity`
        weight = self.weight
        shape = weight.shape if mask == "weight" else (self.units,)
        self.embedding = nn.Parameter(torch.empty(shape, device=weight.device, dtype=weight.dtype))
        width = (weight.numel() + 7) // 8 if mask == "weight" else self.units
        dtype = torch.uint8 if mask == "weight" else torch.float32
        self.register_buffer("masks", torch.zeros(0, width, dtype=dtype, device=weight.device))
        self._free: tuple[Any, Tensor, float] | None = None
        self.begin_task()
        if mask == "weight":
            self._free_share()

    @property
    def units(self) -> int:
        return self.out_features if isinstance(self, nn.Linear) else self.out_channels

    @property
    def tasks(self) -> int:
        """How many masks are recorded."""
        return len(self.masks)

    @torch.no_grad()
    def begin_task(self, generator: torch.Generator | None = None) -> None:
        """A new embedding: zeros for weights (m = 0.5), N(0, 1) for units.

        Example:
            >>> net = nn.Sequential(MaskedLinear(4, 2)); end_task(net); begin_task(net); net[0].task is None
            True
        """
        if self.mask == "weight":
            self.embedding.zero_()
        else:
            self.embedding.normal_(generator=generator)

    @torch.no_grad()
    def end_task(self) -> None:
        """Records the mask of this task: sigmoid(s_max e) >= 0.5, or for soft unit masks its value.

        Example:
            >>> net = nn.Sequential(MaskedLinear(4, 2)); end_task(net); net[0].tasks
            1
        """
        self.masks = torch.cat([self.masks, self._now().unsqueeze(0)])
        if self.mask == "weight":
            self._free_share()  # now, not in the next forward pass: torch.compile would stop at its sum

    def _now(self) -> Tensor:
        """This task's mask as it would be recorded."""
        if self.mask == "weight":
            return ops.pack_mask((self.embedding >= 0).contiguous())
        m = ops.annealed_mask(self.embedding.detach().float(), self.s_max)
        return (m >= 0.5).float() if self.binary else m

    def reserved(self) -> Tensor:
        """What the recorded tasks use: packed bits in contiguous order for weights; max over tasks for units."""
        if self.mask == "unit":
            return self.masks.amax(0) if self.tasks else torch.zeros_like(self.embedding, dtype=torch.float32)
        union = torch.zeros_like(self.masks[0]) if self.tasks else self._now().zero_()
        for packed in self.masks:
            union |= packed
        return union

    def unpacked(self, task: int) -> Tensor:
        """A recorded mask: bool of the weight's shape, or floats [units]."""
        recorded = self.masks[self._index(task)]
        if self.mask == "unit":
            return recorded
        return ops.unpack_mask(recorded, torch.empty(self.weight.shape, dtype=torch.bool, device=self.weight.device))

    def _index(self, task: int) -> int:
        if not 0 <= task < self.tasks:
            raise ValueError(f"task is {task} but {self.tasks} masks are recorded")
        return task

    def _free_share(self) -> tuple[Tensor, float]:
        """The reserved bits in the weight's memory order and sum(1 - r); kept until a mask is recorded."""
        key = (self.tasks, self.weight.stride(), self.weight.device)
        if self._free is None or self._free[0] != key:
            like = torch.empty(self.weight.shape, dtype=torch.bool, device=self.weight.device)
            used = ops.unpack_mask(self.reserved(), like)
            in_order = torch.empty_like(self.weight, dtype=torch.bool).copy_(used)
            self._free = key, ops.pack_mask(in_order), float((~used).sum())
        return self._free[1:]

    def _effective_weight(self) -> Tensor:
        self.kept = None
        if self.mask == "unit":
            return self.weight
        if self.task is not None:
            return torch.where(self.unpacked(self.task), self.weight, 0)
        s_max = self.s_max if self.compensate else None
        if not torch.is_grad_enabled():
            return ops.masked_weight(self.weight, self.embedding, self.scale)
        reserved, _ = self._free_share()
        weight, self.kept = ops.masked_weight_kept(
            self.weight, self.embedding, self.scale, reserved=reserved if self.tasks else None, s_max=s_max
        )
        return weight

    def gate(self) -> Tensor:
        """The unit mask that runs now, [units]."""
        if self.task is not None:
            return self.masks[self._index(self.task)].to(self.embedding.dtype)
        if self.compensate:
            return ops.compensated_mask(self.embedding, self.scale, self.s_max)
        return ops.annealed_mask(self.embedding, self.scale)

    def _gated(self, y: Tensor) -> Tensor:
        if self.mask == "weight":
            return y
        if self.activation is not None:
            y = self.activation(y)
        gate = self.gate()
        spatial = 0 if isinstance(self, nn.Linear) else len(self.kernel_size)
        return y * gate.view(-1, *[1] * spatial).to(y.dtype)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        saved, own = state_dict.get(prefix + "masks"), self.masks
        if saved is not None and saved.dim() == 2 and saved.shape[1:] == own.shape[1:]:
            own = torch.empty(saved.shape, dtype=own.dtype, device=own.device)
        # torch would take what fits and convert the rest; a layer with half its masks reserves the wrong weights
        like = {name: t for name, t in (*self._parameters.items(), *self._buffers.items()) if t is not None}
        if wrong := misfit(state_dict, {**like, "masks": own}, prefix, strict=args[1]):
            args[-1].append(wrong)
            return
        self.masks, self._free = own, None
        super()._load_from_state_dict(state_dict, prefix, *args)  # type: ignore[misc]

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, mask={self.mask}, tasks={self.tasks}"  # type: ignore[misc]


class MaskedLinear(MaskedLayer, nn.Linear):
    """:class:`torch.nn.Linear` with a mask; see :class:`MaskedLayer`.

    Example:
        >>> layer = MaskedLinear(784, 400, mask="unit", activation=torch.relu); layer.scale = 1.0
        >>> layer(torch.zeros(8, 784)).shape
        torch.Size([8, 400])
    """

    def forward(self, x: Tensor) -> Tensor:
        return self._gated(nn.functional.linear(x, self._effective_weight(), self.bias))


class _MaskedConv(MaskedLayer):
    def forward(self, x: Tensor) -> Tensor:
        return self._gated(self._conv_forward(x, self._effective_weight(), self.bias))  # type: ignore[attr-defined]


class MaskedConv1d(_MaskedConv, nn.Conv1d):
    """:class:`torch.nn.Conv1d` with a mask; see :class:`MaskedLayer`.

    Example:
        >>> MaskedConv1d(2, 4, 3, mask="unit")(torch.zeros(1, 2, 8)).shape
        torch.Size([1, 4, 6])
    """


class MaskedConv2d(_MaskedConv, nn.Conv2d):
    """:class:`torch.nn.Conv2d` with a mask; see :class:`MaskedLayer`.

    Example:
        >>> MaskedConv2d(2, 4, 3, mask="unit")(torch.zeros(1, 2, 8, 8)).shape
        torch.Size([1, 4, 6, 6])
    """


class MaskedConv3d(_MaskedConv, nn.Conv3d):
    """:class:`torch.nn.Conv3d` with a mask; see :class:`MaskedLayer`.

    Example:
        >>> MaskedConv3d(2, 4, 3)(torch.zeros(1, 2, 8, 8, 8)).shape
        torch.Size([1, 4, 6, 6, 6])
    """


class MaskedConvTranspose2d(_MaskedConv, nn.ConvTranspose2d):
    """:class:`torch.nn.ConvTranspose2d` with a mask; see :class:`MaskedLayer`. Units: dimension 1 of the weight.

    Example:
        >>> MaskedConvTranspose2d(2, 4, 3)(torch.zeros(1, 2, 8, 8)).shape
        torch.Size([1, 4, 10, 10])
    """

    def forward(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        padding = self._output_padding(
            x,
            output_size,
            self.stride,
            self.padding,
            self.kernel_size,
            2,
            self.dilation,  # type: ignore[arg-type]
        )
        y = nn.functional.conv_transpose2d(
            x, self._effective_weight(), self.bias, self.stride, self.padding, padding, self.groups, self.dilation
        )
        return self._gated(y)


MASKED: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: MaskedLinear,
    nn.Conv1d: MaskedConv1d,
    nn.Conv2d: MaskedConv2d,
    nn.Conv3d: MaskedConv3d,
    nn.ConvTranspose2d: MaskedConvTranspose2d,
}


def masked_layers(model: nn.Module) -> Iterator[tuple[str, MaskedLayer]]:
    """(name, layer) of every masked layer, in the model's order.

    Example:
        >>> [name for name, _ in masked_layers(nn.Sequential(nn.ReLU(), MaskedLinear(4, 2)))]
        ['1']
    """
    return ((name, m) for name, m in model.named_modules() if isinstance(m, MaskedLayer))


@contextmanager
def use_task(model: nn.Module, task: int | None) -> Iterator[None]:
    """Runs every masked layer on the mask recorded for `task` (None: on this task's own), and puts it back after.

    Raises:
        ValueError: a layer has no such mask; nothing has been changed then.

    Example:
        >>> with fastcl.nn.use_task(model, 0):
        ...     logits = model(x)
    """
    layers = [layer for _, layer in masked_layers(model)]
    if task is not None:
        for layer in layers:
            layer._index(task)
    before = [layer.task for layer in layers]
    try:
        for layer in layers:
            layer.task = task
        yield
    finally:
        for layer, old in zip(layers, before, strict=True):
            layer.task = old


def set_scale(model: nn.Module, scale: float) -> None:
    """The annealing scale s of every masked layer.

    Raises:
        ValueError: a scale that is negative or not finite.

    Example:
        >>> net = nn.Sequential(MaskedLinear(4, 2)); set_scale(net, 10.0); net[0].scale
        10.0
    """
    if not 0 <= scale < float("inf"):
        raise ValueError(f"scale is {scale} but must be finite and not negative")
    for _, layer in masked_layers(model):
        layer.scale = float(scale)


def begin_task(model: nn.Module) -> None:
    """``begin_task()`` of every masked layer.

    Example:
        >>> net = nn.Sequential(MaskedLinear(4, 2)); end_task(net); begin_task(net); net[0].task is None
        True
    """
    for _, layer in masked_layers(model):
        layer.begin_task()


def end_task(model: nn.Module) -> None:
    """``end_task()`` of every masked layer.

    Example:
        >>> net = nn.Sequential(MaskedLinear(4, 2)); end_task(net); net[0].tasks
        1
    """
    for _, layer in masked_layers(model):
        layer.end_task()


def sparsity(model: nn.Module) -> Tensor:
    """Eq. 5 over all masked layers, of their last forward pass in training: the share of free capacity in use.

    Raises:
        RuntimeError: weight masks without a forward pass under autograd.

    Example:
        >>> net = nn.Sequential(MaskedLinear(4, 2)); y = net(torch.zeros(1, 4)); sparsity(net).item()
        0.5
    """
    layers = [layer for _, layer in masked_layers(model)]
    units = [layer for layer in layers if layer.mask == "unit"]
    weights = [layer for layer in layers if layer.mask == "weight"]
    if any(layer.kept is None for layer in weights):
        raise RuntimeError("sparsity: run the model forward first, with gradients enabled and no recorded task")
    if not weights:
        return ops.mask_sparsity([layer.gate() for layer in units], [layer.reserved() for layer in units])
    free = sum(layer._free_share()[1] for layer in weights)
    used = sum(layer.kept for layer in weights)
    for layer in units:
        share = 1 - layer.reserved()
        used, free = used + (layer.gate() * share).sum(), free + float(share.sum())
    return used / free if free else used * 0
