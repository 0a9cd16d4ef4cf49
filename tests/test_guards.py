"""What opcheck does not look at: version counters, leaves, overlaps, and bad input refused before anything is written.

Each test goes over every op, argument by argument; messages particular to one op are in test_<stem>.py.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fastcl
from fastcl import _ops

from .samples import OPS, copied, op_name, replaced, same_strides, tensors
from .test_catalogue import args_of, mutated, op, public

MUTATING = [case for case, sample in OPS.items() if sample.mutates]
WAYS: dict[str, Callable[[str, Any], Any]] = {"raw": lambda case, args: op(case)(*args), "public": public}
REFUSAL = {"raw": (ValueError, RuntimeError), "public": ValueError}


PUBLIC = [case for case in OPS if not op_name(case).endswith("_backward")]


def indices(case: str, *, written: bool) -> list[int]:
    """Positions among all tensors of the arguments that the op writes, or only reads."""
    args = args_of(case)
    n_written = len(mutated(case, args))
    every = range(n_written) if written else range(n_written, len(tensors(args)))
    return [k for k in every if tensors(args)[k].numel()]  # empty ones stand for "no mask"


WRITTEN = [(case, k) for case in MUTATING for k in indices(case, written=True)]
READ = [(case, k) for case in OPS for k in indices(case, written=False)]
# Every tensor of every op, through every way in that there is.
EVERY = [(case, k, way) for case, k in WRITTEN + READ for way in WAYS if way == "raw" or case in PUBLIC]
# Ops that work on each tensor by itself take any shape and device.
ALONE = ("annealed_mask", "compensated_mask", "soft_threshold_", "group_soft_threshold_", "pack_mask")
TOGETHER = [(case, k, way) for case, k, way in EVERY if op_name(case) not in ALONE]


def argument_of(case: str, index: int) -> str:
    """The name, in the op's schema, of the argument that holds the index-th tensor."""
    for argument, value in zip(op(case)._schema.arguments, args_of(case), strict=True):
        index -= len(tensors(value))
        if index < 0:
            return argument.name
    raise IndexError(index)


def refused(way: str, case: str, args: Any, match: str) -> None:
    """The call raises, naming what is wrong, and leaves every argument as it was."""
    before = [t if t.is_meta else same_strides(t.detach()) for t in tensors(args)]
    versions = [t._version for t in tensors(args)]
    with pytest.raises(REFUSAL[way], match=match) as caught:
        WAYS[way](case, args)
    assert op_name(case) in str(caught.value)
    assert [t._version for t in tensors(args)] == versions
    for t, b in zip(tensors(args), before, strict=True):
        assert t.is_meta or torch.equal(t, b)


# ---- version counters ----


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("case", MUTATING)
def test_version_counter_is_bumped(case: str, way: str) -> None:
    """Of what is written, and of nothing else."""
    args = args_of(case)
    before = [t._version for t in tensors(args)]
    WAYS[way](case, args)
    bumped = [t._version > b for t, b in zip(tensors(args), before, strict=True)]
    n = len(mutated(case, args))
    assert bumped == [True] * n + [False] * (len(bumped) - n)


@pytest.mark.parametrize("case", MUTATING)
def test_version_counter_of_inference_tensors(case: str) -> None:
    """They have none: the ops work on them all the same, as ATen's do."""
    with torch.inference_mode():
        args = args_of(case)
        before = [t.clone() for t in mutated(case, args)]
        for call in WAYS.values():
            call(case, args)
        assert not any(torch.equal(t, b) for t, b in zip(mutated(case, args), before, strict=True))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("case", "index"), WRITTEN)
def test_autograd_notices_the_write(case: str, index: int, way: str) -> None:
    """factor * target saves target; after a write, backward must raise, not return a wrong gradient."""
    args = args_of(case)
    target = tensors(args)[index]
    product = torch.ones_like(target, requires_grad=True) * target
    WAYS[way](case, args)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()


# ---- what autograd tracks ----


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("case", "index"), WRITTEN)
def test_leaf_that_requires_grad_is_refused(case: str, index: int, way: str) -> None:
    args = args_of(case)
    target = tensors(args)[index].requires_grad_()
    before, version = target.detach().clone(), target._version
    with pytest.raises(RuntimeError, match=f"{op_name(case)}: it would overwrite a leaf that requires grad"):
        WAYS[way](case, args)
    assert torch.equal(target, before)
    assert target._version == version
    with torch.no_grad():
        WAYS[way](case, args)
    assert not torch.equal(target, before)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("case", MUTATING)
def test_result_with_a_graph_is_refused(case: str, way: str) -> None:
    """A write that autograd does not record would give later backwards a wrong graph."""
    args = args_of(case)
    for index in range(len(tensors(args))):
        if not tensors(args)[index].is_floating_point():
            continue
        tracked = replaced(args, index, lambda t: t.clone().requires_grad_() * 1)
        before = tensors(tracked)[index].detach().clone()
        with pytest.raises(RuntimeError, match=r"requires grad|has a gradient graph"):
            WAYS[way](case, tracked)
        assert torch.equal(tensors(tracked)[index].detach(), before)


# ---- shared memory ----


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("case", "index"), [w for w in WRITTEN if tensors(args_of(w[0]))[w[1]].dim()])
@pytest.mark.parametrize("kind", ["expanded", "sliding window"])
def test_output_that_overlaps_itself_is_refused(case: str, index: int, kind: str, way: str) -> None:
    args = args_of(case)
    target = tensors(args)[index]
    base = torch.ones(target.numel(), dtype=target.dtype)
    # a sliding window: every row begins one element after the one before; one dimension cannot slide
    stride = 1 if kind == "sliding window" and target.dim() > 1 else 0
    wrong = base.as_strided(target.shape, (stride,) * target.dim())
    refused(way, case, replaced(args, index, lambda t: wrong), "overlaps itself|must be contiguous")


def on_one_storage(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Tensors like a and b (dense) that begin at the same address."""
    memory = torch.zeros(max(t.numel() * t.element_size() for t in (a, b)) + 8, dtype=torch.uint8)

    def here(t: Tensor) -> Tensor:
        return memory[: t.numel() * t.element_size()].view(t.dtype).view(t.shape)

    return here(a), here(b)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("case", MUTATING)
def test_output_that_shares_memory_is_refused(case: str, way: str) -> None:
    """With any other tensor of the call, written or read."""
    every = {*indices(case, written=True), *indices(case, written=False)}
    for index in indices(case, written=True):
        for other in every - {index}:
            args = args_of(case)
            mine, theirs = on_one_storage(tensors(args)[index], tensors(args)[other])
            args = replaced(replaced(args, index, lambda t, m=mine: m), other, lambda t, o=theirs: o)
            refused(way, case, args, "shares memory")


# ---- bad tensors ----


@pytest.mark.parametrize(("case", "index", "way"), [e for e in EVERY if e[:2] != ("unpack_mask", 1)])  # of any dtype
def test_integers_or_floats_in_their_place_are_refused(case: str, index: int, way: str) -> None:
    args = replaced(args_of(case), index, lambda t: t.double() if t.dtype == torch.int64 else t.to(torch.int64))
    refused(way, case, args, argument_of(case, index))


@pytest.mark.parametrize(("case", "index", "way"), TOGETHER)
def test_one_dimension_too_many_is_refused(case: str, index: int, way: str) -> None:
    args = replaced(args_of(case), index, lambda t: torch.stack([t, t]))
    # a partner of another shape is as good a name: the two are compared
    names = {argument_of(case, k) for k in range(len(tensors(args)))}
    refused(way, case, args, "|".join(sorted(names)))


@pytest.mark.parametrize(("case", "index", "way"), TOGETHER)
def test_another_device_is_refused(case: str, index: int, way: str) -> None:
    """One tensor on `meta` (it computes nothing: a call that returned would have lost the sum)."""
    args = replaced(args_of(case), index, lambda t: t.to("meta"))
    names = {argument_of(case, k) for k in range(len(tensors(args)))}
    refused(way, case, args, "|".join(sorted(names)))


REQUIRED = [
    (case, k)
    for case, k in WRITTEN + READ
    if case in PUBLIC
    and argument_of(case, k) not in ("weights", "biases")
    and not (argument_of(case, k) == "reserved" and "masked_weight" in case)  # optional
]


@pytest.mark.parametrize(("case", "index"), REQUIRED)
def test_none_is_refused(case: str, index: int) -> None:
    """A missing tensor (a parameter without .grad) is the caller's commonest mistake: the message says which."""
    name = argument_of(case, index)
    args = replaced(args_of(case), index, lambda t: None)
    for grad_mode in (torch.enable_grad(), torch.no_grad()):
        before = copied(tensors(args))
        with grad_mode, pytest.raises(TypeError, match=rf"{op_name(case)}.*\b{name}"):
            public(case, args)
        assert all(torch.equal(a, b) for a, b in zip(tensors(args), before, strict=True))


# ---- lists ----


def lists_of(case: str) -> list[int]:
    return [k for k, a in enumerate(args_of(case)) if isinstance(a, list) and tensors(a)]


PAIRED = [case for case in OPS if len(lists_of(case)) > 1 and op_name(case) != "accumulate_affine_"]


@pytest.mark.parametrize(("case", "way"), [(c, w) for c in PAIRED for w in WAYS if w == "raw" or c in PUBLIC])
def test_lists_of_other_lengths_are_refused(case: str, way: str) -> None:
    args = args_of(case)
    names = [op(case)._schema.arguments[j].name for j in lists_of(case)]
    for k in lists_of(case):
        shorter = (*args[:k], args[k][:-1], *args[k + 1 :])
        refused(way, case, shorter, rf"({'|'.join(names)}) has \d+ tensors but must have as many as")


@pytest.mark.parametrize("case", [case for case in OPS if OPS[case].shaped and lists_of(case)])
def test_empty_lists_are_no_work(case: str) -> None:
    args = tuple([] if isinstance(a, list) else a for a in args_of(case))
    result = op(case)(*args)
    assert not tensors(result) or result.item() == 0


def test_keyword_arguments_and_tuples() -> None:
    """As torch's own dispatcher takes them."""
    g, w = torch.ones(3), torch.ones(3)
    torch.ops.fastcl.masked_grad_.default(reserved=[torch.tensor([True, False, True])], grads=[g])
    public("soft_threshold_", ((w,), 0.25))
    assert (g.tolist(), w.tolist()) == ([0, 1, 0], [0.75] * 3)
    assert g._version > 0
    assert w._version > 0


@pytest.mark.parametrize("name", _ops.catalogue)
def test_schema_says_what_is_mutated(name: str) -> None:
    """Mutating ops end with an underscore and mutate leading arguments; no optional lists, no keyword-only tensors."""
    schema = str(_ops.catalogue[name]._schema)
    assert name.endswith("_") == ("!)" in schema)
    assert not re.search(r"\*,|\[\]\?|\?\[\]", schema)


@pytest.mark.parametrize("as_list", [False, True])
def test_a_tensor_that_torch_func_left_behind_is_differentiated(as_list: bool) -> None:
    weight = torch.randn(4, requires_grad=True)
    left: list[Tensor] = []

    def function(x: Tensor) -> Tensor:
        left.append(x * weight)
        return x.square().sum()

    torch.func.grad(function)(torch.ones(4))
    value = fastcl.ops.mask_sparsity(left) if as_list else fastcl.ops.annealed_mask(left[0], 2.0).sum()
    (found,) = torch.autograd.grad(value, weight)
    with torch.no_grad():
        mask = torch.sigmoid(2.0 * weight)
    torch.testing.assert_close(found, torch.full((4,), 0.25) if as_list else 2 * mask * (1 - mask))
