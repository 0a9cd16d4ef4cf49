"""How a layer's per-sample gradients follow from its input and its output's gradient; one rule a layer type.

Shapes: N samples, P positions or tokens, O outputs, I inputs, C channels. A layer called several times in one
forward pass has its positions side by side: the sum over calls comes before the power, as the chain rule wants.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from .. import ops

Sums = dict[str, Tensor]


@dataclass(eq=False)
class Call:
    """One call of a layer."""

    input: Tensor | None
    version: int  # of the input, when the layer saw it
    input_requires_grad: bool
    edge: torch.autograd.graph.GradientEdge  # of the output
    grad: Tensor | None = None  # at the output

    def check_unchanged(self, names: dict[str, str]) -> None:
        if self.input._version != self.version:
            raise RuntimeError(
                f"the input of the layer of {sorted(names.values())} was overwritten in place after the layer read it: "
                "its importances would be wrong (an ordinary backward pass refuses this too)"
            )


class Rule(Protocol):
    """A layer type's rule."""

    def fits(self, module: nn.Module, call: Call) -> bool:
        """Whether the rule can treat this call; its samples are known to be in dimension 0."""

    def accumulate(self, module: nn.Module, calls: list[Call], power: int, names: dict[str, str], sums: Sums) -> None:
        """Adds sum_n |sample n's gradient|^power of the parameters in `names` to `sums`."""


def raised(per_sample: Tensor, power: int) -> Tensor:
    """sum_n |t[n]|^power of [N, ...]."""
    return (per_sample.square() if power == 2 else per_sample.abs()).sum(0)


def positions(tensors: list[Tensor]) -> Tensor:
    """[N, ..., F] of each call -> [N, F], or [N, P, F] with all positions of all calls."""
    if len(tensors) == 1 and tensors[0].dim() == 2:
        return tensors[0]
    flat = [t.reshape(t.shape[0], -1, t.shape[-1]) for t in tensors]
    return flat[0] if len(flat) == 1 else torch.cat(flat, 1)


class LinearRule:
    """y = x W^T + b on [N, I] or [N, ..., I]."""

    def fits(self, module: nn.Module, call: Call) -> bool:
        return call.input.dim() >= 2

    def accumulate(self, module: nn.Module, calls: list[Call], power: int, names: dict[str, str], sums: Sums) -> None:
        grad = positions([call.grad for call in calls])
        if "weight" in names:
            activation = positions([call.input for call in calls]).to(grad.dtype)
            ops.accumulate_outer_(sums[names["weight"]], grad, activation, power)
        if "bias" in names:
            bias = sums[names["bias"]]
            grad = grad.to(bias.dtype)
            bias += raised(grad if grad.dim() == 2 else grad.sum(1), power)


class AffineRule:
    """y = x_hat o w + b after a normalisation whose statistics do not depend on the parameters."""

    def __init__(self, feature_dim: int | None, normalise: object) -> None:
        self.feature_dim = feature_dim  # where the parameter's axis lies; None: the module's last dimensions
        self.normalise = normalise

    def fits(self, module: nn.Module, call: Call) -> bool:
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and (module.training or module.running_mean is None):
            return False  # statistics of the batch couple the samples
        return call.input.dim() >= 2

    def accumulate(self, module: nn.Module, calls: list[Call], power: int, names: dict[str, str], sums: Sums) -> None:
        weight, bias = 0, 0
        for call in calls:
            name = next(iter(names.values()))
            grad = call.grad.to(sums[name].dtype)
            shape = sums[name].shape
            # everything that is neither a sample nor the parameter's own axis is a position
            axes = range(1, grad.dim() - len(shape)) if self.feature_dim is None else range(2, grad.dim())
            if "weight" in names:
                weight = weight + _sum(grad * self.normalise(module, call.input.to(grad.dtype)), axes)
            if "bias" in names:
                bias = bias + _sum(grad, axes)
        if "weight" in names:
            sums[names["weight"]] += raised(weight, power)
        if "bias" in names:
            sums[names["bias"]] += raised(bias, power)


def _sum(t: Tensor, axes: range) -> Tensor:
    return t.sum(tuple(axes)) if len(axes) else t


def _batch_norm(module: nn.modules.batchnorm._BatchNorm, x: Tensor) -> Tensor:
    shape = (1, -1, *([1] * (x.dim() - 2)))
    mean, var = module.running_mean.to(x.dtype), module.running_var.to(x.dtype)
    return (x - mean.view(shape)) * torch.rsqrt(var + module.eps).view(shape)


def _layer_norm(module: nn.LayerNorm, x: Tensor) -> Tensor:
    return nn.functional.layer_norm(x, module.normalized_shape, eps=module.eps)


def _rms_norm(module: nn.RMSNorm, x: Tensor) -> Tensor:
    return nn.functional.rms_norm(x, module.normalized_shape, eps=module.eps)


def _group_norm(module: nn.GroupNorm, x: Tensor) -> Tensor:
    return nn.functional.group_norm(x, module.num_groups, eps=module.eps)


_BATCH_NORM = AffineRule(1, _batch_norm)

RULES: dict[type[nn.Module], Rule] = {
    nn.Linear: LinearRule(),
    nn.BatchNorm1d: _BATCH_NORM,
    nn.BatchNorm2d: _BATCH_NORM,
    nn.BatchNorm3d: _BATCH_NORM,
    nn.LayerNorm: AffineRule(None, _layer_norm),
    nn.RMSNorm: AffineRule(None, _rms_norm),
    nn.GroupNorm: AffineRule(1, _group_norm),
}
