"""Networks that grow and shrink: units added to, removed from or repeated in a layer, with all that must follow."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from .masked import MaskedLayer
from .plan import LAYERS, NORMS, Plan, trace

NEW = -1  # in an index of old places: a unit that was not there
Index = Tensor


def grow(
    model: nn.Module,
    units: int | Mapping[str, int],
    *,
    inputs: int = 0,
    plan: Plan | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    regularisers: Iterable[Any] = (),
    outgoing: str = "zero",
    generator: torch.Generator | None = None,
) -> None:
    """Adds units (filters, outputs, latent dimensions) to layers, in place; parameters stay the same objects.

    New incoming weights are drawn as the layer's own; new outgoing weights are zero, so that the network computes what
    it did. The inputs of the layers that follow, BatchNorm's weights and statistics, masks of masked layers, the
    optimizer's moments and reserved masks (new entries free) and importances with their anchors grow with them.

    Call it between steps: a graph from before, if something still holds it, has the old shapes.

    Args:
        model: any module whose layers :func:`trace` can follow, or for which `plan` says so; or a single layer, then
            `units` is how many outputs it gains and `inputs` how many inputs.
        units: layer name to the number of units added. Linear, Conv1d-3d, ConvTranspose1d-3d, without groups.
        plan: layer name to the names of the layers that read its outputs; traced by torch.fx if None.
        optimizer: whose state follows; SGD, Adam and every other whose state has the parameter's shape.
        regularisers: EWC, MAS, SI, RWalk or others that keep dicts of parameter name to tensor.
        outgoing: ``zero``, or ``init`` for drawn outgoing weights: learns faster, changes the function.
        generator: of the drawn weights.

    Raises:
        ValueError: an unknown or grouped layer, a number that is not positive, a model that cannot be followed. Nothing
            has been changed then.

    Example:
        >>> model = fastcl.nn.mlp((4,), (8,), 2)
        >>> fastcl.nn.grow(model, {"1": 3}); model[1].out_features, model[3].in_features
        (11, 11)
    """
    if isinstance(units, int):
        if not isinstance(model, LAYERS):
            raise ValueError(f"units is {units} but must name the layers of a {type(model).__name__}")
        _grow_layer(model, units, inputs, optimizer, outgoing, generator)
        return
    indices = {}
    for name, n in units.items():
        if not isinstance(n, int) or n < 1:
            raise ValueError(f"units of {name} is {n} but must be a positive number")
        old = unit_count(_layer(model, name))
        indices[name] = torch.cat([torch.arange(old), torch.full((n,), NEW)])
    reindex(
        model,
        indices,
        plan=plan,
        optimizer=optimizer,
        regularisers=regularisers,
        outgoing=outgoing,
        generator=generator,
    )


def shrink(
    model: nn.Module,
    remove: Mapping[str, Sequence[int] | Tensor],
    *,
    plan: Plan | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    regularisers: Iterable[Any] = (),
) -> None:
    """Removes units, the inverse of :func:`grow`: layer name to the units that go.

    Raises:
        ValueError: as :func:`grow`; a unit that does not exist; all units of a layer.

    Example:
        >>> model = fastcl.nn.mlp((4,), (8,), 2)
        >>> fastcl.nn.shrink(model, {"1": [0, 7]}); model[1].out_features
        6
    """
    indices = {}
    for name, gone in remove.items():
        keep = torch.ones(unit_count(_layer(model, name)), dtype=torch.bool)
        chosen = torch.as_tensor(gone, dtype=torch.int64)
        if chosen.numel() and (chosen.min() < 0 or chosen.max() >= len(keep)):
            raise ValueError(f"remove of {name} has a unit outside 0 to {len(keep) - 1}")
        keep[chosen] = False
        if not keep.any():
            raise ValueError(f"remove of {name} has all of its units: one must stay")
        indices[name] = keep.nonzero().flatten()
    reindex(model, indices, plan=plan, optimizer=optimizer, regularisers=regularisers)


@torch.no_grad()
def reindex(
    model: nn.Module,
    units: Mapping[str, Index],
    *,
    plan: Plan | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    regularisers: Iterable[Any] = (),
    outgoing: str = "zero",
    generator: torch.Generator | None = None,
) -> None:
    """What :func:`grow` and :func:`shrink` do: each layer's units become those of an index into the old ones.

    -1 is a new unit; a place that stands twice duplicates its unit, incoming and outgoing weights alike (DEN's split
    starts from that). Raises as :func:`grow`.

    Raises:
        ValueError: as :func:`grow`, before anything is changed.

    Example:
        >>> reindex(model, {"0": [0, 1, 2, 2]}); model[0].out_features, model[2].in_features  # the last unit twice
        (4, 4)
    """
    if outgoing not in ("zero", "init"):
        raise ValueError(f"outgoing is {outgoing!r} but must be zero or init")
    plan = trace(model) if plan is None else plan
    out: dict[str, Index] = {}
    into: dict[str, Index] = {}
    for name, index in units.items():
        layer = _layer(model, name)
        index = torch.as_tensor(index, dtype=torch.int64)
        old = unit_count(layer)
        if index.dim() != 1 or not len(index) or index.min() < NEW or index.max() >= old:
            raise ValueError(f"units of {name} must be places from 0 to {old - 1}, or -1 for new ones")
        if name not in plan:
            raise ValueError(f"plan has no layer {name}: it must say which layers read its outputs")
        out[name] = index
        for follower in plan[name]:
            module = _follower(model, follower)
            repeat, rest = divmod(_width(module), old)
            if rest or follower in into:
                why = "two layers feed it" if follower in into else f"{_width(module)} inputs are no multiple of {old}"
                raise ValueError(f"plan: {follower} follows {name} but {why}")
            # flattened maps: each unit is `repeat` inputs, side by side
            places = index.unsqueeze(1) * repeat + torch.arange(repeat)
            into[follower] = torch.where(index.unsqueeze(1) == NEW, NEW, places).flatten()
    parameter_names = {id(p): n for n, p in model.named_parameters()}
    work = _Work(optimizer, list(regularisers), parameter_names)
    for name in dict.fromkeys([*out, *into]):
        module = model.get_submodule(name)
        if isinstance(module, NORMS):
            _renorm(module, into[name], work)
        else:
            _rewire(module, out.get(name), into.get(name), outgoing, generator, work)
    work.apply()


def unit_count(layer: nn.Module) -> int:
    """Output units or channels of a Linear or convolution."""
    return layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels


def take(t: Tensor, changes: Sequence[tuple[int, Index]], fill: float | Tensor = 0.0) -> Tensor:
    """`t` with the dimensions re-indexed, in its memory format; new places get `fill` (a tensor of the new shape)."""
    shape = list(t.shape)
    for dim, index in changes:
        shape[dim] = len(index)
    channels_last = t.dim() == 4 and t.is_contiguous(memory_format=torch.channels_last) and not t.is_contiguous()
    format = torch.channels_last if channels_last else torch.contiguous_format
    result = torch.empty(shape, dtype=t.dtype, device=t.device, memory_format=format)
    result.copy_(fill) if isinstance(fill, Tensor) else result.fill_(fill)
    kept = [torch.arange(size, device=t.device) for size in shape]
    source = [torch.arange(size, device=t.device) for size in t.shape]
    for dim, index in changes:
        index = index.to(t.device)
        kept[dim] = (index != NEW).nonzero().flatten()
        source[dim] = index[kept[dim]]
    if t.dim():
        result[torch.meshgrid(*kept, indexing="ij")] = t[torch.meshgrid(*source, indexing="ij")]
    return result


class _Work:
    """Everything that will change, found before anything does."""

    def __init__(self, optimizer: torch.optim.Optimizer | None, regularisers: list[Any], names: dict[int, str]) -> None:
        self.optimizer, self.regularisers, self.names = optimizer, regularisers, names
        self.steps: list[Any] = []
        self.masks: dict[Tensor, Any] = {}

    def parameter(self, p: nn.Parameter, changes: list[tuple[int, Index]], fresh: Tensor | float) -> None:
        new = take(p.detach(), changes, fresh)
        old_shape = p.shape
        states = self.optimizer.state.get(p, {}) if self.optimizer is not None else {}
        for key, t in states.items():
            if isinstance(t, Tensor) and t.shape == old_shape and t.dim():
                self.steps.append((states.__setitem__, key, take(t, changes)))
        if p in (given := getattr(self.optimizer, "reserved", {})):
            self.masks[p] = _mask(given[p], p, changes)
        name = self.names.get(id(p))
        for regulariser in self.regularisers:
            for kept in vars(regulariser).values():
                if isinstance(kept, dict) and isinstance(t := kept.get(name), Tensor) and t.shape == old_shape:
                    anchored = kept is getattr(regulariser, "anchors", None) or kept is getattr(
                        regulariser, "start", None
                    )
                    self.steps.append((kept.__setitem__, name, take(t, changes, new.to(t.dtype) if anchored else 0.0)))
        self.steps.append((_replace, p, new))

    def attribute(self, module: nn.Module, name: str, value: Any) -> None:
        self.steps.append((setattr, module, name, value))

    def apply(self) -> None:
        for call, *args in self.steps:
            call(*args)
        if self.masks:
            self.optimizer.reserve(self.masks)  # type: ignore[union-attr]


def _replace(p: nn.Parameter, new: Tensor) -> None:
    p.grad = None
    p.data = new


def _mask(given: Any, p: Tensor, changes: list[tuple[int, Index]]) -> Any:
    """A reserved mask after the change, in its own form; new entries are free."""
    if isinstance(given, tuple):
        vectors = []
        for dim, t in enumerate(given):
            own = [(0, index) for d, index in changes if d == dim]
            vectors.append(take(t, own) if t is not None and own else t)
        return tuple(vectors)
    if given.dtype == torch.uint8 and given.shape != p.shape:
        bits = ops.unpack_mask(given, p.detach())
        grown = take(bits.contiguous(), changes, False)
        like = take(p.detach(), changes)
        return ops.pack_mask(torch.empty_like(like, dtype=torch.bool).copy_(grown))
    return take(given, changes)


def _rewire(
    layer: nn.Module,
    out: Index | None,
    into: Index | None,
    outgoing: str,
    generator: torch.Generator | None,
    work: _Work,
) -> None:
    transposed = "Transpose" in type(layer).__name__
    out_dim, in_dim = (1, 0) if transposed else (0, 1)
    weight = layer.weight
    changes = [(out_dim, out)] if out is not None else []
    changes += [(in_dim, into)] if into is not None else []
    fresh = _drawn(take(weight.detach(), changes), generator, in_dim)
    if into is not None and outgoing == "zero":
        # old units do not read new inputs; new units do
        columns = (into == NEW).to(weight.device)
        rows = torch.ones(fresh.shape[out_dim], dtype=torch.bool, device=weight.device)
        if out is not None:
            rows = (out != NEW).to(weight.device)
        view = fresh.movedim((out_dim, in_dim), (0, 1))
        view[rows.nonzero().flatten()[:, None], columns.nonzero().flatten()[None, :]] = 0
    work.parameter(weight, changes, fresh)
    if layer.bias is not None and out is not None:
        bound = 1 / math.sqrt(max(1, fresh.numel() // max(1, fresh.shape[out_dim])))
        bias = torch.empty(len(out), dtype=layer.bias.dtype, device=layer.bias.device)
        work.parameter(layer.bias, [(0, out)], bias.uniform_(-bound, bound, generator=generator))
    if isinstance(layer, MaskedLayer):
        _remask(layer, changes, out, work)
    linear = isinstance(layer, nn.Linear)
    for index, name in (
        (out, "out_features" if linear else "out_channels"),
        (into, "in_features" if linear else "in_channels"),
    ):
        if index is not None:
            work.attribute(layer, name, len(index))


def _drawn(like: Tensor, generator: torch.Generator | None, in_dim: int) -> Tensor:
    """What Linear's and the convolutions' own reset_parameters draws: U(-b, b), b = 1 / sqrt(fan in)."""
    fan_in = like.numel() // max(1, like.shape[1 - in_dim])
    bound = 1 / math.sqrt(max(1, fan_in))
    return like.uniform_(-bound, bound, generator=generator)


def _remask(layer: MaskedLayer, changes: list[tuple[int, Index]], out: Index | None, work: _Work) -> None:
    """Old tasks do not use what is new: their masks are off there; the new embedding entries start as a task's do."""
    if layer.mask == "unit":
        if out is not None:
            start = torch.randn(len(out), dtype=layer.embedding.dtype, device=layer.embedding.device)
            work.parameter(layer.embedding, [(0, out)], start)
            work.attribute(layer, "masks", take(layer.masks, [(1, out)]))
        return
    work.parameter(layer.embedding, changes, 0.0)
    like = torch.empty(layer.weight.shape, dtype=torch.bool, device=layer.weight.device)
    old = [take(ops.unpack_mask(bits, like), changes, False) for bits in layer.masks]
    width = (take(like, changes, False).numel() + 7) // 8
    packed = torch.stack([ops.pack_mask(bits) for bits in old]) if old else layer.masks.new_zeros(0, width)
    work.attribute(layer, "masks", packed)
    work.attribute(layer, "_free", None)
    work.steps.append((layer._free_share,))


def _renorm(norm: nn.Module, index: Index, work: _Work) -> None:
    """BatchNorm: new features start at weight 1, bias 0, mean 0, variance 1."""
    for name, fill in (("weight", 1.0), ("bias", 0.0)):
        if getattr(norm, name) is not None:
            work.parameter(getattr(norm, name), [(0, index)], fill)
    for name, fill in (("running_mean", 0.0), ("running_var", 1.0)):
        if (t := getattr(norm, name)) is not None:
            work.attribute(norm, name, take(t, [(0, index)], fill))
    work.attribute(norm, "num_features", len(index))


def _grow_layer(
    layer: nn.Module,
    units: int,
    inputs: int,
    optimizer: torch.optim.Optimizer | None,
    outgoing: str,
    generator: torch.Generator | None,
) -> None:
    if units < 0 or inputs < 0 or units + inputs == 0:
        raise ValueError(f"units is {units} and inputs is {inputs} but one must be positive, none negative")
    _refuse_groups("layer", layer)
    work = _Work(optimizer, [], {})
    index = [torch.cat([torch.arange(old), torch.full((n,), NEW)]) if n else None
             for old, n in ((unit_count(layer), units), (_width(layer), inputs))]  # fmt: skip
    with torch.no_grad():
        _rewire(layer, *index, outgoing, generator, work)
        work.apply()


def _layer(model: nn.Module, name: str) -> nn.Module:
    try:
        layer = model.get_submodule(name)
    except AttributeError:
        raise ValueError(f"units names the layer {name}, which the model does not have") from None
    if not isinstance(layer, LAYERS):
        raise ValueError(f"units names {name}, a {type(layer).__name__}, but must name Linear or convolution layers")
    _refuse_groups(name, layer)
    return layer


def _follower(model: nn.Module, name: str) -> nn.Module:
    module = model.get_submodule(name)
    if not isinstance(module, (*LAYERS, *NORMS)):
        raise ValueError(f"plan: {name} is a {type(module).__name__}, whose inputs cannot grow")
    _refuse_groups(name, module)
    return module


def _refuse_groups(name: str, layer: nn.Module) -> None:
    if getattr(layer, "groups", 1) != 1:
        raise ValueError(f"{name} has {layer.groups} groups: only layers without groups grow")


def _width(module: nn.Module) -> int:
    if isinstance(module, NORMS):
        return module.num_features
    return module.in_features if isinstance(module, nn.Linear) else module.in_channels
