"""The classifier of continual learning with neurogenesis."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from torch import nn

KERNELS = (3,) * 10 + (1, 1, 3)  # SimpleNet's 13 convolutions
GROUPS = (2, 3, 3)  # convolutions before each 2x2 pooling; the other five follow the last


class SimpleNet(nn.Sequential):
    """13 convolutions with BatchNorm and LeakyReLU, 2x2 pooling between groups, one Linear (Hasanpour et al. 2016).

    The classifier of CLN (Draelos et al. 2017). Layers are named conv1, norm1, act1, ..., pool1, ..., head.

    Args:
        input_shape: (channels, height, width), at least 8 x 8.
        n_outputs: of the head.
        width: filters of each convolution, or one number for each of the 13.

    Raises:
        ValueError: a width below 1, images of less than 8 x 8.

    Example:
        >>> fastcl.nn.SimpleNet((1, 28, 28), 2, width=4)(torch.zeros(1, 1, 28, 28)).shape
        torch.Size([1, 2])
    """

    def __init__(self, input_shape: Sequence[int], n_outputs: int, width: int | Sequence[int] = 12) -> None:
        channels, height, size = input_shape
        widths = [width] * len(KERNELS) if isinstance(width, int) else list(width)
        if len(widths) != len(KERNELS) or min(widths) < 1:
            raise ValueError(f"width is {width} but must be a positive number, or {len(KERNELS)} of them")
        if min(height, size) < 8:
            raise ValueError(f"input_shape is {tuple(input_shape)} but must be at least 8 x 8")
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        before, left = channels, list(GROUPS)
        for i, (filters, kernel) in enumerate(zip(widths, KERNELS, strict=True), 1):
            layers[f"conv{i}"] = nn.Conv2d(before, filters, kernel, padding=kernel // 2, bias=False)
            layers[f"norm{i}"] = nn.BatchNorm2d(filters)
            layers[f"act{i}"] = nn.LeakyReLU(0.1)
            before = filters
            if left and i == sum(GROUPS[: len(GROUPS) - len(left) + 1]):
                layers[f"pool{len(GROUPS) - len(left) + 1}"] = nn.MaxPool2d(2)
                height, size = height // 2, size // 2
                left.pop(0)
        layers["flatten"] = nn.Flatten()
        layers["head"] = nn.Linear(before * height * size, n_outputs)
        super().__init__(layers)
        self.image_size = tuple(input_shape[1:])

    def trunk(self, pools: int | None = None) -> nn.Sequential:
        """All but the head, or what ends with so many poolings, flattened: the same modules.

        Raises:
            ValueError: pools that are not from 1 to 3.
        """
        if pools is not None and not 1 <= pools <= len(GROUPS):
            raise ValueError(f"pools is {pools} but must be from 1 to {len(GROUPS)}, or None")
        children = list(self.named_children())[:-1]
        if pools is None:
            return nn.Sequential(OrderedDict(children))
        end = [name for name, _ in children].index(f"pool{pools}") + 1
        return nn.Sequential(OrderedDict([*children[:end], children[-1]]))

    def features(self, pools: int | None = None) -> int:
        """Width of what :meth:`trunk` gives."""
        if pools is None:
            return self.head.in_features
        height, width = (side // 2**pools for side in self.image_size)
        return self.get_submodule(f"conv{sum(GROUPS[:pools])}").out_channels * height * width

    def convolutions(self) -> list[str]:
        """Names of the 13, which grow."""
        return [f"conv{i}" for i in range(1, len(KERNELS) + 1)]
