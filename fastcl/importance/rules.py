"""How a layer's per-sample gradients follow from its input and its output's gradient; one rule a layer type.

Shapes: N samples, P positions or tokens, O outputs, I inputs, C channels. A layer called several times in one
forward pass has its positions side by side: the sum over calls comes before the power, as the chain rule wants.
"""

from __future__ import annotations

import math
from collections.abc import Callable
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
    edge: torch.autograd.graph.GradientEdge | None  # of the output; None once the batch is done
    grad: Tensor | None = None  # at the output

    def check_unchanged(self, names: dict[str, str]) -> None:
        if self.input._version != self.version:
            raise RuntimeError(
                f"the input of the layer of {sorted(names.values())} was overwritten in place after the layer read it: "
                "its importances would be wrong (an ordinary backward pass refuses this too)"
            )


class Rule(Protocol):
    """A layer type's rule."""

    def fits(self, module: nn.Module, calls: list[Call]) -> bool:
        """Whether the rule can treat these calls; their samples are known to be in dimension 0."""

    def accumulate(self, module: nn.Module, calls: list[Call], power: int, names: dict[str, str], sums: Sums) -> None:
        """Adds sum_n |sample n's gradient|^power of the parameters in `names` to `sums`."""


def features_last(t: Tensor, width: int) -> Tensor:
    """[N, ..., F] -> [N, P, F] where F spans the last dimensions, `width` numbers."""
    return t.reshape(t.shape[0], -1, width)


def features_second(t: Tensor) -> Tensor:
    """[N, C, ...] -> [N, P, C], a view wherever torch allows one."""
    return t.unsqueeze(1) if t.dim() == 2 else t.flatten(2).transpose(1, 2)


def side_by_side(parts: list[Tensor]) -> Tensor:
    """The positions of all calls."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


class LinearRule:
    """y = x W^T + b on [N, I] or [N, ..., I]."""

    def fits(self, module: nn.Module, calls: list[Call]) -> bool:
        return all(call.input.dim() >= 2 for call in calls)

    def accumulate(self, module: nn.Module, calls: list[Call], power: int, names: dict[str, str], sums: Sums) -> None:
        grad = side_by_side([features_last(call.grad, module.out_features) for call in calls])
        if "weight" in names:
            activation = side_by_side([features_last(call.input, module.in_features) for call in calls])
            activation = activation.to(grad.dtype)
            g, a = (grad, activation) if grad.shape[1] > 1 else (grad[:, 0], activation[:, 0])
            ops.accumulate_outer_(sums[names["weight"]], g, a, power)
        if "bias" in names:
            ops.accumulate_affine_(None, sums[names["bias"]], grad, None, power)


class ConvRule:
    """Convolutions with zero padding; a transposed one is the convolution from its output back to its input."""

    def __init__(self, *, transposed: bool) -> None:
        self.transposed = transposed

    def fits(self, module: nn.Module, calls: list[Call]) -> bool:
        return (
            len(calls) == 1  # the kernel has no place for the other calls' positions
            and module.padding_mode == "zeros"
            and calls[0].input.dim() == len(module.kernel_size) + 2
            and _symmetric(module)
        )

    def accumulate(self, module: nn.Module, calls: list[Call], power: int, names: dict[str, str], sums: Sums) -> None:
        grad = calls[0].grad
        if "bias" in names:
            ops.accumulate_affine_(None, sums[names["bias"]], features_second(grad), None, power)
        if "weight" in names:
            x = calls[0].input.to(grad.dtype)
            narrow, wide = (x, grad) if self.transposed else (grad, x)
            ops.accumulate_conv_(
                sums[names["weight"]],
                narrow,
                wide,
                module.stride,
                _padding(module),
                module.dilation,
                module.groups,
                power,
            )


def _padding(module: nn.Module) -> tuple[int, ...]:
    if module.padding == "valid":
        return (0,) * len(module.kernel_size)
    if module.padding == "same":
        return tuple(d * (k - 1) // 2 for d, k in zip(module.dilation, module.kernel_size, strict=True))
    return module.padding


def _symmetric(module: nn.Module) -> bool:
    """padding="same" pads one more on one side where d (k - 1) is odd; the kernel pads both sides alike."""
    spans = (d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True))
    return module.padding != "same" or all(span % 2 == 0 for span in spans)


class NormRule:
    """y = x_hat o w + b after a normalisation; `parts` gives x, shift and scale of x_hat = (x - shift) scale."""

    def __init__(self, parts: Callable[[nn.Module, Tensor], tuple[Tensor, Tensor, Tensor]]) -> None:
        self.parts = parts

    def fits(self, module: nn.Module, calls: list[Call]) -> bool:
        return all(call.input.dim() > len(getattr(module, "normalized_shape", (1,))) for call in calls)

    def accumulate(self, module: nn.Module, calls: list[Call], power: int, names: dict[str, str], sums: Sums) -> None:
        weight, bias = (sums[names[key]].view(-1) if key in names else None for key in ("weight", "bias"))
        total = weight if weight is not None else bias
        triples = [self.parts(module, call.input.to(total.dtype)) for call in calls]
        grads = [call.grad.to(total.dtype) for call in calls]
        if hasattr(module, "normalized_shape"):
            grads = [features_last(g, total.numel()) for g in grads]
        else:
            grads = [features_second(g) for g in grads]
        normalised = tuple(side_by_side([triple[k] for triple in triples]) for k in range(3))
        ops.accumulate_affine_(weight, bias, side_by_side(grads), None if weight is None else normalised, power)


def _batch_norm(module: nn.modules.batchnorm._BatchNorm, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    x = features_second(x)
    mean, var = module.running_mean.to(x.dtype), module.running_var.to(x.dtype)
    return x, mean.expand_as(x), torch.rsqrt(var + module.eps).expand_as(x)


def _group_norm(module: nn.GroupNorm, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    var, mean = torch.var_mean(x.reshape(x.shape[0], module.num_groups, -1), 2, correction=0)
    x = features_second(x)
    per_group = module.num_channels // module.num_groups
    shift, scale = (
        t.repeat_interleave(per_group, 1).unsqueeze(1).expand_as(x) for t in (mean, torch.rsqrt(var + module.eps))
    )
    return x, shift, scale


def _layer_norm(module: nn.LayerNorm, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    x = features_last(x, math.prod(module.normalized_shape))
    var, mean = torch.var_mean(x, 2, correction=0, keepdim=True)
    return x, mean.expand_as(x), torch.rsqrt(var + module.eps).expand_as(x)


def _rms_norm(module: nn.RMSNorm, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    eps = torch.finfo(x.dtype).eps if module.eps is None else module.eps
    x = features_last(x, math.prod(module.normalized_shape))
    scale = torch.rsqrt(x.square().mean(2, keepdim=True) + eps)
    return x, torch.zeros_like(scale).expand_as(x), scale.expand_as(x)


class EmbeddingRule:
    """A table looked up by tokens: a sample's repeated tokens are summed before the power."""

    def fits(self, module: nn.Module, calls: list[Call]) -> bool:
        return module.max_norm is None and not module.scale_grad_by_freq

    def accumulate(self, module: nn.Module, calls: list[Call], power: int, names: dict[str, str], sums: Sums) -> None:
        total = sums[names["weight"]]
        n = calls[0].input.shape[0]
        token = torch.cat([call.input.reshape(n, -1) for call in calls], 1)
        grad = side_by_side([features_last(call.grad, module.embedding_dim) for call in calls]).to(total.dtype)
        sample = torch.arange(n, device=token.device).unsqueeze(1)
        pair, position = torch.unique(sample * module.num_embeddings + token, return_inverse=True)
        per_sample = grad.new_zeros(len(pair), module.embedding_dim)
        per_sample.index_add_(0, position.flatten(), grad.flatten(0, 1))
        row = pair % module.num_embeddings
        if module.padding_idx is not None:
            per_sample[row == module.padding_idx] = 0
        total.index_add_(0, row, per_sample.square() if power == 2 else per_sample.abs())


_CONV, _TRANSPOSED, _BATCH_NORM = ConvRule(transposed=False), ConvRule(transposed=True), NormRule(_batch_norm)

RULES: dict[type[nn.Module], Rule] = {
    nn.Linear: LinearRule(),
    nn.Conv1d: _CONV,
    nn.Conv2d: _CONV,
    nn.Conv3d: _CONV,
    nn.ConvTranspose1d: _TRANSPOSED,
    nn.ConvTranspose2d: _TRANSPOSED,
    nn.ConvTranspose3d: _TRANSPOSED,
    nn.BatchNorm1d: _BATCH_NORM,
    nn.BatchNorm2d: _BATCH_NORM,
    nn.BatchNorm3d: _BATCH_NORM,
    nn.GroupNorm: NormRule(_group_norm),
    nn.LayerNorm: NormRule(_layer_norm),
    nn.RMSNorm: NormRule(_rms_norm),
    nn.Embedding: EmbeddingRule(),
}
