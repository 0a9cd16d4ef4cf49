"""Parts of a network of Linear layers: what leads to an output, and what may be trained for it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


@torch.no_grad()
def reached_units(layers: Sequence[nn.Linear], outputs: list[int]) -> list[Tensor]:
    """From these outputs down, breadth first: the units from which a path of nonzero weights leads to them.

    DEN (Yoon et al. 2018, alg. 2). A layer of which nothing leads there counts as reached whole.

    Args:
        layers: one after the other; the last one's outputs are meant.

    Returns:
        bool [units] of every hidden layer.

    Example:
        >>> net = fastcl.nn.mlp((4,), (3,), 2)
        >>> _ = torch.nn.init.zeros_(net[-1].weight); net[-1].weight.data[1, 2] = 1.0
        >>> reached_units([net[1], net[-1]], [1])
        [tensor([False, False,  True])]
    """
    found: list[Tensor] = []
    above = layers[-1].weight[outputs]
    for layer in reversed(layers[:-1]):
        units = (above != 0).any(0)
        if not units.any():
            units[:] = True
        found.insert(0, units)
        above = layer.weight[units]
    return found


def entries_between(
    layers: Sequence[nn.Linear], rows: Sequence[Tensor], columns: Sequence[Tensor], outputs: list[int]
) -> list[Tensor]:
    """Weights into chosen units from chosen units, biases of the former, and these outputs from every unit.

    Args:
        layers: one after the other.
        rows, columns: bool [units] of every hidden layer.

    Returns:
        bool for every parameter of the layers, in their order.

    Example:
        >>> layers = [torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)]
        >>> entries_between(layers, [torch.tensor([True, False])], [torch.tensor([True, False])], [1])[2]
        tensor([[False, False],
                [ True,  True]])
    """
    device = layers[0].weight.device
    own = torch.zeros(layers[-1].out_features, dtype=torch.bool, device=device)
    own[outputs] = True
    into = [*(r.to(device) for r in rows), own]
    out = [torch.ones(layers[0].in_features, dtype=torch.bool, device=device), *(c.to(device) for c in columns)]
    out[-1] = torch.ones_like(out[-1])
    chosen: list[Tensor] = []
    for layer, row, column in zip(layers, into, out, strict=True):
        chosen.append(row.unsqueeze(1) & column.unsqueeze(0))
        if layer.bias is not None:
            chosen.append(row)
    return chosen
