"""Two processes of which one dies, hangs or has fewer batches: the other ends with an error or the right result."""

from __future__ import annotations

import os
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from torch import distributed, nn

import fastcl

from .test_distributed import consolidation, network, wrapped

pytestmark = pytest.mark.skipif(not distributed.is_available(), reason="this torch has no distributed package")
TIMEOUT = 8.0  # seconds that one process waits for the other


def worker(rank: int, how: str, folder: str) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    distributed.init_process_group(
        "gloo", init_method=store, rank=rank, world_size=2, timeout=timedelta(seconds=TIMEOUT)
    )
    out = Path(folder) / f"{rank}"
    model = wrapped("fsdp") if how == "fewer, fsdp" else nn.parallel.DistributedDataParallel(network())
    regulariser = fastcl.EWC(model, 1.0)
    regulariser.consolidate(consolidation(0, rank))
    before = {name: t.clone() for name, t in regulariser.importances.items()}
    batches = consolidation(1, rank)
    if rank == 1 and how == "dies":
        os._exit(3)
    if rank == 1 and how == "hangs":
        time.sleep(600)
    if rank == 1 and how.startswith("fewer"):
        batches = batches[:1]
    start = time.monotonic()
    try:
        regulariser.consolidate(batches)
    except (RuntimeError, ValueError) as error:
        kept = all(torch.equal(local(before[n]), local(t)) for n, t in regulariser.importances.items())
        out.write_text(f"{kept} {regulariser.tasks} {time.monotonic() - start} {error}")
        os._exit(0)  # the group is broken: taking it down would wait again
    torch.save({name.removeprefix("module."): t for name, t in regulariser.importances.items()}, f"{out}.pt")
    out.write_text("ended")
    distributed.barrier()
    os._exit(0)


def local(t: torch.Tensor) -> torch.Tensor:
    return t.to_local() if hasattr(t, "to_local") else t


def together(how: str, folder: Path) -> list[str]:
    """What the processes have written; none may live longer than the timeout and their start take."""
    context = torch.multiprocessing.get_context("spawn")
    processes = [context.Process(target=worker, args=(rank, how, str(folder))) for rank in (0, 1)]
    for process in processes:
        process.start()
    processes[0].join(240)
    alive = processes[0].is_alive()
    if how != "hangs" and not alive:
        processes[1].join(60)
    for process in processes:
        process.kill()
        process.join()
    assert not alive, "the other process waits for ever"
    return [path.read_text() if (path := folder / str(rank)).exists() else "" for rank in (0, 1)]


@pytest.mark.parametrize("how", ["dies", "hangs"])
def test_a_dead_process_ends_the_others(how: str, tmp_path: Path) -> None:
    said = together(how, tmp_path)[0]
    kept, tasks, seconds, message = said.split(" ", 3)
    assert (kept, tasks) == ("True", "1")  # the first task's importances are what they were
    assert float(seconds) < 10 * TIMEOUT  # gloo waits for its timeout; the rest is for busy machines
    assert message


def test_fewer_batches_weigh_less(tmp_path: Path) -> None:
    """Replicas meet only when the batches have ended: each may have as many as it likes."""
    assert together("fewer", tmp_path) == ["ended", "ended"]
    want = fastcl.EWC(network(), 1.0)
    want.consolidate(consolidation(0, None))
    want.consolidate([*consolidation(1, 0), *consolidation(1, 1)[:1]])
    for rank in (0, 1):
        torch.testing.assert_close(torch.load(tmp_path / f"{rank}.pt"), want.importances, rtol=1e-9, atol=1e-12)


def test_fewer_batches_are_refused_under_fully_shard(tmp_path: Path) -> None:
    """Each forward pass gathers the shards: one with more batches would wait, or take another's sum for a weight."""
    for said, word in zip(together("fewer, fsdp", tmp_path), ("fewer", "more"), strict=True):
        assert said.startswith("True 1 ")
        assert f"batches must be as many on every process under fully_shard, and another one has {word}" in said
