"""What importances are, in the slowest and plainest form: a float64 loop of batch-1 backward passes."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn


def per_sample(model: nn.Module, x: Tensor, cotangent: Tensor, power: int) -> dict[str, Tensor]:
    """sum_n |d (output[n] . V[n]) / d theta|^power in eval mode; nothing of `model` is touched."""
    model = copy.deepcopy(model).double().eval()
    params = {name: p for name, p in model.named_parameters() if p.requires_grad}
    sums = {name: torch.zeros_like(p) for name, p in params.items()}
    for n in range(len(x)):
        sample = x[n : n + 1]
        output = model(sample.double() if sample.is_floating_point() else sample)
        grads = torch.autograd.grad(
            (output * cotangent[n : n + 1].double()).sum(),
            list(params.values()),
            allow_unused=True,
            materialize_grads=True,
        )
        for name, g in zip(params, grads, strict=True):
            sums[name] += g.abs() ** power
    return sums


def probabilities(model: nn.Module, x: Tensor, columns: list[int] | None = None) -> Tensor:
    """Softmax of the eval-mode logits in float64, over `columns` only (zero elsewhere)."""
    model = copy.deepcopy(model).double().eval()
    with torch.no_grad():
        logits = model(x.double() if x.is_floating_point() else x)
    chosen = list(range(logits.shape[1])) if columns is None else columns
    p = torch.zeros_like(logits)
    p[:, chosen] = torch.softmax(logits[:, chosen], 1)
    return p


def empirical_fisher(model: nn.Module, x: Tensor, y: Tensor, columns: list[int] | None = None) -> dict[str, Tensor]:
    v = probabilities(model, x, columns)
    v[torch.arange(len(y)), y] -= 1
    return {name: total / len(x) for name, total in per_sample(model, x, v, 2).items()}


def exact_fisher(model: nn.Module, x: Tensor, columns: list[int] | None = None) -> dict[str, Tensor]:
    p = probabilities(model, x, columns)
    total: dict[str, Tensor] = {}
    for c in columns if columns is not None else range(p.shape[1]):
        v = -p.clone()
        v[:, c] += 1
        for name, part in per_sample(model, x, v * p[:, c : c + 1].sqrt(), 2).items():
            total[name] = total.get(name, 0) + part / len(x)
    return total


def worst_relative_error(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Over parameters: largest absolute error, relative to that parameter's largest importance."""
    assert found.keys() == expected.keys()
    worst = 0.0
    for name, want in expected.items():
        assert found[name].shape == want.shape, name
        error = (found[name].double() - want).abs().max().item()
        scale = want.abs().max().item()
        worst = max(worst, error / scale if scale > 0 else error)
    return worst
