"""From plain modules to masked ones and back, masks for an optimizer, and what the tasks use."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from .masked import MASKED, MaskedLayer, masked_layers

Reserved = dict[Tensor, Any]


def to_masked(module: nn.Module, *, skip: Collection[str] = (), **options: Any) -> nn.Module:
    """A plain layer, or every Linear, Conv1d-3d and ConvTranspose2d of a model, as masked on the same parameters.

    Args:
        module: changed in place where it has children; a bare layer comes back as a new object.
        skip: names of layers to leave as they are (heads).
        options: ``mask``, ``activation``, ``s_max``, ``binary``, ``compensate`` of :class:`MaskedLayer`.

    Raises:
        ValueError: a bare module of another kind; a name in `skip` that does not exist.

    Example:
        >>> model = fastcl.nn.to_masked(fastcl.nn.mlp((784,), (400,), 10), mask="weight", skip=["3"])
    """
    if type(module) in MASKED:
        return _masked_like(module, options)
    names = {name for name, _ in module.named_modules()}
    if set(skip) - names:
        raise ValueError(f"skip has {sorted(set(skip) - names)} but the model has no such layers")
    if not any(type(m) in MASKED for m in module.modules()):
        raise ValueError(f"to_masked: {type(module).__name__} has no layer that can be masked")
    for name, parent in list(module.named_modules()):
        for child_name, child in list(parent.named_children()):
            full = f"{name}.{child_name}" if name else child_name
            if type(child) in MASKED and full not in skip:
                setattr(parent, child_name, _masked_like(child, options))
    return module


def to_plain(module: nn.Module, task: int | None = None) -> nn.Module:
    """A masked layer, or every one of a model, as torch's own: the mask of `task` multiplied into copied weights.

    For unit masks the rows (and biases) of the layer are scaled, which is exact without an activation or with ReLU.
    `task` None: the mask as it would be recorded now.

    Raises:
        ValueError: no such task; a unit mask after another activation than ReLU.

    Example:
        >>> to_plain(nn.Sequential(fastcl.nn.MaskedLinear(4, 2)))
        Sequential(
          (0): Linear(in_features=4, out_features=2, bias=True)
        )
    """
    if isinstance(module, MaskedLayer):
        return _plain_like(module, task)
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, MaskedLayer):
                setattr(parent, name, _plain_like(child, task))
    return module


def _arguments(layer: nn.Module) -> tuple[tuple[Any, ...], dict[str, Any]]:
    common = {"bias": layer.bias is not None, "device": "meta", "dtype": layer.weight.dtype}
    if isinstance(layer, nn.Linear):
        return (layer.in_features, layer.out_features), common
    names = ("stride", "padding", "dilation", "groups", "padding_mode")
    options = {name: getattr(layer, name) for name in names}
    if isinstance(layer, nn.ConvTranspose2d):
        options["output_padding"] = layer.output_padding
    return (layer.in_channels, layer.out_channels, layer.kernel_size), {**options, **common}


def _masked_like(layer: nn.Module, options: dict[str, Any]) -> nn.Module:
    args, kwargs = _arguments(layer)
    kwargs["device"] = layer.weight.device
    made = MASKED[type(layer)](*args, **kwargs, **options)
    made.weight, made.bias = layer.weight, layer.bias
    return made.train(layer.training)


def _plain_like(layer: Any, task: int | None) -> nn.Module:
    kind = next(plain for plain, masked in MASKED.items() if type(layer) is masked)
    relu = (torch.relu, nn.functional.relu)
    if layer.mask == "unit" and layer.activation not in (None, *relu) and not isinstance(layer.activation, nn.ReLU):
        raise ValueError("to_plain: a unit mask after this activation is no scaling of the weights")
    args, kwargs = _arguments(layer)
    plain = kind(*args, **{**kwargs, "device": layer.weight.device}).train(layer.training)
    with torch.no_grad():
        if layer.mask == "weight":
            on = layer.unpacked(task) if task is not None else layer.embedding >= 0
            plain.weight.copy_(torch.where(on, layer.weight, 0))
            if layer.bias is not None:
                plain.bias.copy_(layer.bias)
        else:
            gate = (layer.unpacked(task) if task is not None else layer._now()).to(layer.weight.dtype)
            dim = 1 if isinstance(layer, nn.ConvTranspose2d) else 0
            shape = [1] * layer.weight.dim()
            shape[dim] = -1
            plain.weight.copy_(layer.weight * gate.view(shape))
            if layer.bias is not None:
                plain.bias.copy_(layer.bias * gate)
    if layer.activation is None:
        return plain
    return nn.Sequential(plain, nn.ReLU())


def reserved_masks(model: nn.Module) -> Reserved:
    """Masks of everything that the recorded tasks use, for ``MaskedAdam(..., reserved=...)`` or ``protect``.

    Weight masks: the union of the tasks' bits; a bias, which all tasks share, wholly. Unit masks (HAT, eq. 2):
    min(post[i], pre[j]) as a pair of vectors, pre being the masked layer before (all ones before the first); biases
    post. The unit-masked layers must follow each other as in ``model.modules()``; after a Flatten, each unit stands for
    its positions. Empty before the first recorded task.

    Raises:
        ValueError: unit masks whose sizes do not follow from one layer to the next.

    Example:
        >>> net = nn.Sequential(fastcl.nn.MaskedLinear(4, 2)); fastcl.nn.end_task(net)
        >>> sorted(mask.dtype == torch.uint8 for mask in reserved_masks(net).values())  # bits; the bias wholly
        [False, True]
    """
    found: Reserved = {}
    before: Tensor | None = None
    for name, layer in masked_layers(model):
        if not layer.tasks:
            continue
        if layer.mask == "weight":
            like = torch.empty(layer.weight.shape, dtype=torch.bool, device=layer.weight.device)
            used = ops.unpack_mask(layer.reserved(), like)
            found[layer.weight] = ops.pack_mask(torch.empty_like(layer.weight, dtype=torch.bool).copy_(used))
            if layer.bias is not None:
                found[layer.bias] = torch.ones_like(layer.bias, dtype=torch.bool)
            continue
        transposed = isinstance(layer, nn.ConvTranspose2d)
        groups = getattr(layer, "groups", 1)
        if groups != 1:
            raise ValueError(f"{name} has {groups} groups: unit masks of grouped convolutions do not form two vectors")
        post = layer.reserved()
        n_in = layer.weight.shape[0 if transposed else 1]
        pre = before
        if pre is not None and len(pre) != n_in:
            if n_in % len(pre):
                raise ValueError(f"{name} has {n_in} inputs, which do not follow from the {len(pre)} units before it")
            pre = pre.repeat_interleave(n_in // len(pre))
        found[layer.weight] = (pre, post) if transposed else (post, pre)
        if layer.bias is not None:
            found[layer.bias] = post
        before = post
    return found


def capacity(model: nn.Module) -> dict[str, Any]:
    """What the recorded tasks use.

    Returns:
        ``layers``: for every masked layer its ``mask``, ``total`` weights or units, ``reserved`` share, and ``used``,
        the share of each task; ``reserved``, the share over all layers, and ``reserved_after`` [T] each task; ``used``
        [T], likewise; ``overlap`` [T][T]: the entries that tasks i and j share, as a part of what task i uses. Soft
        unit masks count as used from 0.5 on.

    Raises:
        ValueError: layers that have recorded different numbers of tasks.

    Example:
        >>> net = nn.Sequential(fastcl.nn.MaskedLinear(4, 2)); fastcl.nn.end_task(net)
        >>> capacity(net)["reserved"]
        1.0
    """
    layers: dict[str, Any] = {}
    per_task: list[list[Tensor]] = []
    for name, layer in masked_layers(model):
        masks = [layer.unpacked(t).reshape(-1) >= 0.5 if layer.mask == "unit" else layer.unpacked(t).reshape(-1)
                 for t in range(layer.tasks)]  # fmt: skip
        total = layer.weight.numel() if layer.mask == "weight" else layer.units
        union = torch.stack(masks).any(0) if masks else torch.zeros(total, dtype=torch.bool)
        layers[name] = {
            "mask": layer.mask,
            "total": total,
            "reserved": float(union.float().mean()),
            "used": [float(m.float().mean()) for m in masks],
        }
        per_task.append([*masks, union])
    n = {len(masks) for masks in per_task}
    if len(n) > 1:
        raise ValueError("capacity: the layers have recorded different numbers of tasks")
    whole = [torch.cat(parts) for parts in zip(*per_task, strict=True)]
    tasks, union = whole[:-1], whole[-1] if whole else torch.zeros(0)
    so_far = [torch.stack(tasks[: t + 1]).any(0).float().mean() for t in range(len(tasks))]
    return {
        "layers": layers,
        "reserved": float(union.float().mean()) if len(union) else 0.0,
        "reserved_after": [float(share) for share in so_far],
        "used": [float(m.float().mean()) for m in tasks],
        "overlap": [[float((a & b).sum() / a.sum()) if a.any() else 0.0 for b in tasks] for a in tasks],
    }


def plot_capacity(model: nn.Module, path: str | Path) -> None:
    """Writes a picture: what each task uses of every layer, what is reserved so far, what tasks share (matplotlib).

    Example:
        >>> net = nn.Sequential(fastcl.nn.MaskedLinear(4, 2)); fastcl.nn.end_task(net)
        >>> plot_capacity(net, folder / "a.png"); (folder / "a.png").stat().st_size > 1000
        True
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    report = capacity(model)
    tasks = list(range(1, len(report["used"]) + 1))
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), width_ratios=(1.3, 1), layout="constrained")
    left.fill_between(tasks, [100 * r for r in report["reserved_after"]], color="#dddddd", label="reserved so far")
    for name, layer in report["layers"].items():
        used = [100 * u for u in layer["used"]]
        left.plot(tasks, used, marker="o", label=f"layer {name}, {layer['total']} {layer['mask']}s")
    left.set(xlabel="task", ylabel="% of the layer's mask", ylim=(0, 100), title="used by each task", xticks=tasks)
    left.legend(fontsize="small", frameon=False)
    left.spines[["top", "right"]].set_visible(False)
    overlap = [[100 * share for share in row] for row in report["overlap"]]
    image = right.imshow(overlap or [[0.0]], vmin=0, vmax=100, cmap="Greens")
    for i, row in enumerate(overlap if len(tasks) <= 10 else []):
        for j, share in enumerate(row):
            colour = "white" if share > 60 else "black"
            right.text(j, i, f"{share:.0f}", ha="center", va="center", fontsize="small", color=colour)
    right.set(xlabel="task j", ylabel="task i", title="% of what i uses that j uses too")
    right.set_xticks(range(len(tasks)), tasks)
    right.set_yticks(range(len(tasks)), tasks)
    figure.colorbar(image, ax=right)
    figure.savefig(path, dpi=130)
    plt.close(figure)
