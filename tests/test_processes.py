"""Ops in DataLoader workers, in several threads at once, under any number of OpenMP threads: always the same bits."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import threading

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from fastcl import _ops

from .conftest import ROOT
from .samples import OPS, copied
from .test_catalogue import args_of, outcome

CASES = list(OPS)


def digest(case: str, shape: tuple[int, ...] = (5, 13)) -> str:
    """Of the bits that an op's results have, from arguments that depend on nothing but the case."""
    torch.manual_seed(CASES.index(case))
    found = hashlib.sha256()
    for t in outcome(case, args_of(case, shape)):
        found.update(t.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


class Digests(Dataset):
    """Sample i is the digest of case i, taken wherever it is asked for."""

    def __len__(self) -> int:
        return len(CASES)

    def __getitem__(self, index: int) -> str:
        return digest(CASES[index])


def run_loader(context: str) -> None:
    """In a process of its own: the parent has used its threads, then workers run every op."""
    torch.set_num_threads(2)
    x = torch.randn(1 << 20)
    (x * x).sum()  # starts the pool, of torch and of the kernels
    _ops.catalogue["soft_threshold_"]([x], 0.1)
    here = [digest(case) for case in CASES]
    loader = DataLoader(
        Digests(), batch_size=None, num_workers=2, multiprocessing_context=context, timeout=120, persistent_workers=True
    )
    for _ in range(2):  # workers that live on, too
        assert list(loader) == here
    assert [digest(case) for case in CASES] == here  # the parent goes on as before
    print("same")


@pytest.mark.parametrize("context", ["fork", "spawn", "forkserver"])
def test_dataloader_workers_run_every_op(context: str) -> None:
    """DataLoader gives its workers one thread: then a fork after OpenMP does no harm. Nothing may hang."""
    code = f"from tests.test_processes import run_loader\nif __name__ == '__main__': run_loader({context!r})"
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", code],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    assert done.stdout.strip() == "same"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_with_one_thread_runs_every_op() -> None:
    """README: a child of fork() must not use threads of its parent's OpenMP, in torch's ops as in these."""
    code = """
import os, sys, torch
from tests.test_processes import CASES, digest
torch.set_num_threads(2)
(torch.randn(1 << 20) ** 2).sum()
here = [digest(case, (40, 33)) for case in CASES]
child = os.fork()
if child == 0:
    torch.set_num_threads(1)
    os._exit(0 if [digest(case, (40, 33)) for case in CASES] == here else 1)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.skipif(_ops.pure_python, reason="the sums are torch's own")
@pytest.mark.parametrize("case", CASES)
def test_same_bits_while_the_number_of_threads_changes(case: str) -> None:
    """From 1 to 8 and back, changed between calls, and repeated."""
    args = args_of(case, OPS[case].large)
    wanted = None
    for threads in (1, 8, 3, 2, 7, 5, 4, 6, 2, 1):
        torch.set_num_threads(threads)
        got = outcome(case, copied(args))
        wanted = wanted or got
        assert all(torch.equal(a, b) for a, b in zip(wanted, got, strict=True)), threads


@pytest.mark.skipif(_ops.pure_python, reason="the sums are torch's own")
def test_large_calls_from_several_threads_at_once() -> None:
    """Every op at a size that several OpenMP threads share, called by four Python threads in other orders."""
    torch.set_num_threads(2)
    inputs = {case: args_of(case, OPS[case].large) for case in CASES}
    wanted = {case: outcome(case, copied(args)) for case, args in inputs.items()}
    wrong: list[str] = []

    def work(start: int) -> None:
        torch.set_num_threads(2)
        for k in range(len(CASES)):
            case = CASES[(start + k) % len(CASES)]
            got = outcome(case, copied(inputs[case]))
            if not all(torch.equal(a, b) for a, b in zip(got, wanted[case], strict=True)):
                wrong.append(case)

    workers = [threading.Thread(target=work, args=(11 * k,)) for k in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(timeout=300)
    assert not any(worker.is_alive() for worker in workers)
    assert not wrong
