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


def worker(rank: int, plan: tuple[str, ...], folder: str) -> None:
    torch.set_num_threads(1)
    Path(folder, f"ready {rank}").touch()
    while not Path(folder, f"ready {1 - rank}").exists():  # the timeout is not for the other's imports
        time.sleep(0.01)
    store, timeout = f"file://{folder}/store", timedelta(seconds=TIMEOUT)
    distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=2, timeout=timeout)
    for how in plan:
        Path(folder, f"{how} {rank}").write_text(scene(rank, how, folder))
    os._exit(0)  # the group is broken: taking it down would wait again


def scene(rank: int, how: str, folder: str) -> str:
    model = wrapped("fsdp") if "fully_shard" in how else nn.parallel.DistributedDataParallel(network())
    regulariser = fastcl.EWC(model, 1.0)
    regulariser.consolidate(consolidation(0, rank))
    before = {name: local(t).clone() for name, t in regulariser.importances.items()}
    batches = consolidation(1, rank)
    if rank == 1 and how == "dies":
        os._exit(3)
    if rank == 1 and how == "hangs":
        time.sleep(600)
    start = time.monotonic()
    try:
        regulariser.consolidate(batches[:1] if rank == 1 else batches)
    except (RuntimeError, ValueError) as error:
        kept = all(torch.equal(before[n], local(t)) for n, t in regulariser.importances.items())
        return f"{kept} {regulariser.tasks} {time.monotonic() - start} {error}"
    torch.save({n.removeprefix("module."): t for n, t in regulariser.importances.items()}, f"{folder}/{how} {rank}.pt")
    return "ended"


def local(t: torch.Tensor) -> torch.Tensor:
    return t.to_local() if hasattr(t, "to_local") else t


def together(folder: Path, *plan: str) -> None:
    """Two processes through the plan; the first may not live longer than their start and the timeout take."""
    context = torch.multiprocessing.get_context("spawn")
    processes = [context.Process(target=worker, args=(rank, plan, str(folder))) for rank in (0, 1)]
    for process in processes:
        process.start()
    processes[0].join(240)
    alive = processes[0].is_alive()
    for process in processes:
        process.kill()
        process.join()
    assert not alive, "the first process waits for ever"


def check_error(said: str) -> None:
    kept, tasks, seconds, message = said.split(" ", 3)
    assert (kept, tasks) == ("True", "1")  # the first task's importances are what they were
    assert float(seconds) < 10 * TIMEOUT  # gloo waits for its timeout; the rest is for busy machines
    assert message


def test_a_hanging_process_ends_the_others(tmp_path: Path) -> None:
    together(tmp_path, "hangs")
    check_error((tmp_path / "hangs 0").read_text())


def test_fewer_batches_and_a_dying_process(tmp_path: Path) -> None:
    """Replicas meet only when the batches have ended: each may have as many as it likes.

    Under `fully_shard` each forward pass gathers the shards: one with more would wait for ever.
    """
    together(tmp_path, "fewer", "fewer, fully_shard", "dies")
    want = fastcl.EWC(network(), 1.0)
    want.consolidate(consolidation(0, None))
    want.consolidate([*consolidation(1, 0), *consolidation(1, 1)[:1]])
    for rank, word in ((0, "fewer"), (1, "more")):
        assert (tmp_path / f"fewer {rank}").read_text() == "ended"
        found = torch.load(tmp_path / f"fewer {rank}.pt")
        torch.testing.assert_close(found, want.importances, rtol=1e-9, atol=1e-12)
        said = (tmp_path / f"fewer, fully_shard {rank}").read_text()
        check_error(said)
        assert f"batches must be as many on every process under fully_shard, and another one has {word}" in said
    check_error((tmp_path / "dies 0").read_text())
