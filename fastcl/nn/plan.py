"""Which layers read a layer's outputs: what must change with it when it grows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F

Plan = dict[str, tuple[str, ...]]

LAYERS = (
    nn.Linear,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
# Modules and functions that leave units apart: a unit of the output comes from the same unit of the input.
_APART = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish, nn.Sigmoid, nn.Tanh,
    nn.Softplus, nn.Hardtanh, nn.Hardswish, nn.Identity, nn.Flatten, nn.Upsample, nn.Dropout, nn.Dropout1d,
    nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout,
    *(getattr(nn, f"{kind}Pool{d}d") for kind in ("Max", "Avg", "AdaptiveAvg", "AdaptiveMax") for d in (1, 2, 3)),
)  # fmt: skip
_FUNCTIONS = {
    F.relu, F.leaky_relu, F.elu, F.gelu, F.silu, F.sigmoid, F.tanh, F.softplus, F.dropout, F.max_pool1d, F.max_pool2d,
    F.max_pool3d, F.avg_pool1d, F.avg_pool2d, F.avg_pool3d, F.adaptive_avg_pool2d, F.interpolate,
    torch.relu, torch.sigmoid, torch.tanh, torch.flatten,
}  # fmt: skip
_METHODS = {"relu", "sigmoid", "tanh", "flatten", "contiguous", "detach"}


class _Tracer(fx.Tracer):
    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return isinstance(module, (*LAYERS, *NORMS, *_APART)) or super().is_leaf_module(module, name)


def trace(model: nn.Module) -> Plan:
    """Follows every Linear and convolution through activations, pooling, dropout, BatchNorm and flatten, by torch.fx.

    Returns:
        layer name to the names of the layers and BatchNorms that read it. Layers whose outputs are added to others',
        concatenated, normalised over units or used twice in one forward are left out: they cannot grow alone.

    Raises:
        ValueError: a model that torch.fx cannot trace: give the plan by hand then.

    Example:
        >>> fastcl.nn.trace(fastcl.nn.mlp((4,), (8, 8), 2))
        {'1': ('3',), '3': ('5',), '5': ()}
    """
    try:
        graph = _Tracer().trace(model)
    except Exception as error:
        raise ValueError(
            f"torch.fx cannot trace {type(model).__name__} ({error}): give plan={{layer: (followers, ...)}} by hand"
        ) from error
    modules = dict(model.named_modules())
    calls = [str(node.target) for node in graph.nodes if node.op == "call_module"]
    plan: Plan = {}
    for node in graph.nodes:
        name = str(node.target)
        if node.op == "call_module" and isinstance(modules[name], LAYERS) and calls.count(name) == 1:
            try:
                plan[name] = tuple(dict.fromkeys(_readers(node, modules)))
            except _Mixed:
                continue
    return plan


class _Mixed(Exception):
    """Units meet other units before the next layer."""


def _readers(node: fx.Node, modules: dict[str, nn.Module]) -> Iterator[str]:
    for user in node.users:
        if user.op == "call_module":
            module = modules[str(user.target)]
            if isinstance(module, LAYERS):
                yield str(user.target)
                continue
            if isinstance(module, NORMS):
                yield str(user.target)
            elif not isinstance(module, _APART):
                raise _Mixed
        elif user.op == "output":
            continue
        elif not _apart(user):
            raise _Mixed
        yield from _readers(user, modules)


def _apart(node: fx.Node) -> bool:
    if node.op == "call_method":
        flat = node.target in ("view", "reshape") and len(node.args) == 3 and node.args[2] == -1
        return node.target in _METHODS or flat
    target: Any = node.target
    # F.max_pool2d is a dispatching wrapper of another name
    return node.op == "call_function" and (
        target in _FUNCTIONS or getattr(target, "__name__", "") == "boolean_dispatch"
    )
