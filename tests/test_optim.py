"""MaskedSGD, MaskedAdam, protect: torch's results without masks, frozen bits with them, and torch's habits."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fastcl import ops
from fastcl.ops import _direct
from fastcl.optim import MaskedAdam, MaskedSGD, protect

from .test_masked_grad_steps import bits

SHAPES = [(33, 65), (4, 3, 5, 5), (70,), (1,), (0, 3), ()]
PAIRS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "sgd": (MaskedSGD, torch.optim.SGD),
    "adam": (MaskedAdam, torch.optim.Adam),
    "adamw": (
        lambda p, **k: MaskedAdam(p, decoupled_weight_decay=True, **{"weight_decay": 0.01, **k}),
        lambda p, **k: torch.optim.AdamW(p, **{"weight_decay": 0.01, **k}),
    ),
}
OPTIONS: list[tuple[str, dict[str, Any]]] = [
    ("sgd", {"lr": 0.1}),
    ("sgd", {"lr": 0.1, "weight_decay": 0.1, "maximize": True}),
    ("sgd", {"lr": 0.1, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.1}),
    ("sgd", {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
    ("sgd", {"lr": torch.tensor(0.1), "momentum": 0.9}),
    ("adam", {"lr": 0.01}),
    ("adam", {"lr": 0.01, "betas": (0.5, 0.999), "eps": 1e-5, "weight_decay": 0.1, "maximize": True}),
    ("adam", {"lr": 0.01, "amsgrad": True}),
    ("adamw", {"lr": 0.01, "weight_decay": 0.1}),
    ("adamw", {"lr": 0.01, "amsgrad": True}),
]


def parameters(dtype: torch.dtype = torch.float32, seed: int = 1) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    made = [torch.randn(s, generator=generator).to(dtype) for s in SHAPES]
    made[1] = made[1].contiguous(memory_format=torch.channels_last)
    return [nn.Parameter(t) for t in made]


def set_gradients(params: list[nn.Parameter], seed: int, as_autograd: bool = True) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in params:
        g = torch.randn(p.shape, generator=generator).to(p.dtype)
        p.grad = torch.empty_like(p).copy_(g) if as_autograd else g


def train(make: Callable[..., Any], options: dict[str, Any], dtype: torch.dtype, steps: int = 6, **how: Any) -> Any:
    params = parameters(dtype)
    optimizer = make(params, **options)
    for step in range(steps):
        set_gradients(params, step, **how)
        optimizer.step()
    return params, optimizer


@pytest.mark.parametrize("as_autograd", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("name", "options"), OPTIONS)
def test_without_masks_is_torchs(name: str, options: dict[str, Any], dtype: torch.dtype, as_autograd: bool) -> None:
    mine, theirs = PAIRS[name]
    (a, x), (b, y) = (train(make, options, dtype, as_autograd=as_autograd) for make in (mine, theirs))
    tight = {} if dtype == torch.float32 else {"rtol": 1e-12, "atol": 1e-14}
    for p, q in zip(a, b, strict=True):
        torch.testing.assert_close(p, q, **tight)
        assert set(x.state[p]) == set(y.state[q])
        for key, value in y.state[q].items():
            if value is not None:
                torch.testing.assert_close(x.state[p][key], value, **tight)
    assert (x._plan is not None) == (as_autograd and _direct.available)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("name", "options"), [OPTIONS[2], OPTIONS[5], OPTIONS[8]])
def test_half_precision_parameters_move(name: str, options: dict[str, Any], dtype: torch.dtype) -> None:
    """One step equals torch's on float32 copies, rounded; torch 2.13's own fused SGD leaves most entries unmoved."""
    mine, theirs = PAIRS[name]
    a, _ = train(mine, options, dtype, steps=1)
    b = [nn.Parameter(p.detach().float()) for p in parameters(dtype)]
    optimizer = theirs(b, **options)
    set_gradients(b, 0)
    for q in b:
        q.grad = q.grad.to(dtype).float()
    optimizer.step()
    for p, q, start in zip(a, b, parameters(dtype), strict=True):
        torch.testing.assert_close(p, q.to(dtype), rtol=1e-2, atol=1e-6)
        if p.numel() > 60:
            assert (p != start).float().mean() > 0.6


def masks_for(params: list[nn.Parameter], form: str, seed: int = 5) -> dict[Tensor, Any]:
    generator = torch.Generator().manual_seed(seed)
    found: dict[Tensor, Any] = {}
    for p in params[:-1]:  # the last has none
        r = torch.empty_like(p, dtype=torch.bool).copy_(torch.rand(p.shape, generator=generator) > 0.5)
        if form == "vectors" and p.dim() > 1 and p.numel():
            found[p] = ((torch.arange(p.shape[0]) % 2).float(), (torch.arange(p.shape[1]) % 3 > 0).float())
        elif form == "one vector" and p.dim() > 1 and p.numel():
            found[p] = ((torch.arange(p.shape[0]) % 2).bool(), None)
        else:
            found[p] = {"bits": ops.pack_mask(r), "float": r.to(p.dtype)}.get(form, r)
    return found


def dense(p: Tensor, given: Any) -> Tensor:
    if isinstance(given, tuple):
        rows = given[0].float().reshape(-1, 1)
        columns = torch.ones(1, p.shape[1]) if given[1] is None else given[1].float().reshape(1, -1)
        return (torch.minimum(rows, columns) == 1).reshape(*p.shape[:2], *[1] * (p.dim() - 2)).expand(p.shape)
    return ops.unpack_mask(given, p) if given.dtype == torch.uint8 else given == 1


FORMS = ["bool", "bits", "float", "vectors", "one vector"]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("name", "options"), [OPTIONS[2], OPTIONS[6], OPTIONS[8], OPTIONS[9]])
def test_reserved_entries_keep_every_bit_and_the_rest_is_torchs(name: str, options: dict[str, Any], form: str) -> None:
    """State grown before the masks come: stale moments, then weight decay on reserved weights."""
    mine, theirs = PAIRS[name]
    (a, x), (b, y) = train(mine, options, torch.float32), train(theirs, options, torch.float32)
    masks = masks_for(a, form)
    x.reserve(masks)
    before = {p: [bits(t) for t in (p, *_of_shape(x, p))] for p in a}
    for step in range(20):
        set_gradients(a, 100 + step)
        set_gradients(b, 100 + step)
        for p, q in zip(a, b, strict=True):
            if p in masks:
                q.grad.masked_fill_(dense(p, masks[p]), 0)
        x.step()
        y.step()
    for p, q in zip(a, b, strict=True):
        frozen = dense(p, masks[p]) if p in masks else torch.zeros_like(p, dtype=torch.bool)
        for t, old in zip((p, *_of_shape(x, p)), before[p], strict=True):
            assert torch.equal(bits(t)[frozen], old[frozen])
        torch.testing.assert_close(p[~frozen], q[~frozen])
        if p.numel() > 60:
            assert frozen.any()
            assert not torch.equal(p[~frozen], parameters()[_index(a, p)][~frozen])
            assert not torch.equal(p[frozen], q[frozen])  # torch's moved them, masked gradients or not


def _index(params: list[nn.Parameter], p: nn.Parameter) -> int:
    return next(i for i, q in enumerate(params) if q is p)


def _of_shape(optimizer: Any, p: Tensor) -> list[Tensor]:
    return [t for t in optimizer.state[p].values() if isinstance(t, Tensor) and t.shape == p.shape and t.dim()]


OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], Any]] = {
    "MaskedSGD": lambda p: MaskedSGD(p, 0.1, momentum=0.9, weight_decay=0.1),
    "MaskedAdam": lambda p: MaskedAdam(p, 0.1, weight_decay=0.1, amsgrad=True),
    "SGD": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.1, nesterov=True),
    "AdamW": lambda p: torch.optim.AdamW(p, 0.1, weight_decay=0.1),
    "fused Adam": lambda p: torch.optim.Adam(p, 0.1, weight_decay=0.1, fused=True),
    "Adagrad": lambda p: torch.optim.Adagrad(p, 0.1, weight_decay=0.1, initial_accumulator_value=0.1),
    "RMSprop": lambda p: torch.optim.RMSprop(p, 0.1, momentum=0.5, centered=True),
    "Rprop": lambda p: torch.optim.Rprop(p, 0.1),
    "NAdam": lambda p: torch.optim.NAdam(p, 0.1),
    "Adadelta": lambda p: torch.optim.Adadelta(p, 0.1),
    "Adamax": lambda p: torch.optim.Adamax(p, 0.1),
    "ASGD": lambda p: torch.optim.ASGD(p, 0.1),
    "RAdam": lambda p: torch.optim.RAdam(p, 0.1),
    "Adafactor": lambda p: torch.optim.Adafactor(p, 0.1),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@settings(max_examples=12, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    form=st.sampled_from(FORMS),
    warm=st.integers(0, 4),
    steps=st.integers(1, 70),
)
def test_bit_identity(name: str, seed: int, dtype: torch.dtype, form: str, warm: int, steps: int) -> None:
    """Over dtypes, shapes, optimizers and in all some thousands of random steps, from stale state or from none."""
    params = parameters(dtype, seed)
    if name == "Adafactor":
        params.pop(4)  # torch's divides by zero on an empty parameter
    optimizer = OPTIMIZERS[name](params)
    for step in range(warm):
        set_gradients(params, seed + step)
        optimizer.step()
    masks = masks_for(params, form, seed)
    if isinstance(optimizer, (MaskedSGD, MaskedAdam)):
        optimizer.reserve(masks)
    else:
        protect(optimizer, masks)
    before: dict[Tensor, dict[str, Tensor]] = {p: {"": bits(p)} for p in params}
    for step in range(steps):
        set_gradients(params, seed + 1000 + step)
        params[0].grad[0, 0] = (1.0, math.inf, math.nan)[step % 3]
        optimizer.step()
        for p, given_mask in masks.items():
            frozen = dense(p, given_mask)
            now = {"": p, **{k: t for k, t in optimizer.state[p].items() if t.shape == p.shape and p.dim()}}
            for key, t in now.items():
                old = before[p].setdefault(key, bits(t))
                assert torch.equal(bits(t)[frozen], old[frozen]), (key, step)
    assert not torch.equal(params[0], parameters(dtype, seed)[0])


def test_thousand_steps() -> None:
    for make in (OPTIMIZERS["MaskedSGD"], OPTIMIZERS["MaskedAdam"]):
        params = parameters()
        optimizer = make(params)
        set_gradients(params, 0)
        optimizer.step()
        masks = masks_for(params, "bool")
        optimizer.reserve(masks)
        before = {p: [bits(t) for t in (p, *_of_shape(optimizer, p))] for p in params}
        for step in range(1000):
            set_gradients(params, step)
            optimizer.step()
        for p, mask in masks.items():
            for t, old in zip((p, *_of_shape(optimizer, p)), before[p], strict=True):
                assert torch.equal(bits(t)[mask], old[mask])
                assert t.numel() == 0 or mask.all() or not torch.equal(bits(t)[~mask], old[~mask])


def test_soft_masks_scale_the_gradient() -> None:
    p, q = (nn.Parameter(torch.linspace(-1, 1, 50)) for _ in range(2))
    r = torch.linspace(0, 0.98, 50)
    a, b = MaskedSGD([p], 0.1, momentum=0.9, reserved={p: r}), torch.optim.SGD([q], 0.1, momentum=0.9)
    for step in range(5):
        for t in (p, q):
            set_gradients([t], step)
        q.grad *= 1 - r
        a.step()
        b.step()
    torch.testing.assert_close(p, q)


def test_protect_is_the_masked_optimizer() -> None:
    """The same parameters and state, from a fresh start, hooks or kernel."""
    for kind, torchs, options in (
        (MaskedAdam, torch.optim.Adam, {"lr": 0.1, "weight_decay": 0.2}),
        (MaskedSGD, torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.2}),
    ):
        a, b = parameters(), parameters()
        x, y = kind(a, **options, reserved=masks_for(a, "bool")), torchs(b, **options)
        handle = protect(y, masks_for(b, "bool"))
        for step in range(4):
            set_gradients(a, step)
            set_gradients(b, step)
            x.step()
            y.step()
        for p, q in zip(a, b, strict=True):
            torch.testing.assert_close(p, q)
            for key in y.state[q]:
                torch.testing.assert_close(x.state[p][key], y.state[q][key])
        before = b[0].clone()
        handle.remove()
        set_gradients(b, 9)
        y.step()
        assert ((b[0] != before).float().mean() > 0.9).item()


def test_closures() -> None:
    def loss_of(p: Tensor) -> Callable[[], Tensor]:
        def closure() -> Tensor:
            p.grad = None
            loss = (p - 3).square().sum()
            loss.backward()
            return loss

        return closure

    mask = torch.tensor([1.0, 0.5, 0.0])
    p, q = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(3))
    x, y = MaskedSGD([p], 0.1, reserved={p: mask}), torch.optim.SGD([q], 0.1)
    protect(y, {q: mask})
    for step in range(3):
        first = x.step(loss_of(p))
        second = y.step(loss_of(q)) if step % 2 else y.step(closure=loss_of(q))
        torch.testing.assert_close(first, second, rtol=1e-6, atol=0)  # without FMA the last bits differ from torch's
    torch.testing.assert_close(p, q, rtol=1e-6, atol=0)
    assert p[0] == 0
    assert 0 < p[1] < p[2]


def test_groups_schedulers_and_late_parameters() -> None:
    def run(kind: Any) -> list[Tensor]:
        a, b = parameters(), [nn.Parameter(torch.ones(9))]
        groups = [{"params": a[:3], "lr": 0.3}, {"params": a[3:], "weight_decay": 0.1}]
        optimizer = kind(groups, lr=0.1, momentum=0.9)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
        for step in range(6):
            if step == 3:
                optimizer.add_param_group({"params": b, "lr": 0.7})
            if step == 4:
                optimizer.param_groups[0]["momentum"] = 0.5
            set_gradients(a + b, step)
            if step == 2:
                a[0].grad = None  # skipped, its momentum waits
            optimizer.step()
            scheduler.step()
        return a + b

    for p, q in zip(run(MaskedSGD), run(torch.optim.SGD), strict=True):
        torch.testing.assert_close(p, q)


@pytest.mark.parametrize(("name", "options"), [OPTIONS[2], OPTIONS[7], OPTIONS[8]])
def test_state_dict_goes_to_torch_and_back(name: str, options: dict[str, Any]) -> None:
    mine, theirs = PAIRS[name]
    a, x = train(mine, options, torch.float32)
    b = [nn.Parameter(p.detach().clone(memory_format=torch.preserve_format)) for p in a]
    y = theirs(b, **options)
    y.load_state_dict(copy.deepcopy(x.state_dict()))
    c = [nn.Parameter(p.detach().clone(memory_format=torch.preserve_format)) for p in a]
    z = mine(c, **{**options, "lr": 9.0})
    set_gradients(c, 50)
    z.step()  # has a plan and other state
    for p, q in zip(c, a, strict=True):
        p.data.copy_(q)
    z.load_state_dict(copy.deepcopy(y.state_dict()))
    for step in range(3):
        for params, optimizer in ((a, x), (b, y), (c, z)):
            set_gradients(params, 60 + step)
            optimizer.step()
    for p, q, r in zip(a, b, c, strict=True):
        torch.testing.assert_close(p, q)
        assert torch.equal(p, r)


def test_copies_keep_their_masks() -> None:
    p = nn.Parameter(torch.ones(6))
    optimizer = MaskedAdam([p], 0.1, reserved={p: torch.arange(6) < 3})
    for made in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        q = made.param_groups[0]["params"][0]
        assert q is not p
        q.grad = torch.ones(6)
        made.step()
        assert q[:3].tolist() == [1.0] * 3
        assert (q[3:] < 1).all()
    assert p.tolist() == [1.0] * 6


def test_grad_scaler_skips_and_scales() -> None:
    p = nn.Parameter(torch.ones(4))
    optimizer = MaskedAdam([p], 0.1, reserved={p: torch.tensor([True, False, False, False])}, fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale((p * torch.tensor([1.0, 2.0, math.inf, 1.0])).sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    assert p.tolist() == [1.0] * 4
    assert not optimizer.state
    optimizer.zero_grad()
    scaler.scale((p * torch.tensor([1.0, 2.0, 3.0, 4.0])).sum()).backward()
    scaler.step(optimizer)
    assert p[0] == 1
    torch.testing.assert_close(p.detach()[1:], torch.full((3,), 0.9))
    torch.testing.assert_close(optimizer.state[p]["exp_avg"], torch.tensor([0.0, 0.2, 0.3, 0.4]))
