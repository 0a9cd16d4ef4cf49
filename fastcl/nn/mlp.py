"""The networks that the literature's small benchmarks use."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

from torch import nn


def mlp(input_shape: Sequence[int], hidden: Sequence[int], n_outputs: int) -> nn.Sequential:
    """Flatten, then Linear and ReLU for every width in `hidden`, then Linear: van de Ven's and Hsu's MLP.

    Example:
        >>> mlp((1, 28, 28), (400, 400), 10)[-1].out_features
        10
    """
    sizes = [math.prod(input_shape), *hidden]
    layers: list[nn.Module] = [nn.Flatten()]
    for a, b in pairwise(sizes):
        layers += [nn.Linear(a, b), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(sizes[-1], n_outputs))
