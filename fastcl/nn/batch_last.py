"""Networks of small convolutions with the batch as the last dimension, [C, H, W, N], on a CPU.

There a batch of 64 fills the vectors whatever the maps' size and channels, and the CPU library's slow cases (few
channels, the input gradient of a strided convolution, transposed convolutions) are gone. Same layers, same state.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..ops import _chwn
from ..ops._chwn import conv, conv_input

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def fits(module: nn.Module, x: Tensor) -> bool:
    """Whether `module` may run on x so: plain float32 or float64 on a CPU, and nobody watches its layers.

    Forward hooks (an importance pass), torch.compile, torch.func and autocast see the layers as they are.

    Example:
        >>> fits(nn.Conv2d(1, 2, 5), torch.ones(2, 1, 8, 8, device="meta"))
        False
    """
    return (
        _chwn.available
        and x.device.type == "cpu"
        and x.dtype in (torch.float32, torch.float64)
        and all(p.dtype == x.dtype for p in module.parameters())
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
        and not torch.nn.modules.module._has_any_global_hook()
        and not any(getattr(m, hooks) for m in module.modules() for hooks in HOOKS)
    )


def from_images(x: Tensor) -> Tensor:
    """[N, C, H, W] to [C, H, W, N]."""
    return x.permute(1, 2, 3, 0).contiguous()


def to_images(x: Tensor) -> Tensor:
    """[C, H, W, N] to [N, C, H, W], a view."""
    return x.permute(3, 0, 1, 2)


def norm(layer: nn.BatchNorm2d, x: Tensor) -> Tensor:
    """A BatchNorm of x [C, H, W, N], whose channels are rows."""
    rows = x.flatten(1)
    if not layer.training or not layer.track_running_stats or rows.shape[1] < 2:
        return layer(rows[None, :, :, None]).view(x.shape)
    y, mean, variance = _chwn.norm(rows, layer.weight, layer.bias, layer.eps)
    with torch.no_grad():
        layer.num_batches_tracked += 1
        momentum = 1 / int(layer.num_batches_tracked) if layer.momentum is None else layer.momentum
        if momentum:
            n = rows.shape[1]
            layer.running_mean.lerp_(mean, momentum)
            layer.running_var.lerp_(variance * (n / (n - 1)), momentum)
    return y.view(x.shape)


def transposed(x: Tensor, weight: Tensor, stride: int, padding: int) -> Tensor:
    """F.conv_transpose2d of x [C, H, W, N] with weight [C, O, h, w]."""
    size = (((n - 1) * stride - 2 * padding + k) for n, k in zip(x.shape[1:3], weight.shape[2:], strict=True))
    return conv_input(x, weight, stride, padding, tuple(size))


def run(layers: nn.Sequential, x: Tensor) -> Tensor:
    """Convolutions, BatchNorms and what is element-wise, of images [N, C, H, W]; nn.Flatten at the end.

    Example:
        >>> run(nn.Sequential(nn.Conv2d(1, 2, 5, 2, 2), nn.ReLU(), nn.Flatten()), torch.ones(3, 1, 8, 8)).shape
        torch.Size([3, 32])
    """
    x = from_images(x)
    for layer in layers:
        if isinstance(layer, nn.Conv2d):
            x = conv(x, layer.weight, layer.stride[0], layer.padding[0])
            if layer.bias is not None:
                x = x + layer.bias[:, None, None, None]
        elif isinstance(layer, nn.BatchNorm2d):
            x = norm(layer, x)
        elif isinstance(layer, nn.Flatten):
            x = x.flatten(0, 2).t()
        else:
            x = layer(x)
    return x
