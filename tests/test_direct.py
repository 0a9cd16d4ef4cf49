"""List ops straight in the library (fastcl/ops/_direct.py): what they do there, and when they do not."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

from fastcl import ops
from fastcl.ops import _direct
from fastcl.ops.importance import path
from fastcl.ops.masked_grad import _direct_masked_grad_

from .watchers import seen_by_a_mode, seen_by_the_profiler

pytestmark = pytest.mark.skipif(not _direct.available, reason="this torch has no C exchange API, or no kernels")
SHAPES = [(3, 5), (), (1,), (0, 2), (40000,), (2, 3, 4, 5), (7,)]
Lists = list[list[torch.Tensor]]


def randn(dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    return [torch.randn(shape).to(dtype) for shape in SHAPES]


def wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def masks(kind: str) -> list[torch.Tensor]:
    found = [torch.rand(shape) for shape in SHAPES]
    if kind == "float":
        return [m.where(m < 0.7, 1.0) for m in found]
    bools = [m < 0.5 for m in found]
    return [ops.pack_mask(m) for m in bools] if kind == "packed" else bools


def squares(dtype: torch.dtype) -> list[torch.Tensor]:
    return [t.square() for t in randn(wide(dtype))]


# the op as its users call it, its Direct, its lists, the rest of its arguments
CASES: dict[str, tuple[Callable[..., None], _direct.Direct, Callable[[torch.dtype], Lists], tuple[float, ...]]] = {
    **{
        f"masked_grad_ {kind}": (ops.masked_grad_, _direct_masked_grad_, lambda d, k=kind: [randn(d), masks(k)], ())
        for kind in ("bool", "float", "packed")
    },
    "accumulate_path_": (
        ops.accumulate_path_,
        path._direct_accumulate_path_,
        lambda d: [randn(wide(d)), randn(d), randn(d), randn(d)],
        (),
    ),
    "accumulate_walk_": (
        ops.accumulate_walk_,
        path._direct_accumulate_walk_,
        lambda d: [squares(d), randn(wide(d)), randn(wide(d)), randn(d), randn(d), randn(d)],
        (0.3,),
    ),
    "merge_importances_": (
        ops.merge_importances_,
        path._direct_merge_importances_,
        lambda d: [squares(d), squares(d)],
        (0.5, 2.0),
    ),
}


@pytest.fixture(autouse=True)
def forgotten() -> None:
    for _, direct, _, _ in CASES.values():
        direct.calls.forget()


def no_dispatch(monkeypatch: pytest.MonkeyPatch, direct: _direct.Direct) -> None:
    def fail(*_: Any) -> None:
        raise AssertionError("through the dispatcher")

    monkeypatch.setattr(direct, "otherwise", fail)


def clones(lists: Lists) -> Lists:
    return [[t.clone() for t in tensors] for tensors in lists]


def equal(a: Lists, b: Lists) -> bool:
    return all(torch.equal(x, y) for one, other in zip(a, b, strict=True) for x, y in zip(one, other, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", CASES)
def test_it_does_what_the_op_does(case: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    op, direct, make, numbers = CASES[case]
    op(*make(dtype), *numbers)
    lists = make(dtype)
    want = clones(lists)
    direct.otherwise(*want, *numbers)
    before = [[t._version for t in tensors] for tensors in lists]
    no_dispatch(monkeypatch, direct)
    op(*lists, *numbers)
    assert equal(lists, want)
    for k, (tensors, versions) in enumerate(zip(lists, before, strict=True)):
        written = k < direct.n_mutated
        assert all((t._version > v) == written for t, v in zip(tensors, versions, strict=True))


@pytest.mark.parametrize("case", CASES)
def test_shared_memory_is_refused_in_a_known_form(case: str) -> None:
    op, direct, make, numbers = CASES[case]
    op(*make(torch.float32), *numbers)
    lists = make(torch.float32)
    lists[0][0] = lists[0][4][:15].view(3, 5)
    before = clones(lists)
    with pytest.raises(ValueError, match="shares memory"):
        op(*lists, *numbers)
    assert equal(lists, before)
    assert direct.calls.known() == 1


@pytest.mark.parametrize("value", [1.5, -0.1, float("nan")])
def test_mask_values_are_looked_at_every_time(value: float) -> None:
    ops.masked_grad_(*(lists := [randn(), masks("float")]))
    ops.masked_grad_(*lists)
    lists[1][4][39999] = value
    before = clones(lists[:1])
    with pytest.raises(ValueError, match=r"reserved\[4\] has values outside"):
        ops.masked_grad_(*lists)
    assert equal(lists[:1], before)


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf")])
def test_importances_are_looked_at_every_time(value: float) -> None:
    ops.merge_importances_(*(lists := [squares(torch.float32), squares(torch.float32)]))
    lists[1][5][1, 2, 3, 4] = value
    before = clones(lists[:1])
    with pytest.raises(ValueError, match=r"fresh\[5\]"):
        ops.merge_importances_(*lists)
    assert equal(lists[:1], before)


@pytest.mark.parametrize(
    ("case", "numbers", "error"),
    [
        ("merge_importances_", (-1.0, 1.0), ValueError),
        ("merge_importances_", (1.0, float("nan")), ValueError),
        ("merge_importances_", ("much", 1.0), TypeError),
        ("accumulate_walk_", (0.0,), ValueError),
        ("accumulate_walk_", (None,), TypeError),
    ],
)
def test_numbers_are_looked_at_every_time(case: str, numbers: tuple[Any, ...], error: type[Exception]) -> None:
    op, _, make, good = CASES[case]
    lists = make(torch.float32)
    op(*lists, *good)
    before = clones(lists)
    with pytest.raises(error):
        op(*lists, *numbers)
    assert equal(lists, before)


def test_what_autograd_tracks_is_refused() -> None:
    grads, reserved = randn(), masks("float")
    ops.masked_grad_(grads, reserved)
    grads[5].requires_grad_()
    with pytest.raises(RuntimeError, match="leaf that requires grad"):
        ops.masked_grad_(grads, reserved)
    with torch.no_grad():
        ops.masked_grad_(grads, reserved)
    grads[5].requires_grad_(False)
    reserved[0] = reserved[0].clone().requires_grad_() * 1
    with pytest.raises(RuntimeError, match="gradient graph"):
        ops.masked_grad_(grads, reserved)


class Subclass(torch.Tensor):
    pass


@pytest.mark.parametrize("watch", [seen_by_a_mode, seen_by_the_profiler])
def test_whoever_watches_sees_the_op(watch: Callable[..., bool]) -> None:
    lists = [randn(), masks("bool")]
    ops.masked_grad_(*lists)
    assert watch("masked_grad_", lambda: ops.masked_grad_(*lists))


@pytest.mark.parametrize(
    "odd",
    [
        lambda t: torch.stack([t, t], -1)[..., 0],  # gaps
        lambda t: t.as_subclass(Subclass),
        lambda t: t.t().contiguous().t(),  # another memory order than its mask
    ],
)
def test_forms_that_are_not_plain_are_not_kept(odd: Callable[[torch.Tensor], torch.Tensor]) -> None:
    grad, mask = torch.randn(3, 5), torch.rand(3, 5) < 0.5
    want = grad.masked_fill(mask, 0)
    grads = [odd(grad)]
    for _ in range(3):
        ops.masked_grad_(grads, [mask])
    assert torch.equal(grads[0].as_subclass(torch.Tensor), want)
    assert _direct_masked_grad_.calls.known() == 0


def test_a_memory_order_that_all_share_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    grad = torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)
    mask = (torch.rand(2, 3, 4, 5) < 0.5).contiguous(memory_format=torch.channels_last)
    want = grad.masked_fill(mask, 0)
    ops.masked_grad_([grad.clone()], [mask])
    no_dispatch(monkeypatch, _direct_masked_grad_)
    ops.masked_grad_([grad], [mask])
    assert torch.equal(grad, want)


def test_negative_views() -> None:
    """Views whose elements are minus what their memory holds, of a conjugate's imaginary part, say."""
    for form in ((3,), ()):
        grad, mask = torch.ones(form), torch.full(form, 0.25)
        ops.masked_grad_([grad], [mask])
        ops.masked_grad_([grad], [torch._neg_view(-mask)])
        assert grad.unique().item() == 0.75**2
        with pytest.raises(RuntimeError, match="negation"):  # torch's own fallback does not write through them
            ops.masked_grad_([torch._neg_view(grad)], [mask])
        assert grad.unique().item() == 0.75**2


def test_vmap_has_its_say() -> None:
    lists = [[torch.randn(4)], [torch.tensor([True, False, True, False])]]
    ops.masked_grad_(*lists)

    def masked(g: torch.Tensor) -> torch.Tensor:
        ops.masked_grad_([g], lists[1])
        return g

    with pytest.raises(RuntimeError, match="Batching rule"):
        torch.vmap(masked)(torch.randn(3, 4))


def test_compiled_after_a_known_form() -> None:
    lists = [[torch.randn(4)], [torch.tensor([True, False, True, False])]]
    ops.masked_grad_(*lists)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def masked(g: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
        g = g * 2
        ops.masked_grad_([g], [r])
        return g

    g = torch.randn(4)
    torch.testing.assert_close(masked(g, lists[1][0]), (g * 2).masked_fill(lists[1][0], 0))


def test_only_a_few_forms_are_kept() -> None:
    for n in range(1, 12):
        for _ in range(2):
            ops.masked_grad_([torch.ones(n)], [torch.zeros(n, dtype=torch.bool)])
    assert _direct_masked_grad_.calls.known() == 4


def test_from_several_threads() -> None:
    lists = [[randn(), masks("bool")] for _ in range(4)]
    want = [[g.masked_fill(m, 0) for g, m in zip(*pair, strict=True)] for pair in lists]

    def work(pair: Lists) -> None:
        for _ in range(50):
            ops.masked_grad_(*pair)

    threads = [threading.Thread(target=work, args=(pair,)) for pair in lists]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(equal([pair[0]], [w]) for pair, w in zip(lists, want, strict=True))
