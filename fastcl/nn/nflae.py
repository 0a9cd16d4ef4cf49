"""New feature learning autoencoders: filters that see what the old ones miss."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .grow import grow
from .plan import trace


class Learned(NamedTuple):
    """What one layer's autoencoder found: filters added, its mean squared error before and after."""

    layer: str
    added: int
    before: float
    after: float
    outliers: float  # share of the new samples that it reconstructs worse than nearly all old ones; nan if not asked


def learn_features(
    model: nn.Sequential,
    x: Tensor,
    layers: list[str],
    *,
    filters: int = 3,
    old: Tensor | None = None,
    rounds: int = 1,
    steps: int = 60,
    batch_size: int = 128,
    lr: float = 3e-3,
    quantile: float = 0.95,
    share: float = 0.1,
) -> list[Learned]:
    """Adds filters to a classifier, layer by layer, and trains them to reconstruct new data (CLN, NFLAE).

    For each layer: `filters` new ones; an autoencoder whose encoder is the layer (old and new filters) with its
    activation and whose decoder is a fresh transposed convolution; only the new filters and the decoder are trained,
    on the layer's own input from `x`. Old filters keep every bit, and what the classifier computes stays: old filters
    do not read new ones yet. New BatchNorm statistics are those of `x`.

    Args:
        model: convolutions with BatchNorm and an activation after each, in order, as :class:`SimpleNet`.
        x: new data [N, C, H, W].
        layers: names of the convolutions that grow, in order.
        old: old (synthesised) data. With `rounds` > 1 more filters are added while more than `share` of the new samples
            are outliers: reconstructed worse than the `quantile` of the old ones (Neurogenesis Deep Learning).
        rounds: at most so many times `filters`.
        steps, batch_size, lr: of each autoencoder's training.

    Returns:
        One :class:`Learned` for each layer and round.

    Example:
        >>> net = fastcl.nn.SimpleNet((1, 8, 8), 2, width=2)
        >>> learned = learn_features(net, torch.rand(8, 1, 8, 8), [next(iter(dict(net.named_children())))], steps=1)
        >>> learned[0]
        Learned(...)
    """
    found: list[Learned] = []
    plan = trace(model)
    modules = dict(model.named_children())
    training = model.training
    model.eval()
    try:
        for name in layers:
            conv = modules[name]
            decoder: nn.ConvTranspose2d | None = None
            for _ in range(rounds):
                before = conv.out_channels
                grow(model, {name: filters}, plan=plan)
                h = _inputs(model, x, name)
                if decoder is None:
                    decoder = _decoder(conv, h)
                else:
                    grow(decoder, 0, inputs=filters)
                first = _error(conv, decoder, h).mean().item()
                _train(conv, decoder, h, before, steps, batch_size, lr)
                errors = _error(conv, decoder, h)
                outliers = float("nan")
                if old is not None and rounds > 1:
                    limit = _error(conv, decoder, _inputs(model, old, name)).quantile(quantile)
                    outliers = (errors > limit).float().mean().item()
                _calibrate(model, plan[name], conv, h, before)
                found.append(Learned(name, filters, first, errors.mean().item(), outliers))
                if not outliers > share:
                    break
    finally:
        model.train(training)
    return found


@torch.no_grad()
def _inputs(model: nn.Sequential, x: Tensor, name: str) -> Tensor:
    below = [m for n, m in list(model.named_children())[: list(dict(model.named_children())).index(name)]]
    parts = []
    for part in x.split(1024):
        for module in below:
            part = module(part)
        parts.append(part)
    return torch.cat(parts)


def _decoder(conv: nn.Conv2d, h: Tensor) -> nn.ConvTranspose2d:
    made = nn.ConvTranspose2d(conv.out_channels, conv.in_channels, conv.kernel_size, padding=conv.padding)
    return made.to(h.device, h.dtype)


def _reconstructed(conv: nn.Conv2d, weight: Tensor, decoder: nn.Module, h: Tensor) -> Tensor:
    return decoder(F.leaky_relu(F.conv2d(h, weight, conv.bias, conv.stride, conv.padding), 0.1))


@torch.no_grad()
def _error(conv: nn.Conv2d, decoder: nn.Module, h: Tensor) -> Tensor:
    """Mean squared error of each sample."""
    parts = [(_reconstructed(conv, conv.weight, decoder, p) - p).square() for p in h.split(1024)]
    return torch.cat([part.flatten(1).mean(1) for part in parts])


def _train(conv: nn.Conv2d, decoder: nn.Module, h: Tensor, n_old: int, steps: int, batch_size: int, lr: float) -> None:
    old, new = conv.weight.detach()[:n_old], nn.Parameter(conv.weight.detach()[n_old:].clone())
    optimizer = torch.optim.Adam([new, *decoder.parameters()], lr)
    for _ in range(steps):
        part = h[torch.randint(len(h), (batch_size,)).to(h.device)]
        optimizer.zero_grad()
        F.mse_loss(_reconstructed(conv, torch.cat([old, new]), decoder, part), part).backward()
        optimizer.step()
    with torch.no_grad():
        conv.weight[n_old:] = new


@torch.no_grad()
def _calibrate(model: nn.Module, readers: tuple[str, ...], conv: nn.Conv2d, h: Tensor, n_old: int) -> None:
    """Statistics of the new filters' outputs for the BatchNorm that follows; the old ones' stay."""
    y = conv(h[:2048])[:, n_old:]
    for reader in readers:
        norm = model.get_submodule(reader)
        if isinstance(norm, nn.BatchNorm2d):
            norm.running_mean[n_old:] = y.mean((0, 2, 3))
            norm.running_var[n_old:] = y.var((0, 2, 3))
