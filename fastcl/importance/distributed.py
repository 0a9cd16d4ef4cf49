"""Importances over several processes: DDP's replicas and FSDP2's shards (``fully_shard``, DTensor parameters).

Every process estimates on its own batches; sums and counts are added over the processes, so that data of unequal size
is weighted as it would be in one process. Nothing here is imported by a program that does not use torch.distributed.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn


def _loaded(module: str, name: str) -> Any:
    """A class of torch.distributed if the program has imported it; else nothing can be an instance of it."""
    found = sys.modules.get(module)
    return getattr(found, name, None) or ()


def is_dtensor(t: Any) -> bool:
    return isinstance(t, _loaded("torch.distributed.tensor", "DTensor"))


def local(tensors: Sequence[Tensor]) -> list[Tensor]:
    """This process's shards; plain tensors as they are. Differentiable."""
    return [t.to_local() if is_dtensor(t) else t for t in tensors] if any_dtensor(tensors) else list(tensors)


def any_dtensor(tensors: Sequence[Tensor]) -> bool:
    # asked five times a step: 15 ns a tensor, where isinstance in a loop takes 100
    dtensor = _loaded("torch.distributed.tensor", "DTensor")
    return dtensor != () and any(issubclass(kind, dtensor) for kind in set(map(type, tensors)))


def plain_type(module: nn.Module) -> type[nn.Module]:
    """The module's type, also where `fully_shard` has put a class of its own in front."""
    fsdp = _loaded("torch.distributed.fsdp", "FSDPModule")
    return type(module).__mro__[2] if isinstance(module, fsdp) else type(module)


def unwrapped(model: nn.Module) -> tuple[nn.Module, str]:
    """The module inside DistributedDataParallel and the prefix that DDP gives its names."""
    if isinstance(model, _loaded("torch.nn.parallel.distributed", "DistributedDataParallel")):
        return model.module, "module."
    return model, ""


def groups_of(model: nn.Module, group: Any = None) -> list[Any]:
    """The process groups to add over, one after the other: the caller's, DDP's, or those of the shards' mesh."""
    if group is not None:
        return [group]
    if unwrapped(model)[0] is not model:
        return [model.process_group]
    mesh = mesh_of(list(model.parameters()))
    return [] if mesh is None else mesh.get_all_groups()


def mesh_of(params: Sequence[Tensor]) -> Any:
    """The mesh that the parameters are sharded over, None for plain ones.

    Raises:
        ValueError: some are sharded and others are not, or over another mesh.
    """
    if not any_dtensor(params):
        return None
    meshes = [p.device_mesh if is_dtensor(p) else None for p in params]
    if any(mesh != meshes[0] for mesh in meshes):
        raise ValueError("model must have all its parameters on one mesh: call fully_shard on the whole model too")
    return meshes[0]


def in_step(batches: Iterable[Any], model: nn.Module) -> Iterator[Any]:
    """The batches; under ``fully_shard``, where each forward pass gathers the shards, all processes must have as many.

    Raises:
        ValueError: in every process, where one has fewer; they would wait for each other otherwise.
    """
    params = list(model.parameters())
    mesh = mesh_of(params)
    if mesh is None:
        yield from batches
        return
    left, end = iter(batches), object()
    while True:
        batch = next(left, end)
        here = int(batch is not end)
        least = torch.tensor([here, -here], device=params[0].device)
        for group in mesh.get_all_groups():
            torch.distributed.all_reduce(least, torch.distributed.ReduceOp.MIN, group=group)
        fewest, most = least[0].item(), -least[1].item()
        if fewest != most:
            raise ValueError(
                "batches must be as many on every process under fully_shard, and another one has "
                + ("fewer" if here else "more")
            )
        if not here:
            return
        yield batch


def add_up(sums: Sequence[Tensor], count: int, groups: Sequence[Any]) -> int:
    """Adds the sums of all processes, in place; returns their count."""
    if not groups:
        return count
    device = sums[0].device
    total = torch.tensor(count, dtype=torch.int64, device=device)
    for group in groups:
        torch.distributed.all_reduce(total, group=group)
        for t in sums:
            torch.distributed.all_reduce(t, group=group)
    return int(total.item())


def sharded_like(full: Tensor, param: Tensor) -> Tensor:
    """A tensor that every process has whole, as this process's shard of it."""
    if not is_dtensor(param):
        return full
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(full, param.device_mesh, param.placements, src_data_rank=None)


def over_shards(value: Tensor, params: Sequence[Tensor]) -> Tensor:
    """The sum over all shards of a 0-d value that each process has for its own; the gradient is the own share's."""
    mesh = mesh_of(params)
    if mesh is None:
        return value
    total = value.detach().clone()
    for dim, placement in enumerate(params[0].placements):
        if placement.is_shard():  # replicas have the same value already
            torch.distributed.all_reduce(total, group=mesh.get_group(dim))
    return value + (total - value.detach())


def largest(values: Sequence[Tensor]) -> float:
    """The largest entry of all tensors, of every process's shards."""
    parts = [t.max() for t in local(values) if t.numel()]
    top = torch.stack(parts).max() if parts else torch.zeros((), device=values[0].device)
    mesh = mesh_of(values)
    for group in [] if mesh is None else mesh.get_all_groups():
        torch.distributed.all_reduce(top, torch.distributed.ReduceOp.MAX, group=group)
    return top.item()
