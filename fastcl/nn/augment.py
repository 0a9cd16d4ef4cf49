"""Images, each moved a little in a way of its own."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F


def jitter(x: Tensor, degrees: float = 10.0, shift: float = 0.07, scale: float = 0.1) -> Tensor:
    r"""Images turned, shifted and scaled at random, each on its own; what comes in from outside is 0.

    For a classifier that learns from generated images and is not to learn their faults (:class:`fastcl.methods.DGM`,
    :class:`fastcl.methods.CLN`).

    Args:
        x: images [N, C, H, W], floating-point.
        degrees: turned by up to so many, either way.
        shift: moved by up to this share of the width and of the height, either way.
        scale: made smaller or larger by up to this share. Uniform draws of the global generator of the CPU, all three.

    Returns:
        New images of the same shape, dtype and device, by bilinear interpolation; differentiable in x.

    Raises:
        ValueError: x has not four dimensions or no float dtype; a negative number, or a scale that is not below 1.

    Example:
        >>> moved = jitter(torch.rand(8, 1, 28, 28)); moved.shape
        torch.Size([8, 1, 28, 28])
    """
    if x.dim() != 4 or not x.is_floating_point():
        raise ValueError(f"x is {x.dtype} {list(x.shape)} but must be floating-point images [N, C, H, W]")
    for name, value, limit in (("degrees", degrees, math.inf), ("shift", shift, math.inf), ("scale", scale, 1.0)):
        if not 0 <= value < limit:
            raise ValueError(f"{name} is {value} but must be at least 0 and below {limit}")
    if not len(x):  # torch's grids do not exist for no image
        return x.clone()
    angle, zoom, right, down = (2 * torch.rand(4, len(x)) - 1).unbind()
    angle, zoom = angle * math.radians(degrees), 1 + zoom * scale
    cos, sin = angle.cos() / zoom, angle.sin() / zoom
    # of the grid, whose coordinates run from -1 to 1
    rows = [torch.stack([cos, -sin, 2 * shift * right], 1), torch.stack([sin, cos, 2 * shift * down], 1)]
    matrix = torch.stack(rows, 1).to(x.device, x.dtype)
    return F.grid_sample(x, F.affine_grid(matrix, list(x.shape), align_corners=False), align_corners=False)
