"""Two processes (gloo) under DDP and under fully_shard against one: importances, penalties, trained weights."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn

import fastcl

pytestmark = pytest.mark.skipif(not distributed.is_available(), reason="this torch has no distributed package")
STEPS, TASKS, WORLD = 4, 2, 2
REGULARISERS = {
    "EWC": lambda model, optimizer: fastcl.EWC(model, 3.0, kind="exact"),
    "EWC, separate": lambda model, optimizer: fastcl.EWC(model, 3.0, form="separate"),
    "MAS": lambda model, optimizer: fastcl.MAS(model, 0.5),
    "SI": lambda model, optimizer: fastcl.SI(model, 0.5, optimizer),
    "RWalk": lambda model, optimizer: fastcl.RWalk(model, 0.5, optimizer, delta_t=3),
}


def network() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv1d(2, 3, 2), nn.ReLU(), nn.Flatten(), nn.LayerNorm(9), nn.Linear(9, 7), nn.Tanh(), nn.Linear(7, 4)]
    return nn.Sequential(*layers).double()


def data(task: int, step: int, n: int = 12) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(100 * task + step)
    x = torch.randn(n, 2, 4, dtype=torch.float64, generator=generator)
    return x, torch.randint(0, 4, (n,), generator=generator)


def consolidation(task: int, rank: int | None) -> list[tuple[Tensor, Tensor]]:
    """One process sees all; of two, the second has less."""
    x, y = data(task, 99, n=17)
    parts = {0: [(x[:7], y[:7]), (x[7:11], y[7:11])], 1: [(x[11:12], y[11:12]), (x[12:], y[12:])]}
    return parts[0] + parts[1] if rank is None else parts[rank]


def learn(model: nn.Module, name: str, rank: int | None) -> dict[str, Any]:
    """Two tasks; what is found has plain names and whole tensors."""
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    regulariser = REGULARISERS[name](model, optimizer)
    penalties = []
    for task in range(TASKS):
        for step in range(STEPS):
            x, y = data(task, step)
            if rank is not None:
                x, y = x[6 * rank : 6 * rank + 6], y[6 * rank : 6 * rank + 6]
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            penalties.append(regulariser.penalty().item())
            torch.testing.assert_close(regulariser.add_gradients().item(), penalties[-1])
            optimizer.step()
        regulariser.consolidate(consolidation(task, rank))

    def whole(values: Any) -> dict[str, Tensor]:
        return {
            n.removeprefix("module."): (t.full_tensor() if hasattr(t, "full_tensor") else t).detach().clone()
            for n, t in values
        }

    return {
        "penalties": penalties,
        "importances": whole(regulariser.importances.items()),
        "anchors": whole(regulariser.anchors.items()),
        "weights": whole(model.named_parameters()),
    }


def wrapped(kind: str) -> nn.Module:
    if kind == "ddp":
        return nn.parallel.DistributedDataParallel(network())
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model, mesh = network(), init_device_mesh("cpu", (WORLD,))
    for layer in (model[0], model[4], model[6]):
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def worker(rank: int, kind: str, folder: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD)
    try:
        found = {name: learn(wrapped(kind), name, rank) for name in REGULARISERS}
        torch.save(found, f"{folder}/{rank}.pt")
        model = wrapped(kind)
        with pytest.raises(ValueError, match="batches is empty"):
            fastcl.fisher_diagonal(model, [])
        if kind == "fsdp":
            check_refusals(model)
        del model
        gc.collect()  # DDP's threads must end before the group does
        distributed.barrier()
    finally:
        distributed.destroy_process_group()


def check_refusals(model: nn.Module) -> None:
    with pytest.raises(ValueError, match="'batched' but must be another"):
        fastcl.fisher_diagonal(model, [data(0, 0)], "batched")
    from torch.distributed.fsdp import fully_shard

    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(2, 4).double())
            self.head = nn.Linear(8, 4).double()

        def forward(self, x: Tensor) -> Tensor:
            return self.head((x * self.scale).flatten(1))

    with pytest.raises(ValueError, match="only layers with a fused rule are supported, and scale has none"):
        fastcl.fisher_diagonal(fully_shard(Own(), mesh=next(model.parameters()).device_mesh), [data(0, 0)])
    partly = nn.Sequential(nn.Flatten(), fully_shard(nn.Linear(8, 5).double()), nn.Linear(5, 4).double())
    with pytest.raises(ValueError, match="on one mesh"):
        fastcl.fisher_diagonal(partly, [data(0, 0)])


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_processes_are_one(kind: str, tmp_path: Path) -> None:
    # the OpenMP threads of this process do not survive a fork: spawned
    torch.multiprocessing.spawn(worker, (kind, str(tmp_path)), nprocs=WORLD)
    for rank in range(WORLD):
        found = torch.load(tmp_path / f"{rank}.pt")
        for name in REGULARISERS:
            expected = learn(network(), name, None)
            torch.testing.assert_close(found[name], expected, rtol=1e-9, atol=1e-12)
            assert max(found[name]["penalties"]) > 0


def test_a_group_of_ones_own() -> None:
    """Replicas without DDP: the caller names the processes."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        model = network()
        want = fastcl.fisher_diagonal(model, consolidation(0, None))
        torch.testing.assert_close(
            fastcl.fisher_diagonal(model, consolidation(0, None), group=distributed.group.WORLD), want
        )
    finally:
        distributed.destroy_process_group()
