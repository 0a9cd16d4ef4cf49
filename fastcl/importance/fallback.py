"""Per-sample gradients by torch.func, for whatever has no rule: exact, in chunks, slower; says so once."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from .rules import Sums

CHUNK_BYTES = 64 << 20  # per-sample gradients held at a time; more did not run faster on ResNet-18
_named: set[tuple[str, ...]] = set()


class FallbackWarning(UserWarning):
    """A module has no fused rule; its importances are exact but slower."""


def accumulate_by_vmap(
    model: nn.Module,
    x: Any,
    params: dict[str, Tensor],
    output: Tensor,
    cotangents: Callable[[Tensor], Iterator[Tensor]],
    power: int,
    sums: Sums,
) -> None:
    """Adds sum_n |gradient of sample n|^power of `params` to `sums`, sample n's loss being (output[n] * V[n]).sum()."""
    _say_once(model, params)
    as_dict = x if isinstance(x, dict) else dict(enumerate(x if isinstance(x, (tuple, list)) else (x,)))
    tensors = {key: value for key, value in as_dict.items() if isinstance(value, Tensor)}
    constants = {key: value for key, value in as_dict.items() if not isinstance(value, Tensor)}

    def loss(values: dict[str, Tensor], sample: dict[Any, Tensor], cotangent: Tensor) -> Tensor:
        inputs = {**constants, **{key: value.unsqueeze(0) for key, value in sample.items()}}
        args, kwargs = ((), inputs) if isinstance(x, dict) else (tuple(inputs[k] for k in sorted(inputs)), {})
        return (functional_call(model, values, args, kwargs)[0] * cotangent).sum()

    values = {name: p.detach() for name, p in params.items()}
    bytes_per_sample = sum(p.numel() * sums[name].element_size() for name, p in params.items())
    chunk = max(1, CHUNK_BYTES // max(1, bytes_per_sample))
    per_sample = vmap(grad(loss), in_dims=(None, 0, 0), randomness="error")
    # nn.MultiheadAttention's and nn.TransformerEncoderLayer's inference kernels have no derivative to vmap over
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        for cotangent in cotangents(output):
            cotangent = cotangent.to(output.dtype)
            for begin in range(0, output.shape[0], chunk):
                part = {key: value[begin : begin + chunk] for key, value in tensors.items()}
                grads = _vmap_or_loop(per_sample, loss, values, part, cotangent[begin : begin + chunk])
                for name, g in grads.items():
                    g = g.to(sums[name].dtype)
                    sums[name] += (g.square() if power == 2 else g.abs()).sum(0)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)


def _vmap_or_loop(
    per_sample: Callable[..., dict[str, Tensor]],
    loss: Callable[..., Tensor],
    values: dict[str, Tensor],
    samples: dict[Any, Tensor],
    cotangent: Tensor,
) -> dict[str, Tensor]:
    """vmap where the model allows it; else (nn.LSTM, data-dependent branches) sample by sample, as exactly."""
    try:
        with warnings.catch_warnings():  # some attention kernels have no batching rule: slower, and no news here
            warnings.filterwarnings("ignore", "There is a performance drop")
            return per_sample(values, samples, cotangent)
    except RuntimeError as error:
        reason = str(error).split("\n", 1)[0]
    rows = []
    leaves = {name: value.requires_grad_() for name, value in values.items()}
    for n in range(cotangent.shape[0]):
        with torch.enable_grad():
            value = loss(leaves, {key: t[n] for key, t in samples.items()}, cotangent[n])
        grads = torch.autograd.grad(value, list(leaves.values()), allow_unused=True, materialize_grads=True)
        rows.append(grads)
    key = ("loop", *values)
    if key not in _named:
        _named.add(key)
        warnings.warn(
            f"fastcl: torch.func cannot map over this model ({reason}); going sample by sample",
            FallbackWarning,
            stacklevel=2,
        )
    return {name: torch.stack([row[i] for row in rows]) for i, name in enumerate(leaves)}


def _say_once(model: nn.Module, params: dict[str, Tensor]) -> None:
    modules = dict(model.named_modules())
    owners = sorted({name.rpartition(".")[0] for name in params})
    key = (type(model).__name__, *sorted(params))
    if key in _named:
        return
    _named.add(key)
    said = ", ".join(f"{owner or 'the model'} ({type(modules[owner]).__name__})" for owner in owners)
    warnings.warn(
        f"fastcl: no fused rule for the parameters of {said} as they are used here; "
        "their importances come from torch.func, exact but slower",
        FallbackWarning,
        stacklevel=4,
    )
