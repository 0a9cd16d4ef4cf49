"""Strided convolutions with the batch last, [C, H, W, N], of the small maps that generative memories are made of.

Not in the catalogue: what :mod:`fastcl.nn` runs on a CPU where the library's convolutions of few channels are slow
(`pytest bench/bench_methods.py -k convolution`). A GPU has faster ones, and the layout of images is its own there.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
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
    if y.shape[1:3] == (1, 1) and padding == 0:  # every tap meets one place: a plain product
        return (y.flatten(0, 2) @ x.flatten(0, 2).t()).view(y.shape[0], x.shape[0], *size)
    return _Weight.apply(y, x, stride, padding, tuple(size))
