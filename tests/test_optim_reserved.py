"""What MaskedSGD, MaskedAdam and protect refuse, watch and survive: masks, plans, sparse gradients, threads."""

from __future__ import annotations

import gc
import math
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from fastcl import ops
from fastcl.ops import _direct
from fastcl.optim import MaskedAdam, MaskedSGD, protect

from .test_optim import set_gradients

CHANGES: dict[str, Callable[[Any, Any], None]] = {
    "state cleared": lambda o, p: o.state.clear(),
    "state replaced": lambda o, p: o.state[p].update(exp_avg=torch.full_like(p, 0.5)),
    "state's memory moved": lambda o, p: setattr(o.state[p]["exp_avg"], "data", torch.full((4, 6), 0.5)),
    "weights' memory moved": lambda o, p: setattr(p, "data", torch.full((4, 6), 0.5)),
    "weights in another order": lambda o, p: setattr(p, "data", torch.randn(6, 4).t()),
    "weights cut": lambda o, p: (setattr(p, "grad", None), setattr(p, "data", p.data[:2]), o.state.clear()),
    "group's list": lambda o, p: o.param_groups.__setitem__(0, dict(o.param_groups[0])),
    "learning rate": lambda o, p: o.param_groups[0].update(lr=0.7, betas=(0.1, 0.2)),
}


@pytest.mark.parametrize("plans", [True, False])
@pytest.mark.parametrize("case", CHANGES)
def test_a_plan_never_outlives_its_addresses(monkeypatch: pytest.MonkeyPatch, plans: bool, case: str) -> None:
    """Whatever is changed between two steps, the next is what torch would do."""
    if not plans:
        monkeypatch.setattr(_direct, "available", False)
    results = []
    for kind in (MaskedAdam, torch.optim.Adam):
        torch.manual_seed(3)
        p = nn.Parameter(torch.linspace(-1, 1, 24).reshape(4, 6))
        optimizer = kind([p], lr=0.1)
        for step in range(2):
            set_gradients([p], step)
            optimizer.step()
        CHANGES[case](optimizer, p)
        for step in range(2):
            set_gradients([p], 10 + step)
            optimizer.step()
            assert kind is not MaskedAdam or optimizer._plan is None or plans
        results.append((p.detach(), optimizer.state[p]["exp_avg"]))
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs)


GRADIENTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "elsewhere": torch.clone,
    "in another order": lambda g: g.t().contiguous().t(),
    "negated view": lambda g: torch._neg_view(-g),
    "with gaps": lambda g: torch.cat([g, g], 1)[:, :6],
}


@pytest.mark.parametrize("kind", GRADIENTS)
@pytest.mark.parametrize("first", [True, False])
def test_gradients_of_any_memory(kind: str, first: bool) -> None:
    """What a plan cannot take by its address goes another way, also once the plan is made."""
    results = []
    for of in (MaskedAdam, torch.optim.Adam):
        torch.manual_seed(3)
        p, q = nn.Parameter(torch.randn(4, 6)), nn.Parameter(torch.randn(3))
        optimizer = of([p, q], lr=0.1)
        for step in range(4):
            set_gradients([p, q], step)
            if first or step >= 2:
                p.grad = GRADIENTS[kind](p.grad)
            optimizer.step()
        results.append((p.detach(), q.detach()))
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_masks_are_watched() -> None:
    """An in-place change of a given mask counts, and is checked."""
    p, q = nn.Parameter(torch.zeros(8)), nn.Parameter(torch.zeros(8))
    mask, soft = torch.zeros(8, dtype=torch.bool), torch.full((8,), 0.5)
    optimizer = MaskedSGD([p, q], 1.0, reserved={p: mask, q: soft})
    p.grad = q.grad = torch.ones(8)
    q.grad = torch.ones(8)
    optimizer.step()
    mask[:4] = True
    soft[0] = 1.0
    optimizer.step()
    assert p.tolist() == [-1.0] * 4 + [-2.0] * 4
    assert q.tolist() == [-0.5] + [-1.0] * 7
    soft[1] = 7.0
    with pytest.raises(ValueError, match=r"reserved of parameter 1 of group 0 .* values outside \[0, 1\]"):
        optimizer.step()
    assert q.tolist() == [-0.5] + [-1.0] * 7
    assert p.tolist() == [-1.0] * 4 + [-2.0] * 4


def test_given_mask_is_copied_to_bits() -> None:
    p = nn.Parameter(torch.zeros(64, 64))
    optimizer = MaskedSGD([p], 1.0, reserved={p: (torch.rand(64, 64) > 0.5).float()})
    assert optimizer._masks[p].rows.dtype == torch.uint8
    assert optimizer._masks[p].rows.numel() == 512


def test_packed_mask_after_a_change_of_memory_order() -> None:
    p = nn.Parameter(torch.zeros(2, 3, 4, 5))
    r = torch.rand(2, 3, 4, 5) > 0.5
    for given_mask, fine in ((r, True), (ops.pack_mask(r), False)):
        p.data = torch.zeros(2, 3, 4, 5)
        optimizer = MaskedSGD([p], 1.0, reserved={p: given_mask})
        p.data = p.data.contiguous(memory_format=torch.channels_last)
        p.grad = torch.ones_like(p)
        if fine:
            optimizer.step()
            assert torch.equal(p, -(~r).float())
        else:
            with pytest.raises(ValueError, match="packed in the memory order"):
                optimizer.step()


def test_version_counters_are_bumped() -> None:
    p = nn.Parameter(torch.ones(3))
    optimizer = MaskedAdam([p])
    for _ in range(3):  # by lists or new plan, then by a kept plan
        y = (p * p).sum()
        p.grad = torch.ones(3)
        optimizer.step()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.backward()


PARAM = torch.nn.Parameter(torch.zeros(4, 2))
OTHER = torch.nn.Parameter(torch.zeros(4, 2))
BAD: dict[str, tuple[dict[Any, Any] | Any, type[Exception], str]] = {
    "not a parameter": ({OTHER: torch.zeros(4, 2)}, ValueError, r"key \(shape \[4, 2\]\) that is not one of"),
    "not a tensor": ({PARAM: "x"}, TypeError, "is str but must be a tensor or a pair"),
    "key": ({"w": torch.zeros(4, 2)}, ValueError, r"key \(str\)"),
    "not a dict": ([PARAM], TypeError, "reserved is list but must be a dict"),
    "shape": ({PARAM: torch.zeros(4)}, ValueError, r"reserved of parameter 0 of group 0 .*has shape \[4\]"),
    "empty": ({PARAM: torch.zeros(0, dtype=torch.bool)}, ValueError, r"has shape \[0\]"),
    "range": ({PARAM: torch.full((4, 2), 1.1)}, ValueError, r"values outside \[0, 1\] or NaN"),
    "NaN": ({PARAM: torch.full((4, 2), math.nan)}, ValueError, r"values outside \[0, 1\] or NaN"),
    "dtype": ({PARAM: torch.zeros(4, 2, dtype=torch.int64)}, ValueError, "must be bool, uint8"),
    "bytes": ({PARAM: torch.zeros(4, 2, dtype=torch.uint8)}, ValueError, "packed bits"),
    "pair": ({PARAM: (torch.zeros(4), torch.zeros(3))}, ValueError, "must be vectors"),
    "empty pair": ({PARAM: (None, None)}, ValueError, "of which one may be None"),
    "triple": ({PARAM: (torch.zeros(4),) * 3}, ValueError, "must be a pair"),
    "pair range": ({PARAM: (torch.zeros(4) + 2, None)}, ValueError, "values outside"),
    "device": ({PARAM: torch.zeros(4, 2, device="meta")}, ValueError, "must be a CPU tensor"),
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("how", ["MaskedSGD", "MaskedAdam", "protect", "reserve"])
def test_bad_masks(case: str, how: str) -> None:
    reserved, error, message = BAD[case]
    give = {
        "MaskedSGD": lambda: MaskedSGD([PARAM], reserved=reserved),
        "MaskedAdam": lambda: MaskedAdam([PARAM], reserved=reserved),
        "reserve": lambda: MaskedSGD([PARAM]).reserve(reserved),
        "protect": lambda: protect(torch.optim.SGD([PARAM]), reserved),
    }
    with pytest.raises(error, match=message):
        give[how]()


def test_refused() -> None:
    p = nn.Parameter(torch.zeros(5, 2))
    with pytest.raises(ValueError, match="differentiable=True is not supported"):
        MaskedAdam([p], differentiable=True)
    with pytest.raises(ValueError, match="complex parameters"):
        MaskedSGD([nn.Parameter(torch.zeros(2, dtype=torch.complex64))])
    with pytest.raises(ValueError, match="Invalid learning rate"):
        MaskedAdam([p], lr=-1.0)
    with pytest.raises(TypeError, match="LBFGS"):
        protect(torch.optim.LBFGS([p]), {})
    with pytest.raises(TypeError, match="optimizer is int"):
        protect(3, {})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="argument of its own"):
        MaskedSGD([{"params": [p], "reserved": {}}])
    shared = torch.zeros(8)
    a, b = nn.Parameter(shared[:6]), nn.Parameter(shared[2:])
    optimizer = MaskedSGD([a, b])
    a.grad, b.grad = torch.ones(6), torch.ones(6)
    with pytest.raises(ValueError, match="share memory"):
        optimizer.step()
    assert torch.equal(shared, torch.zeros(8))


@pytest.mark.parametrize("kept_plan", [False, True])
def test_sparse_gradients_are_refused(kept_plan: bool) -> None:
    table = nn.Embedding(5, 2, sparse=True)
    other = nn.Parameter(torch.zeros(3))
    for optimizer in (MaskedSGD([other, table.weight], momentum=0.9), MaskedAdam([other, table.weight])):
        other.grad = torch.ones(3)
        table.weight.grad = None
        if kept_plan:
            table.weight.grad = torch.ones(5, 2)
            optimizer.step()
        table.weight.grad = None
        table(torch.tensor([1, 3])).sum().backward()
        before, weights = other.clone(), table.weight.clone()
        with pytest.raises(RuntimeError, match="does not support sparse gradients"):
            optimizer.step()
        assert torch.equal(other, before)
        assert torch.equal(table.weight, weights)
    sparse = torch.optim.SGD([table.weight])
    protect(sparse, {table.weight: torch.zeros(5, 2)})
    with pytest.raises(RuntimeError, match="protect does not support sparse"):
        sparse.step()


class OwnStep(MaskedSGD):
    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


@pytest.mark.parametrize("of", [MaskedSGD, OwnStep, torch.optim.SGD])
def test_hooks_run_once(of: Any) -> None:
    """torch's wrapper around `step` is left out only where nobody would notice."""
    p, ran = nn.Parameter(torch.zeros(3)), []
    optimizer = of([p], 1.0)
    p.grad = torch.ones(3)
    optimizer.step()
    handles = [
        optimizer.register_step_pre_hook(lambda *_: ran.append("pre")),
        optimizer.register_step_post_hook(lambda *_: ran.append("post")),
        register_optimizer_step_pre_hook(lambda *_: ran.append("global pre")),
        register_optimizer_step_post_hook(lambda *_: ran.append("global post")),
    ]
    assert optimizer.step(lambda: 7.0) == 7.0
    assert ran == ["global pre", "pre", "post", "global post"]
    for left in (4, 3, 2, 1, 0):  # one kind less each time, and none at last
        ran.clear()
        optimizer.step()
        kinds = ["pre", "post", "global pre", "global post"][4 - left :]
        assert sorted(ran) == sorted(kinds)
        if left:
            handles[4 - left].remove()
    assert p.tolist() == [-7.0] * 3
    with torch.profiler.profile() as profile:
        optimizer.step()
    assert [e.name for e in profile.events() if "Optimizer.step" in e.name] == [f"Optimizer.step#{of.__name__}.step"]


def test_an_optimizer_is_collected_with_its_plan() -> None:
    """A plan knows addresses only: what it held for itself, the collector could not see."""

    def stepped() -> weakref.ref[nn.Parameter]:
        p = nn.Parameter(torch.ones(3))
        optimizer = MaskedAdam([p])
        p.optimizer = optimizer
        p.grad = torch.ones(3)
        optimizer.step()
        assert (optimizer._plan is not None) == _direct.available
        return weakref.ref(p)

    gone = stepped()
    gc.collect()
    assert gone() is None


def test_wrong_numbers_change_nothing() -> None:
    p = nn.Parameter(torch.ones(3))
    optimizer = MaskedAdam([p])
    p.grad = torch.ones(3)
    for _ in range(2):
        optimizer.step()
        optimizer.param_groups[0]["lr"] = "fast"
        before = p.detach().clone(), optimizer.state[p]["step"].item()
        with pytest.raises((TypeError, ValueError)):
            optimizer.step()
        assert torch.equal(p, before[0])
        assert optimizer.state[p]["step"] == before[1]
        optimizer.param_groups[0]["lr"] = torch.tensor(0.1)  # a number too
    optimizer.step()


def test_other_threads_and_processes() -> None:
    """The same bits for any number of threads."""
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        torch.manual_seed(0)
        p = nn.Parameter(torch.randn(300, 333))
        optimizer = MaskedAdam([p], 0.1, reserved={p: torch.rand(300, 333)})
        for step in range(3):
            set_gradients([p], step)
            optimizer.step()
        results.append(p.detach())
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
