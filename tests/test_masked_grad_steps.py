"""masked_sgd_, masked_adam_, masked_grad_any_ and packed masks: float64 oracles, bits that stay, bad input."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastcl import ops

from .samples import FLOATS, WIDTHS

NONE = torch.zeros(0)


def bits(t: Tensor) -> Tensor:
    """The stored bits, so that NaN equals itself and -0 differs from 0."""
    kinds = {8: torch.int64, 4: torch.int32, 2: torch.int16}
    return t.detach().clone(memory_format=torch.contiguous_format).view(kinds[t.element_size()])


def free(given: Any, shape: tuple[int, ...]) -> Tensor:
    """1 - r in float64, of a mask in any form."""
    if isinstance(given, tuple):
        rows, columns = (t.double() for t in given)
        r = torch.minimum(rows[:, None], columns[None, :]).reshape(*shape[:2], *[1] * (len(shape) - 2))
        return (1 - r).expand(shape)
    if given.dtype == torch.uint8:
        return 1 - ops.unpack_mask(given, torch.zeros(shape)).double()
    return 1 - given.double()


def masks(form: str, shape: tuple[int, ...], dtype: torch.dtype) -> Any:
    if form == "bool":
        return torch.rand(shape) > 0.5
    if form == "bits":
        return ops.pack_mask(torch.rand(shape) > 0.5)
    if form == "float":
        r = torch.rand(shape)
        return torch.where(r > 0.6, 1.0, r).to(dtype)
    return torch.rand(shape[0]).round(decimals=1).to(dtype), torch.rand(shape[1]).round().to(dtype)


FORMS = ["bool", "bits", "float", "vectors"]


def lists(given: Any) -> tuple[list[Tensor], list[Tensor]]:
    return ([given[0]], [given[1]]) if isinstance(given, tuple) else ([given], [])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("maximize", [False, True])
def test_sgd_is_torchs_on_masked_gradients(form: str, nesterov: bool, maximize: bool) -> None:
    """Three steps against torch.optim.SGD in float64, whose reserved entries are put back."""
    shape = (37, 29)
    r = masks(form, shape, torch.float64)
    share = free(r, shape)
    p, want = torch.randn(shape, dtype=torch.float64), torch.nn.Parameter(torch.empty(shape, dtype=torch.float64))
    want.data.copy_(p)
    start, b = p.clone(), torch.zeros_like(p)
    dampening = 0.0 if nesterov else 0.3
    oracle = torch.optim.SGD(
        [want], 0.1, momentum=0.9, dampening=dampening, weight_decay=0.2, nesterov=nesterov, maximize=maximize
    )
    for step in range(3):
        g = torch.randn(shape, dtype=torch.float64)
        ops.masked_sgd_([p], [b], [g], *lists(r), 0.1, 0.9, dampening, 0.2, nesterov, maximize, step == 0)
        want.grad = g * share
        oracle.step()
        want.data[share == 0] = start[share == 0]
    torch.testing.assert_close(p, want.data, rtol=1e-12, atol=1e-12)
    live = share != 0
    torch.testing.assert_close(b[live], oracle.state[want]["momentum_buffer"][live], rtol=1e-12, atol=1e-12)
    assert live.any()
    assert (~live).any()
    assert (b[~live] == 0).all()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("decoupled", [False, True])
@pytest.mark.parametrize("amsgrad", [False, True])
def test_adam_is_torchs_on_masked_gradients(form: str, decoupled: bool, amsgrad: bool) -> None:
    shape = (37, 29)
    r = masks(form, shape, torch.float64)
    share = free(r, shape)
    p = torch.randn(shape, dtype=torch.float64)
    want = torch.nn.Parameter(p.clone())
    start, m, v, top, step = p.clone(), torch.zeros_like(p), torch.zeros_like(p), torch.zeros_like(p), torch.zeros(())
    oracle = torch.optim.Adam(
        [want], 0.1, (0.8, 0.95), 1e-6, weight_decay=0.2, amsgrad=amsgrad, decoupled_weight_decay=decoupled
    )
    for _ in range(4):
        g = torch.randn(shape, dtype=torch.float64)
        tops = [top] if amsgrad else []
        ops.masked_adam_([p], [m], [v], tops, [step], [g], *lists(r), 0.1, 0.8, 0.95, 1e-6, 0.2, decoupled)
        want.grad = g * share
        oracle.step()
        want.data[share == 0] = start[share == 0]
    live, state = share != 0, oracle.state[want]
    torch.testing.assert_close(p, want.data, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(m[live], state["exp_avg"][live], rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(v[live], state["exp_avg_sq"][live], rtol=1e-12, atol=1e-14)
    if amsgrad:
        torch.testing.assert_close(top[live], state["max_exp_avg_sq"][live], rtol=1e-12, atol=1e-14)
    assert step == 4
    assert (m[~live] == 0).all()


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed", "odd"])
def test_two_vectors_in_any_memory_order(layout: str) -> None:
    shape = (6, 5, 3, 4)
    order = {
        "contiguous": (0, 1, 2, 3),
        "channels_last": (0, 2, 3, 1),
        "transposed": (1, 0, 2, 3),
        "odd": (3, 1, 0, 2),
    }[layout]
    back = sorted(range(4), key=order.__getitem__)
    g = torch.randn(shape).permute(order).contiguous().permute(back)
    rows, columns = torch.rand(6).round(decimals=1), torch.tensor([0.0, 1.0, 0.3, 1.0, 0.8])
    want = g * free((rows, columns), shape).float()
    ops.masked_grad_([g], [(rows, columns)])
    torch.testing.assert_close(g, want, rtol=1e-6, atol=0)
    assert (g[:, 1][rows == 1] == 0).all()


@pytest.mark.parametrize("n", WIDTHS)
def test_packed_is_the_bool_mask(n: int) -> None:
    r = torch.rand(n) > 0.5
    packed = ops.pack_mask(r)
    assert packed.shape == ((n + 7) // 8,)
    assert all(bool(packed[i // 8] >> (i % 8) & 1) == bool(r[i]) for i in range(min(n, 100)))
    assert torch.equal(ops.unpack_mask(packed, r), r)
    a, b = torch.randn(n), None
    b = a.clone()
    a[::2] = math.inf
    b[::2] = math.inf
    ops.masked_grad_([a], [r])
    ops.masked_grad_([b], [packed])
    assert torch.equal(a, b)


def test_packed_counts_in_memory_order() -> None:
    r = (torch.rand(3, 4, 5, 6) > 0.5).contiguous(memory_format=torch.channels_last)
    packed = ops.pack_mask(r)
    assert torch.equal(packed, ops.pack_mask(r.permute(0, 2, 3, 1).contiguous()))
    assert not torch.equal(packed, ops.pack_mask(r.contiguous()))
    assert torch.equal(ops.unpack_mask(packed, r), r)
    assert ops.unpack_mask(packed, r).stride() == r.stride()
    p = torch.randn(3, 4, 5, 6).contiguous(memory_format=torch.channels_last)
    start = p.clone()
    ops.masked_sgd_([p], [], [torch.ones_like(p)], [packed], [], 0.5)
    assert torch.equal(p, torch.where(r, start, start - 0.5))


def test_tensors_with_gaps_are_written_back() -> None:
    whole = torch.randn(10, 8)
    p, g, r = whole[:, ::2], torch.randn(10, 4), torch.rand(10, 4) > 0.5
    start, other = p.clone(), whole[:, 1::2].clone()
    ops.masked_sgd_([p], [], [g], [r], [], 0.5)
    torch.testing.assert_close(p, torch.where(r, start, start - 0.5 * g))
    assert torch.equal(whole[:, 1::2], other)


special = st.sampled_from([0.0, -0.0, 1.0, -3.5, 1e-30, math.inf, -math.inf, math.nan])
ordinary = st.floats(-100, 100, width=16)


@settings(max_examples=150, deadline=None)
@given(
    data=st.data(),
    n=st.integers(1, 200),
    dtype=st.sampled_from(FLOATS),
    form=st.sampled_from(["bool", "bits", "float"]),
    adam=st.booleans(),
    steps=st.integers(1, 5),
    seed=st.integers(0, 2**31),
)
def test_reserved_entries_keep_every_bit(
    data: Any, n: int, dtype: torch.dtype, form: str, adam: bool, steps: int, seed: int
) -> None:
    """Whatever stands in the weights, the stale state and the gradients: NaN payloads, infinities, -0."""
    generator = torch.Generator().manual_seed(seed)
    kind = {8: torch.int64, 4: torch.int32, 2: torch.int16}[torch.empty((), dtype=dtype).element_size()]
    limits = torch.iinfo(kind)

    def raw() -> Tensor:  # any bit pattern at all
        return torch.randint(limits.min, limits.max, (n,), generator=generator, dtype=kind).view(dtype)

    r = torch.rand(n, generator=generator) > 0.5
    given_mask = {"bool": r, "bits": ops.pack_mask(r), "float": r.to(dtype)}[form]
    p, states = raw(), [raw() for _ in range(3)]
    before = [bits(t) for t in (p, *states)]
    number = data.draw(st.one_of(special, ordinary))
    for i in range(steps):
        g = raw() if i % 2 else torch.full((n,), number).to(dtype)
        if adam:
            count = torch.full((), float(data.draw(st.integers(0, 1000))))
            decoupled = data.draw(st.booleans())
            ops.masked_adam_(
                [p], *[[s] for s in states], [count], [g], [given_mask], [], 0.1, 0.9, 0.99, 1e-8, 0.3, decoupled
            )
        else:
            ops.masked_sgd_([p], states[:1], [g], [given_mask], [], 0.1, 0.9, 0.1, 0.3, False, True, i == 0)
    for t, old in zip((p, *states), before, strict=True):
        assert torch.equal(bits(t)[r], old[r])
    finite = torch.isfinite(torch.zeros(n, dtype=dtype)) & ~r
    if finite.any() and number not in (0.0, -0.0) and adam:
        assert not torch.equal(bits(states[0])[finite], before[1][finite])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rounds_once(dtype: torch.dtype) -> None:
    """Arithmetic in float32 on the stored values, each rounded when it is stored."""
    p, g, m, v = (torch.randn(1000).to(dtype) for _ in range(4))
    v = v.abs()
    exact = [t.float() for t in (p, g, m, v)]
    step, step32 = torch.full((), 9.0), torch.full((), 9.0)
    ops.masked_adam_([p], [m], [v], [], [step], [g], [], [], 0.1)
    ops.masked_adam_([exact[0]], [exact[2]], [exact[3]], [], [step32], [exact[1]], [], [], 0.1)
    for half, full in zip((p, m, v), (exact[0], exact[2], exact[3]), strict=True):
        assert torch.equal(half, full.to(dtype))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("form", ["bool", "bits", "float"])
def test_units_that_are_reserved_or_free_as_a_whole(form: str, dtype: torch.dtype) -> None:
    """Runs of one mask value, which are left out as blocks, and the same weights shuffled, which are not."""
    runs = torch.tensor([0, 64, 63, 1, 200, 130, 64, 64, 54])
    r = torch.repeat_interleave(torch.arange(len(runs)) % 2 == 1, runs)
    order = torch.randperm(len(r))
    p, g, b, m = (torch.randn(len(r)).to(dtype) for _ in range(4))
    g[torch.rand(len(r)) > 0.9] = math.nan  # where it is reserved, no matter
    v = torch.rand(len(r)).to(dtype)

    def everything(at: Tensor) -> list[Tensor]:
        mask = r[at] if form == "bool" else ops.pack_mask(r[at]) if form == "bits" else r[at].to(dtype)
        found = [t[at].clone() for t in (p, b, p, m, v, g)]
        ops.masked_sgd_([found[0]], [found[1]], [g[at]], [mask], [], 0.1, 0.9)
        ops.masked_adam_([found[2]], [found[3]], [found[4]], [], [torch.zeros(())], [g[at]], [mask], [], 0.1)
        ops.masked_grad_([found[5]], [mask])
        return found

    together, apart = everything(torch.arange(len(r))), everything(order)
    assert all(torch.equal(bits(a[order]), bits(b)) for a, b in zip(together, apart, strict=True))
    assert all(torch.equal(bits(t[r]), bits(old[r])) for t, old in zip(together, (p, b, p, m, v), strict=False))
    assert (together[5][r] == 0).all()
    assert torch.equal(bits(together[5][~r]), bits(g[~r]))


def sgd(p: Tensor, **change: Any) -> None:
    arguments = {
        "params": [p], "momentum_buffers": [torch.zeros(4)], "grads": [torch.ones(4)], "reserved": [torch.zeros(4)],
        "columns": [], "lr": 0.1, "momentum": 0.9,
    }  # fmt: skip
    ops.masked_sgd_(**{**arguments, **change})


def adam(p: Tensor, **change: Any) -> None:
    arguments = {
        "params": [p], "exp_avgs": [torch.zeros(4)], "exp_avg_sqs": [torch.zeros(4)], "max_exp_avg_sqs": [],
        "steps": [torch.zeros(())], "grads": [torch.ones(4)], "reserved": [torch.zeros(4)], "columns": [], "lr": 0.1,
    }  # fmt: skip
    ops.masked_adam_(**{**arguments, **change})


BAD = {
    "lr": (sgd, {"lr": -1.0}, "lr is -1"),
    "lr NaN": (adam, {"lr": math.nan}, "lr is nan"),
    "beta": (adam, {"beta1": 1.0}, "beta1 is 1 "),
    "eps": (adam, {"eps": -1e-9}, "eps is -1e-09"),
    "decay": (adam, {"weight_decay": -0.1}, "weight_decay is -0.1"),
    "nesterov": (sgd, {"nesterov": True, "dampening": 0.1}, "nesterov is true"),
    "buffers": (sgd, {"momentum_buffers": []}, "momentum_buffers must be given"),
    "no momentum": (sgd, {"momentum": 0.0}, "momentum_buffers must be given"),
    "grads": (sgd, {"grads": []}, "grads has 0 tensors but must have as many as params, 1"),
    "moments": (adam, {"exp_avgs": []}, "exp_avgs has 0 tensors"),
    "counts": (adam, {"steps": []}, "steps has 0 tensors"),
    "count": (adam, {"steps": [torch.zeros((), dtype=torch.int64)]}, r"steps\[0\] must be one float32 or float64"),
    "shape": (adam, {"grads": [torch.ones(3)]}, r"grads\[0\] has shape \[3\] but must .* \[4\]"),
    "dtype": (adam, {"grads": [torch.ones(4).double()]}, r"grads\[0\] must have the dtype of params\[0\]"),
    "state dtype": (sgd, {"momentum_buffers": [torch.ones(4).double()]}, r"momentum_buffers\[0\] must have the dtype"),
    "mask range": (adam, {"reserved": [torch.full((4,), 1.5)]}, r"reserved\[0\] has values outside \[0, 1\]"),
    "mask NaN": (sgd, {"reserved": [torch.full((4,), math.nan)]}, "or NaN"),
    "mask shape": (sgd, {"reserved": [torch.zeros(3)]}, r"reserved\[0\] has shape \[3\]"),
    "mask dtype": (sgd, {"reserved": [torch.zeros(4, dtype=torch.int32)]}, r"reserved\[0\] must be bool, uint8"),
    "bytes": (sgd, {"reserved": [torch.zeros(4, dtype=torch.uint8)]}, r"reserved\[0\] has 4 bytes .* of 1"),
    "columns": (sgd, {"reserved": [torch.zeros(4)], "columns": [torch.zeros(2)]}, r"must be vectors with one"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_raises_before_writing(case: str) -> None:
    step, change, message = BAD[case]
    p = torch.tensor([0.1, 0.2, 0.3, 0.4])
    before = p.clone()
    with pytest.raises(ValueError, match=message):
        step(p, **change)
    assert torch.equal(p, before)
    assert p._version == 0


def test_shared_memory_is_refused() -> None:
    p = torch.randn(4)
    before = p.clone()
    for change in ({"momentum_buffers": [p]}, {"grads": [p]}, {"reserved": [p]}):
        with pytest.raises(ValueError, match="shares memory"):
            sgd(p, **change)
    assert torch.equal(p, before)


def test_packing_refuses() -> None:
    with pytest.raises(ValueError, match="mask must be a bool"):
        ops.pack_mask(torch.zeros(4))
    with pytest.raises(ValueError, match="packed must be uint8 of one dimension with 2 bytes"):
        ops.unpack_mask(torch.zeros(1, dtype=torch.uint8), torch.zeros(9))
    with pytest.raises(ValueError, match="packed must be uint8"):
        ops.unpack_mask(torch.zeros(2), torch.zeros(9))
