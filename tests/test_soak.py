"""Long runs: memory stays flat, and what 100 tasks add up is finite and exact.

`make soak` is the long form, 10,000 steps of every op; here a few hundred, enough for a leak of a handle a step.
"""

from __future__ import annotations

import ctypes
import gc
import os
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastcl
from fastcl import ops

from .samples import OPS
from .test_catalogue import args_of, op, outcome

STEPS = int(os.environ.get("FASTCL_SOAK", "300"))
TASKS = 100


def resident() -> int:
    """This process' memory in bytes."""
    with open("/proc/self/statm") as f:
        return int(f.read().split()[1]) * os.sysconf("SC_PAGESIZE")


class Mallinfo(ctypes.Structure):
    _fields_ = [(f"f{k}", ctypes.c_size_t) for k in range(10)]


def in_use() -> int:
    """Bytes that malloc has given out: moves by every leaked handle, where pages do not."""
    gc.collect()
    library = ctypes.CDLL(None)
    library.mallinfo2.restype = Mallinfo
    found = library.mallinfo2()
    return found.f7 + found.f4  # uordblks and hblkhd: in arenas, and mapped


needs_glibc = pytest.mark.skipif(
    not sys.platform.startswith("linux") or not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="needs glibc's counters"
)


@needs_glibc
@pytest.mark.parametrize("case", OPS)
def test_memory_is_flat(case: str) -> None:
    torch.set_num_threads(1)
    args = args_of(case, (6, 11))

    def steps(n: int) -> None:
        with torch.no_grad():
            for _ in range(n):
                op(case)(*args)

    steps(100)
    before, pages = in_use(), resident()
    steps(STEPS)
    assert in_use() - before < 8 * STEPS + 4096  # the smallest leak, a handle, is 16 bytes a step
    assert resident() - pages < 2**20
    for t in outcome(case, args):
        assert not t.is_floating_point() or t.isfinite().all()


@needs_glibc
def test_the_counter_sees_a_leak() -> None:
    """Of 32 bytes a step: else the test above could not fail."""
    kept = []
    before = in_use()
    for _ in range(STEPS):
        kept.append(torch.zeros(8))
    assert in_use() - before > 8 * STEPS + 4096


@needs_glibc
def test_refusals_leak_nothing() -> None:
    """A raise half-way through the checks leaves nothing behind either."""
    g, wrong = [torch.ones(64) for _ in range(8)], [torch.full((64,), 2.0) for _ in range(8)]

    def steps(n: int) -> None:
        for _ in range(n):
            with pytest.raises(ValueError, match="outside"):
                ops.masked_grad_(g, wrong)

    steps(200)
    before = in_use()
    steps(STEPS)
    assert in_use() - before < 8 * STEPS + 8192


# ---- 100 tasks ----


def tasks(model: nn.Module, n: int = TASKS) -> list[tuple[dict[str, Tensor], dict[str, Tensor]]]:
    """Importances and the parameters where each task ended."""
    torch.manual_seed(0)
    names = {name: p.shape for name, p in model.named_parameters()}
    found = []
    for k in range(n):
        scale = 10.0 ** (k % 5 - 2)  # tasks of very different weight
        fisher = {name: scale * torch.rand(shape) * (torch.rand(shape) > 0.2) for name, shape in names.items()}
        found.append((fisher, {name: torch.randn(shape) for name, shape in names.items()}))
    return found


def placed(model: nn.Module, values: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(values[name])


def quadratic(fisher: Tensor, theta: Tensor, anchor: Tensor) -> Tensor:
    return (fisher.double() * (theta.double() - anchor.double()).square()).sum()


@pytest.mark.parametrize("form", ["separate", "single", "online"])
def test_ewc_over_100_tasks_is_the_closed_form(form: str) -> None:
    model, gamma = nn.Linear(7, 5), 0.9
    ewc = fastcl.EWC(model, 3.0, form=form, gamma=gamma)
    seen = tasks(model)
    for fisher, ended in seen:
        placed(model, ended)
        ewc.merge(fisher)
    torch.manual_seed(1)
    placed(model, {name: torch.randn(p.shape) for name, p in model.named_parameters()})
    wanted = torch.zeros((), dtype=torch.float64)
    for name, p in model.named_parameters():
        last = seen[-1][1][name]
        for k, (fisher, ended) in enumerate(seen):
            weight = gamma ** (TASKS - 1 - k) if form == "online" else 1.0
            wanted += 1.5 * weight * quadratic(fisher[name], p, ended[name] if form == "separate" else last)
    torch.testing.assert_close(ewc.penalty().double(), wanted, rtol=2e-5, atol=0.0)
    assert ewc.tasks == TASKS
    assert all(t.isfinite().all() for t in (*ewc.importances.values(), *ewc.anchors.values()))


def test_ewc_gradient_over_100_tasks_is_the_closed_form() -> None:
    model = nn.Linear(7, 5)
    ewc = fastcl.EWC(model, 3.0, form="separate")
    seen = tasks(model)
    for fisher, ended in seen:
        placed(model, ended)
        ewc.merge(fisher)
    ewc.add_gradients()
    for name, p in model.named_parameters():
        wanted = sum(3.0 * f[name].double() * (p.detach().double() - a[name].double()) for f, a in seen)
        size = sum(3.0 * f[name].double() * (p.detach().double() - a[name].double()).abs() for f, a in seen)
        assert ((p.grad.double() - wanted).abs() <= 2e-5 * size + 1e-6).all()


def test_mas_over_100_tasks_is_the_sum() -> None:
    model = nn.Linear(7, 5)
    mas = fastcl.MAS(model, 1.0)
    seen = tasks(model)
    for omega, _ in seen:
        mas.merge(omega)
    for name, total in mas.importances.items():
        torch.testing.assert_close(total.double(), sum(o[name].double() for o, _ in seen), rtol=1e-5, atol=0.0)


@pytest.mark.parametrize("kind", ["si", "rwalk"])
def test_path_importances_over_100_tasks_are_finite(kind: str) -> None:
    """SI's against a plain float64 copy of its two equations; RWalk's within its normalisation, [0, 2]."""
    torch.manual_seed(0)
    model = nn.Linear(7, 5)
    regulariser: Any = (fastcl.SI if kind == "si" else fastcl.RWalk)(model, 1.0)
    omega = {name: torch.zeros(p.shape, dtype=torch.float64) for name, p in model.named_parameters()}
    for _ in range(TASKS):
        start = {name: p.detach().double().clone() for name, p in model.named_parameters()}
        path = {name: torch.zeros_like(t) for name, t in start.items()}
        for _ in range(12):
            before = {name: p.detach().double().clone() for name, p in model.named_parameters()}
            for p in model.parameters():
                p.grad = torch.randn_like(p)
            regulariser.before_step()
            with torch.no_grad():
                for p in model.parameters():
                    p.sub_(0.1 * p.grad)
            regulariser.after_step()
            for name, p in model.named_parameters():
                path[name] -= p.grad.double() * (p.detach().double() - before[name])
        regulariser.consolidate()
        for name, p in model.named_parameters():
            omega[name] += path[name].clamp(min=0) / ((p.detach().double() - start[name]).square() + 0.1)
    for name, total in regulariser.importances.items():
        assert total.isfinite().all()
        if kind == "si":
            torch.testing.assert_close(total.double(), omega[name], rtol=1e-4, atol=1e-5)
        else:
            assert ((total >= 0) & (total <= 2)).all()


@pytest.mark.parametrize("mask", ["weight", "unit"])
def test_masks_of_100_tasks_are_exact(mask: str) -> None:
    """Packed masks of weights come back to the bit; what is reserved is the union, of soft units the maximum."""
    torch.manual_seed(0)
    layer = fastcl.nn.MaskedLinear(13, 9, mask=mask, **({"binary": False} if mask == "unit" else {}))
    wanted = []
    for _ in range(TASKS):
        with torch.no_grad():
            layer.embedding.normal_().sub_(2.0)  # few are chosen, so that the union grows slowly
        m = layer.embedding.detach() >= 0
        wanted.append(m if mask == "weight" else torch.sigmoid(layer.s_max * layer.embedding.detach()))
        layer.end_task()
    for k, m in enumerate(wanted):
        found = layer.unpacked(k)
        assert torch.equal(found, m) if mask == "weight" else torch.allclose(found, m, rtol=1e-3, atol=1e-30)
    every = torch.stack(wanted)
    if mask == "weight":
        assert torch.equal(ops.unpack_mask(layer.reserved(), layer.weight), every.any(0))
    else:
        assert torch.equal(layer.reserved(), layer.masks.amax(0))
        torch.testing.assert_close(layer.reserved(), every.amax(0), rtol=1e-3, atol=1e-30)
    grad = torch.full((9, 13), 2.0)
    if mask == "weight":
        ops.masked_grad_([grad], [layer.reserved()])
        assert torch.equal(grad == 0, every.any(0))
