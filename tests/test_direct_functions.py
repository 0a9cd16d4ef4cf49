"""Ops that give new tensors, straight in the library (fastcl/ops/_direct.py): what they do, and when they do not."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastcl import _ops, ops
from fastcl.ops import _direct

from .samples import FLOATS
from .watchers import seen_by_a_mode, seen_by_the_profiler

pytestmark = pytest.mark.skipif(not _direct.available, reason="this torch has no C exchange API, or no kernels")

SHAPES = [(), (1,), (7,), (3, 5), (2, 3, 4, 5), (40_000,), (300, 300)]
UNITS = [((3, 5), (3, 1)), ((3, 5), (1, 5)), ((3, 5), (1, 1)), ((100, 784), (1, 784)), ((64, 32, 4, 4), (1, 32, 1, 1))]
NUMBERS = {"plain": (3.0, 0.0, 0), "analytic": (3.0, 400.0, 1), "literal": (2, 400, 2)}


def op_of(name: str) -> Any:
    return getattr(torch.ops.fastcl, name).default


def direct(name: str, *args: Any) -> Any:
    return _ops._rules[id(op_of(name))].direct(args)


def calls(dtype: torch.dtype) -> list[tuple[str, tuple[Any, ...]]]:
    def r(shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape).to(dtype)

    found: list[tuple[str, tuple[Any, ...]]] = []
    for shape in SHAPES:
        mask = torch.rand(shape) < 0.5
        found += [("annealed_mask", (r(shape), 3.0)), ("annealed_mask_backward", (r(shape), r(shape), 2))]
        for scale, s_max, kind in NUMBERS.values():
            for reserved in (None, mask):
                rest = scale, reserved, s_max, kind
                found.append(("masked_weight", (r(shape), r(shape), *rest)))
                found.append(("masked_weight_kept", (r(shape), r(shape), *rest)))
                for kept in (None, torch.tensor(0.5)):
                    found.append(("masked_weight_backward", (r(shape), kept, r(shape), r(shape), *rest)))
    for shape, of in UNITS:
        for scale, s_max, kind in NUMBERS.values():
            for reserved in (None, torch.rand(shape) < 0.5):
                rest = scale, reserved, s_max, kind
                found.append(("masked_weight", (r(shape), r(of), *rest)))
                found.append(("masked_weight_backward", (r(shape), None, r(shape), r(of), *rest)))
    return found


def as_tuple(output: Any) -> tuple[Tensor, ...]:
    return (output,) if isinstance(output, Tensor) else output


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_it_gives_what_the_op_gives(dtype: torch.dtype) -> None:
    for name, args in calls(dtype):
        got = direct(name, *args)
        if name == "masked_weight_kept" and dtype == torch.float64:
            assert got is None  # its sum is a double
            continue
        for mine, want in zip(as_tuple(got), as_tuple(op_of(name)(*args)), strict=True):
            assert torch.equal(mine, want)
            assert mine.dtype == want.dtype
            assert mine.stride() == want.stride()


ASKED = {
    "other layout": lambda t: t.t().contiguous().t(),
    "gaps": lambda t: torch.stack([t, t], -1)[..., 0],
    "expanded": lambda t: t[:1, :1].expand(t.shape),
    "negative view": lambda t: torch._neg_view(t),
    "subclass": lambda t: t.as_subclass(type("Subclass", (Tensor,), {})),
    "sparse": lambda t: t.to_sparse(),
    "meta": lambda t: t.to("meta"),
    "empty": lambda t: t[:0],
    "integers": lambda t: t.long(),
    "large": lambda t: torch.zeros(1024, 1024),
    "no tensor": lambda t: 3.0,
    "None": lambda t: None,
}


@pytest.mark.parametrize("odd", ASKED)
def test_the_op_is_asked_about_what_is_not_plain(odd: str) -> None:
    e, make = torch.randn(3, 5), ASKED[odd]
    assert direct("annealed_mask", make(e), 3.0) is None
    assert direct("masked_weight_backward", e, None, e, make(e), 3.0, None, 0.0, 0) is None
    assert direct("masked_weight_backward", make(e), None, e, e, 3.0, None, 0.0, 0) is None


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("annealed_mask", (torch.ones(3), -1.0)),
        ("annealed_mask", (torch.ones(3), float("nan"))),
        ("annealed_mask", (torch.ones(3), "1")),
        ("annealed_mask", (torch.ones(3), 10**400)),
        ("annealed_mask", (torch.ones(3),)),
        ("annealed_mask", (torch.ones(3), 1.0, 1.0)),
        ("annealed_mask_backward", (torch.ones(3), torch.ones(4), 1.0)),
        ("annealed_mask_backward", (torch.ones(3).double(), torch.ones(3), 1.0)),
        ("masked_weight", (torch.ones(3), torch.ones(4), 1.0, None, 0.0, 0)),
        ("masked_weight", (torch.ones(3, 4), torch.ones(4), 1.0, None, 0.0, 0)),
        ("masked_weight", (torch.ones(3), torch.ones(3).double(), 1.0, None, 0.0, 0)),
        ("masked_weight", (torch.ones(3), torch.ones(3), 1.0, torch.ones(3), 0.0, 0)),
        ("masked_weight", (torch.ones(3), torch.ones(3), 1.0, torch.ones(1, dtype=torch.uint8), 0.0, 0)),
        ("masked_weight", (torch.ones(3), torch.ones(3), 1.0, torch.ones(4).bool(), 0.0, 0)),
        ("masked_weight", (torch.ones(3), torch.ones(3), 1.0, None, 0.0, 1)),
        ("masked_weight", (torch.ones(3), torch.ones(3), 0.0, None, 1.0, 2)),
        ("masked_weight", (torch.ones(3), torch.ones(3), 1.0, None, 1.0, 3)),
        ("masked_weight_kept", (torch.ones(2, 3), torch.ones(2, 1), 1.0, None, 0.0, 0)),
        ("masked_weight_backward", (torch.ones(2), None, torch.ones(3), torch.ones(3), 1.0, None, 0.0, 0)),
        ("masked_weight_backward", (torch.ones(3), torch.ones(2), torch.ones(3), torch.ones(3), 1.0, None, 0.0, 0)),
        ("masked_weight_backward", (*[torch.ones(2, 1)] * 2, *[torch.ones(2, 3)] * 2, 1.0, None, 0.0, 0)),
    ],
)
def test_the_op_says_what_is_wrong(name: str, args: tuple[Any, ...]) -> None:
    assert direct(name, *args) is None


def test_what_autograd_tracks_gets_its_node_and_the_same_gradient() -> None:
    w, e = torch.randn(3, 5, requires_grad=True), torch.randn(3, 5, requires_grad=True)
    g, mask = torch.randn(3, 5), torch.rand(3, 5) < 0.5
    assert direct("masked_weight", w.detach(), e, 3.0, None, 0.0, 0) is _ops.NEEDS_GRADIENT
    with torch.no_grad():
        assert torch.equal(direct("annealed_mask", e, 3.0), op_of("annealed_mask")(e, 3.0))
    out = ops.masked_weight(w, e, 3.0, reserved=mask)
    assert type(out.grad_fn).__name__ == "masked_weightBackward"
    theirs = torch.ops.fastcl.masked_weight(w, e, 3.0, mask, 0.0, 0)
    pairs = (torch.autograd.grad(o, (w, e), g) for o in (out, theirs))
    assert all(torch.equal(a, b) for a, b in zip(*pairs, strict=True))


def test_twice_and_with_hooks() -> None:
    e = torch.randn(4, requires_grad=True)
    m = ops.annealed_mask(e, 3.0)
    seen: list[Any] = []
    m.grad_fn.register_hook(lambda found, given: seen.append((found, given)))
    (first,) = torch.autograd.grad(m, e, torch.ones(4), create_graph=True)
    (second,) = torch.autograd.grad(first, e, torch.ones(4))
    s = torch.sigmoid(3.0 * e)
    torch.testing.assert_close(first, 3 * s * (1 - s))
    torch.testing.assert_close(second, 9 * s * (1 - s) * (1 - 2 * s))
    assert len(seen) == 1
    assert torch.equal(seen[0][0][0], first)


@pytest.mark.parametrize("tracked", [False, True])
@pytest.mark.parametrize("watch", [seen_by_a_mode, seen_by_the_profiler])
def test_whoever_watches_sees_the_op(watch: Callable[..., bool], tracked: bool) -> None:
    e = torch.randn(4, requires_grad=tracked)
    assert watch("annealed_mask", lambda: ops.annealed_mask(e, 3.0))


def test_transforms_and_compilers_get_the_op() -> None:
    e = torch.randn(3, 4)
    torch.testing.assert_close(torch.vmap(lambda x: ops.annealed_mask(x, 3.0))(e), torch.sigmoid(3.0 * e))
    compiled = torch.compile(lambda x: ops.annealed_mask(x, 3.0), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(e), ops.annealed_mask(e, 3.0))


def test_a_result_is_new_and_nobody_elses() -> None:
    w = torch.nn.Parameter(torch.randn(3, 5))
    with torch.no_grad():
        out, kept = ops.masked_weight_kept(w, w, 3.0)
    assert type(out) is Tensor
    assert not out.requires_grad
    assert out.is_leaf
    assert kept.shape == ()
    before = out.clone()
    for _ in range(20):
        ops.masked_weight(w, w, 5.0)
    assert torch.equal(out, before)
    with torch.inference_mode():
        assert ops.annealed_mask(torch.zeros(2), 1.0).is_inference()


def test_from_many_threads() -> None:
    e = [torch.randn(1000) for _ in range(4)]
    want = [torch.sigmoid(3.0 * x) for x in e]
    wrong: list[int] = []

    def work(i: int) -> None:
        for _ in range(200):
            if not torch.allclose(ops.annealed_mask(e[i], 3.0), want[i]):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong
