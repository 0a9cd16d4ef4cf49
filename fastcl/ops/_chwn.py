"""Strided convolutions and BatchNorm with the batch last, [C, H, W, N], of the small maps of generative memories.

Not in the catalogue: what :mod:`fastcl.nn` runs on a CPU where the library's convolutions of few channels are slow
(`pytest bench/bench_methods.py -k convolution`). A GPU has faster ones, and the layout of images is its own there.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from .._ops import call, internal, pure_python

available = not pure_python  # without the kernels torch's own layout is the faster one


def _conv(x: Tensor, weight: Tensor, stride: int, padding: int) -> Tensor:
    return F.conv2d(x.permute(3, 0, 1, 2), weight, None, stride, padding).permute(1, 2, 3, 0).contiguous()


def _conv_input(y: Tensor, weight: Tensor, stride: int, padding: int, height: int, width: int) -> Tensor:
    size = (y.shape[3], weight.shape[1], height, width)
    x = torch.nn.grad.conv2d_input(size, weight, y.permute(3, 0, 1, 2), stride, padding)
    return x.permute(1, 2, 3, 0).contiguous()


def _conv_weight(y: Tensor, x: Tensor, stride: int, padding: int, height: int, width: int) -> Tensor:
    size = (y.shape[0], x.shape[0], height, width)
    x, y = x.permute(3, 0, 1, 2), y.permute(3, 0, 1, 2)
    return torch.nn.grad.conv2d_weight(x, size, y, stride, padding).contiguous()


_forward = internal("chwn_conv(Tensor x, Tensor weight, int stride, int padding) -> Tensor", _conv)
_input = internal(
    "chwn_conv_input(Tensor y, Tensor weight, int stride, int padding, int height, int width) -> Tensor", _conv_input
)
_weight = internal(
    "chwn_conv_weight(Tensor y, Tensor x, int stride, int padding, int height, int width) -> Tensor", _conv_weight
)


def _norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    variance, mean = torch.var_mean(x, 1, correction=0)
    r = (variance + eps).rsqrt()
    y = (x - mean.unsqueeze(1)) * r.unsqueeze(1)
    y = y if weight is None else y * weight.unsqueeze(1)
    return y if bias is None else y + bias.unsqueeze(1), mean, variance, r


def _projected(v: Tensor, z: Tensor) -> Tensor:
    """P(v): v without its mean and without its part along z."""
    return v - v.mean(1, keepdim=True) - z * (v * z).mean(1, keepdim=True)


def _norm_backward(
    g: Tensor, x: Tensor, weight: Tensor | None, mean: Tensor, r: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    z = (x - mean.unsqueeze(1)) * r.unsqueeze(1)
    scale = r if weight is None else r * weight
    return scale.unsqueeze(1) * _projected(g, z), (g * z).sum(1), g.sum(1)


def _norm_twice(
    h: Tensor, of_sum: Tensor, of_mean: Tensor, g: Tensor, x: Tensor, weight: Tensor | None, mean: Tensor, r: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    z, r, of_sum = (x - mean.unsqueeze(1)) * r.unsqueeze(1), r.unsqueeze(1), of_sum.unsqueeze(1)
    scale, p, of_h = r if weight is None else r * weight.unsqueeze(1), _projected(g, z), _projected(h, z)
    common, m, a = ((v * w).mean(1, keepdim=True) for v, w in ((h, p), (g, z), (h, z)))
    of_x = r * (of_sum * p - scale * (z * common + m * of_h + a * p))
    return scale * of_h + z * of_sum + of_mean.unsqueeze(1), of_x, (h * p).sum(1) * r.squeeze(1)


_norm_op = internal(
    "chwn_norm(Tensor x, Tensor? weight, Tensor? bias, float eps) -> (Tensor, Tensor, Tensor, Tensor)", _norm
)
_norm_backward_op = internal(
    "chwn_norm_backward(Tensor g, Tensor x, Tensor? weight, Tensor mean, Tensor r) -> (Tensor, Tensor, Tensor)",
    _norm_backward,
)
_norm_twice_op = internal(
    "chwn_norm_twice(Tensor h, Tensor of_sum, Tensor of_mean, Tensor g, Tensor x, Tensor? weight, Tensor mean, "
    "Tensor r) -> (Tensor, Tensor, Tensor)",
    _norm_twice,
)


class _Conv(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, stride: int, padding: int) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.numbers = stride, padding
        return call(_forward, x, weight, stride, padding)

    @staticmethod
    def backward(ctx: Any, y: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        of_x = conv_input(y, weight, *ctx.numbers, x.shape[1:3]) if ctx.needs_input_grad[0] else None
        of_weight = conv_weight(y, x, *ctx.numbers, weight.shape[2:]) if ctx.needs_input_grad[1] else None
        return of_x, of_weight, None, None


class _Input(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, weight: Tensor, stride: int, padding: int, size: tuple[int, int]) -> Tensor:
        ctx.save_for_backward(y, weight)
        ctx.numbers = stride, padding
        return call(_input, y, weight, stride, padding, *size)

    @staticmethod
    def backward(ctx: Any, x: Tensor) -> tuple[Tensor | None, ...]:
        y, weight = ctx.saved_tensors
        of_y = conv(x, weight, *ctx.numbers) if ctx.needs_input_grad[0] else None
        of_weight = conv_weight(y, x, *ctx.numbers, weight.shape[2:]) if ctx.needs_input_grad[1] else None
        return of_y, of_weight, None, None, None


class _Weight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, stride: int, padding: int, size: tuple[int, int]) -> Tensor:
        ctx.save_for_backward(y, x)
        ctx.numbers = stride, padding
        return call(_weight, y, x, stride, padding, *size)

    @staticmethod
    def backward(ctx: Any, weight: Tensor) -> tuple[Tensor | None, ...]:
        y, x = ctx.saved_tensors
        of_y = conv(x, weight, *ctx.numbers) if ctx.needs_input_grad[0] else None
        of_x = conv_input(y, weight, *ctx.numbers, x.shape[1:3]) if ctx.needs_input_grad[1] else None
        return of_y, of_x, None, None, None


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        y, mean, variance, r = call(_norm_op, x, weight, bias, eps)
        ctx.save_for_backward(x, weight, mean, r)
        ctx.mark_non_differentiable(mean, variance)
        ctx.set_materialize_grads(False)
        return y, mean, variance

    @staticmethod
    def backward(ctx: Any, g: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if g is None:
            return None, None, None, None
        of_x, *others = _NormBackward.apply(g, *ctx.saved_tensors)
        return of_x, *(t if wanted else None for t, wanted in zip(others, ctx.needs_input_grad[1:3], strict=True)), None


class _NormBackward(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, g: Tensor, x: Tensor, weight: Tensor | None, mean: Tensor, r: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(g, x, weight, mean, r)
        return call(_norm_backward_op, g, x, weight, mean, r)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, h: Tensor, of_sum: Tensor, of_mean: Tensor) -> tuple[Tensor | None, ...]:
        weight = ctx.saved_tensors[2]
        of_g, of_x, of_weight = call(_norm_twice_op, h, of_sum, of_mean, *ctx.saved_tensors)
        return of_g, of_x, None if weight is None else of_weight, None, None


def norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """The BatchNorm of rows x [C, L]: y [C, L], and the rows' means and (biased) variances [C]. Differentiable twice.

    Example:
        >>> from fastcl.ops._chwn import norm
        >>> norm(torch.tensor([[1.0, 3.0]]), None, None, 0.0)[0]
        tensor([[-1.,  1.]])
    """
    return _Norm.apply(x, weight, bias, eps)


def conv(x: Tensor, weight: Tensor, stride: int, padding: int) -> Tensor:
    """The convolution of x [C, H, W, N] with weight [O, C, h, w]: y [O, H', W', N]. Differentiable any number of times.

    Raises:
        ValueError: shapes that do not fit, or a dtype that is neither float32 nor float64.

    Example:
        >>> from fastcl.ops._chwn import conv
        >>> conv(torch.ones(1, 4, 4, 2), torch.ones(3, 1, 5, 5), 2, 2).shape
        torch.Size([3, 2, 2, 2])
    """
    return _Conv.apply(x, weight, stride, padding)


def conv_input(y: Tensor, weight: Tensor, stride: int, padding: int, size: tuple[int, int]) -> Tensor:
    """Its transpose, x [C, *size, N] from y [O, H', W', N]: the gradient of x, or a transposed convolution from O to C.

    Example:
        >>> from fastcl.ops._chwn import conv_input
        >>> conv_input(torch.ones(3, 2, 2, 5), torch.ones(3, 1, 4, 4), 2, 1, (4, 4)).shape
        torch.Size([1, 4, 4, 5])
    """
    return _Input.apply(y, weight, stride, padding, tuple(size))


def conv_weight(y: Tensor, x: Tensor, stride: int, padding: int, size: tuple[int, int]) -> Tensor:
    """The gradient of the weight, [O, C, *size], for y [O, H', W', N] and x [C, H, W, N].

    Example:
        >>> from fastcl.ops._chwn import conv_weight
        >>> conv_weight(torch.ones(3, 2, 2, 5), torch.ones(1, 4, 4, 5), 2, 1, (4, 4)).shape
        torch.Size([3, 1, 4, 4])
    """
    # every tap meets one place, and every place of x a tap: a plain product
    if y.shape[1:3] == (1, 1) and x.shape[1:3] == tuple(size) and padding == 0:
        return (y.flatten(0, 2) @ x.flatten(0, 2).t()).view(y.shape[0], x.shape[0], *size)
    return _Weight.apply(y, x, stride, padding, tuple(size))
