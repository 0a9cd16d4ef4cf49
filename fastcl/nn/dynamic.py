"""DGM's generator: one network, a mask for every task, and room that never runs out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import batch_last
from .convert import Reserved, reserved_masks
from .gan import crop, upsamplings
from .grow import grow
from .masked import MaskedConvTranspose2d, begin_task, end_task, set_scale, sparsity


def _transposed(x: Tensor, weight: Tensor, stride: int, padding: int) -> Tensor:
    return F.conv_transpose2d(x, weight, None, stride, padding)


class DynamicGenerator(nn.Module):
    r"""Dynamic generative memory (Ostapenko et al. 2019): masked transposed convolutions that grow from task to task.

    z has the class in its first coordinates (one-hot). Each map is :math:`ReLU(BN_t((m_t\circ W)^\top x))` (eq. 1) or,
    for unit masks, :math:`m_t\circ ReLU(BN_t(W^\top x))`; BatchNorm and the last, unmasked layer are the task's own; no
    biases. :meth:`generate` runs an ended task on its binary mask and on the slice of each weight that was there then:
    while the reserved weights stay (``MaskedAdam(..., reserved=self.reserved())``), its images stay to the bit.

    Args:
        input_shape: of an image, made in [0, 1].
        n_classes: of all tasks, at most `latent`.
        mask: ``weight`` (DGMw) or ``unit`` (DGMa).
        width: w: the maps have 4w, 2w, w channels at first; 6 in DGMw, 20 in DGMa.
        latent: D, 128 in the paper.
        s_max: the scale at which masks are recorded.
        mask_position: of unit masks: ``activation``, after it; ``pre_norm``, before BatchNorm, the authors' code: it
            hides soft masks from the loss, and a weight out of a channel that is off then counts as used.
        compensate: HAT's gradient of the embeddings.

    Raises:
        ValueError: an unknown `mask_position`, more classes than latent numbers.

    Example:
        >>> memory = fastcl.nn.DynamicGenerator((1, 28, 28), 10); memory.begin_task([3])
        >>> memory(memory.latents(torch.tensor([3, 3]))).shape
        torch.Size([2, 1, 28, 28])
    """

    def __init__(
        self,
        input_shape: Sequence[int],
        n_classes: int,
        mask: str = "weight",
        width: int = 6,
        latent: int = 128,
        s_max: float = 1e4,
        mask_position: str = "activation",
        compensate: bool = True,
    ) -> None:
        super().__init__()
        if mask_position not in ("activation", "pre_norm"):
            raise ValueError(f"mask_position is {mask_position!r} but must be activation or pre_norm")
        if not 1 <= n_classes <= latent:
            raise ValueError(f"n_classes is {n_classes} but must be from 1 to latent, {latent}")
        self.input_shape, self.n_classes, self.latent = tuple(input_shape), n_classes, latent
        self.mask, self.mask_position = mask, mask_position
        channels = [4 * width // 2**i for i in range(upsamplings(input_shape))]
        options: dict[str, Any] = {"mask": mask, "s_max": s_max, "compensate": compensate, "bias": False}
        self.layers = nn.ModuleList(
            MaskedConvTranspose2d(a, b, 4, 1 if i == 0 else 2, 0 if i == 0 else 1, **options)
            for i, (a, b) in enumerate(zip([latent, *channels], channels, strict=False))
        )
        self.norms = nn.ModuleList()  # of every task: a ModuleList of BatchNorms
        self.outputs = nn.ModuleList()  # of every task: the last layer
        self.classes: list[tuple[int, ...]] = []  # of every task begun
        self.sizes: list[list[int]] = []  # of every task begun: channels after each layer
        self.initial = self.channels

    @property
    def channels(self) -> list[int]:
        """After each masked layer, now."""
        return [layer.out_channels for layer in self.layers]

    def begin_task(self, classes: Sequence[int]) -> None:
        """New embeddings, all masks 0.5 (e = 0), BatchNorms and last layer for the given classes.

        Raises:
            ValueError: a class out of range or of an earlier task.
        """
        known = {c for task in self.classes for c in task}
        for c in classes:
            if not 0 <= c < self.n_classes or c in known:
                raise ValueError(f"classes has {c} but must be new and below {self.n_classes}")
        device = self.layers[0].weight.device
        begin_task(self)
        with torch.no_grad():
            for layer in self.layers:
                layer.embedding.zero_()
        self._add_task(self.channels, device)
        self.classes.append(tuple(classes))

    def _add_task(self, channels: list[int], device: torch.device) -> None:
        self.sizes.append(list(channels))
        self.norms.append(nn.ModuleList(nn.BatchNorm2d(c) for c in channels).to(device))
        last = nn.ConvTranspose2d(channels[-1], self.input_shape[0], 4, 2, 1, bias=False)
        self.outputs.append(last.to(device))

    def latents(self, y: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """z [N, D] with the one-hot classes y in its first coordinates."""
        z = torch.randn(len(y), self.latent, generator=generator).to(y.device)
        z[:, : self.n_classes] = F.one_hot(y, self.n_classes)
        return z

    def forward(self, z: Tensor) -> Tensor:
        """Images of the task that began last, on its annealed masks."""
        weights = [layer._effective_weight() for layer in self.layers]
        gates = [layer.gate() if self.mask == "unit" else None for layer in self.layers]
        return self._run(z, len(self.sizes) - 1, weights, gates)

    def _run(self, z: Tensor, task: int, weights: Sequence[Tensor], gates: Sequence[Tensor | None]) -> Tensor:
        last = batch_last.fits(self, z)
        x = z.t()[:, None, None, :] if last else z[:, :, None, None]
        convolved = batch_last.transposed if last else _transposed
        for i, (weight, gate) in enumerate(zip(weights, gates, strict=True)):
            x = convolved(x, weight, 1 if i == 0 else 2, 0 if i == 0 else 1)
            by_channel = None if gate is None else gate[:, None, None, None] if last else gate[:, None, None]
            if by_channel is not None and self.mask_position == "pre_norm":
                x = x * by_channel
            norm = self.norms[task][i]
            x = (batch_last.norm(norm, x) if last else norm(x)).relu()
            if by_channel is not None and self.mask_position == "activation":
                x = x * by_channel
        x = convolved(x, self.outputs[task].weight, 2, 1)
        x = crop((batch_last.to_images(x) if last else x).to(z.dtype), self.input_shape)
        return (x.tanh() + 1) / 2

    @torch.no_grad()
    def generate(self, y: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """An image of each class y [N], of ended tasks or the running one (as it would be recorded).

        Each image depends on its class and latent alone, computed 256 at a time in the order of tasks.

        Raises:
            ValueError: a class of no task.
        """
        task_of = {c: t for t, task in enumerate(self.classes) for c in task}
        unknown = sorted(set(y.tolist()) - set(task_of))
        if unknown:
            raise ValueError(f"y has the class {unknown[0]}, which no task has brought yet")
        y = y.to(self.layers[0].weight.device)
        z = self.latents(y, generator)
        images = z.new_empty(len(y), *self.input_shape)
        which = torch.tensor([task_of[c] for c in y.tolist()], device=y.device)
        training = self.training
        self.eval()
        try:
            for task in sorted(set(which.tolist())):
                weights, gates = self._recorded(task)
                for part in (which == task).nonzero().flatten().split(256):
                    images[part] = self._run(z[part], task, weights, gates)
        finally:
            self.train(training)
        return images

    def _recorded(self, task: int) -> tuple[list[Tensor], list[Tensor | None]]:
        """A task's slice of each weight under its binary mask, and its gates."""
        weights, gates = [], []
        before = self.latent
        for layer, size in zip(self.layers, self.sizes[task], strict=True):
            ended = task < layer.tasks
            weight = layer.weight[:before, :size]
            if self.mask == "weight":
                on = layer.unpacked(task) if ended else layer.embedding >= 0
                weights.append(torch.where(on[:before, :size], weight, 0).contiguous())
                gates.append(None)
            else:
                weights.append(weight.contiguous())
                gates.append((layer.unpacked(task) if ended else layer._now())[:size])
            before = size
        return weights, gates

    def set_scale(self, scale: float) -> None:
        """s of all masks."""
        set_scale(self, scale)

    def sparsity(self) -> Tensor:
        """Eq. 5, of the last forward pass."""
        return sparsity(self)

    def reserved(self) -> Reserved:
        """What ended tasks use, for :class:`fastcl.optim.MaskedAdam`."""
        found = reserved_masks(self)
        if self.mask_position == "pre_norm":  # a channel that is off still passes its BatchNorm's shift on
            for weight, (_, post) in list(found.items()) if self.mask == "unit" else ():
                found[weight] = (None, post)
        return found

    def end_task(self) -> list[int]:
        """Records the masks and grows each layer by what the task reserved, so that the free capacity stays.

        Weight masks: :math:`\\lceil\\delta/(n_{in}k^2)\\rceil` channels for the :math:`\\delta` weights newly reserved,
        less those that the layer gains from its wider input; unit masks: as many channels as were newly reserved.

        Returns:
            the channels added after each layer.
        """
        before = [self._used(layer) for layer in self.layers]
        end_task(self)
        added, inputs = [], 0
        for layer, used in zip(self.layers, before, strict=True):
            new = self._used(layer) - used
            if self.mask == "weight":
                n_in, n_out, *kernel = layer.weight.shape
                gained = inputs * n_out * math.prod(kernel)
                units = math.ceil(max(0, new - gained) / ((n_in + inputs) * math.prod(kernel)))
            else:
                units = new
            if units or inputs:
                grow(layer, units, inputs=inputs, outgoing="init")
            added.append(units)
            inputs = units
        return added

    @staticmethod
    def _used(layer: Any) -> int:
        """Weights or units that ended tasks use."""
        if not layer.tasks:
            return 0
        if layer.mask == "unit":
            return int((layer.reserved() >= 0.5).sum())
        return round(layer.weight.numel() - layer._free_share()[1])

    def shape_state(self) -> dict[str, Any]:
        """What :meth:`load_shape` needs to make room for a `state_dict`."""
        return {"classes": [list(c) for c in self.classes], "sizes": self.sizes, "channels": self.channels}

    def load_shape(self, state: dict[str, Any]) -> None:
        """Grows a generator that has seen no task to the shape of a saved one.

        Raises:
            ValueError: this one has seen tasks, or is larger.
        """
        if self.sizes or any(a > b for a, b in zip(self.channels, state["channels"], strict=True)):
            raise ValueError("load_shape: the generator must be new and not larger than the saved one")
        inputs = 0
        for layer, channels in zip(self.layers, state["channels"], strict=True):
            units = channels - layer.out_channels
            if units or inputs:
                grow(layer, units, inputs=inputs, outgoing="init")
            inputs = units
        device = self.layers[0].weight.device
        for sizes in state["sizes"]:
            self._add_task(sizes, device)
        self.classes = [tuple(c) for c in state["classes"]]
