"""States that do not fit are refused by every learner, and nothing in it changes: fuzzed over the whole registry."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from fastcl import checkpoint, streams
from fastcl.methods import METHODS, Method

from .test_protocol import small

pytestmark = pytest.mark.filterwarnings("ignore::fastcl.FallbackWarning")
Path = tuple[Any, ...]


def learner(name: str, seed: int = 1) -> Method:
    setting = "task" if "task" in METHODS[name].settings else "class"
    stream = streams.make(streams.load("digits"), "split", setting)
    return METHODS[name].build(stream, **small(name, 12), seed=seed)


def trained(name: str) -> Method:
    """One task and a part of the next: whatever a state may hold is in it."""
    made = learner(name)
    stream = streams.make(streams.load("digits"), "split", made.setting)
    for task in stream.tasks[:2]:
        made.begin_task(task)
        x, y = (t[:32] for t in made.training_data(task))
        for _ in range(2):
            made.observe(x, y)
        if task.index == 0:
            made.end_task([tuple(t[:64] for t in task.train())])
    return made


def leaves(node: Any, at: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Every node of a state but its root."""
    if at:
        yield at, node
    children = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, (list, tuple)) else ()
    for key, child in children:
        yield from leaves(child, (*at, key))


def changed(node: Any, at: Path, change: Callable[[Any, Any], None]) -> Any:
    """A copy of `node` with `change(container, key)` done at the path."""
    node = copy.copy(node) if isinstance(node, dict) else list(node)
    if len(at) == 1:
        change(node, at[0])
    else:
        node[at[0]] = changed(node[at[0]], at[1:], change)
    return node


def set_to(value: Any) -> Callable[[Any, Any], None]:
    return lambda container, key: container.__setitem__(key, value)


def remove(container: Any, key: Any) -> None:
    del container[key]


def add(container: Any, key: Any) -> None:
    container[key]["surprise"] = 1


def mutations(at: Path, value: Any) -> Iterator[tuple[str, Callable[[Any, Any], None]]]:
    """What must be refused at a place of a state. A parameter that the optimizer has not seen, or a class of which
    nothing is stored, may be missing."""
    if isinstance(at[-1], str) and "state" not in at and "exemplars" not in at:
        yield "missing", remove
    if isinstance(value, Tensor):
        yield "a number for a tensor", set_to(0.5)
        if value.is_floating_point() and at[-1] != "step":
            yield "dtype", set_to(value.bfloat16())
            yield "shape", set_to(torch.cat([value.flatten(), value.new_zeros(1)]))
            yield "empty", set_to(value.new_zeros(0))
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield "a string for a number", set_to("many")
    elif isinstance(value, dict):
        yield "a list for a dict", set_to([1, 2])
    elif isinstance(value, str):
        yield "a number for a string", set_to(7)


def snapshot(made: Method) -> tuple[Any, ...]:
    flat: dict[str, Tensor] = {}
    tree = checkpoint._flatten(made.state_dict(), "state", flat)
    ids = [id(p) for p in made.model.parameters()], id(made.model), id(made.optimizer)
    modes = [m.training for m in made.model.modules()]
    return tree, {k: t.numpy().tobytes() for k, t in flat.items()}, ids, modes, torch.get_rng_state().tolist()


# places whose content no state can be held against: results kept for looking at, samples, what a mean may be
LOOSE = ("shown", "reports")


@pytest.mark.parametrize("name", METHODS)
def test_states_that_do_not_fit_change_nothing(name: str) -> None:
    made = trained(name)
    state = copy.deepcopy(made.state_dict())
    target = learner(name, seed=2)
    before = snapshot(target)
    cases = [
        (at, what, change)
        for at, value in leaves(state)
        if not set(at) & set(LOOSE)
        for what, change in mutations(at, value)
    ]
    chosen = random.Random(name).sample(cases, min(40, len(cases)))
    for at, what, change in chosen:
        with pytest.raises(ValueError, match=r"\w"):  # noqa: PT012  the second line says what was taken
            target.load_state_dict(changed(state, at, change))
            pytest.fail(f"{name}: {what} at {at} was taken")
        assert snapshot(target) == before, (at, what)
    for broken in (None, [], {}, {"method": name}, {**state, "more": 1}):
        with pytest.raises(ValueError, match="state"):
            target.load_state_dict(broken)
        assert snapshot(target) == before
    target.load_state_dict(state)  # and the whole one is taken
    assert snapshot(target)[:2] == snapshot(made)[:2]


def test_states_of_other_networks_and_options_are_refused() -> None:
    state = trained("ewc").state_dict()
    stream = streams.make(streams.load("digits"), "split", "task")
    for other in (METHODS["ewc"].build(stream, hidden=(13,)), METHODS["ewc"].build(stream, hidden=(12, 12))):
        before = snapshot(other)
        with pytest.raises(ValueError, match=r"state does not fit this EWC: .*size mismatch|Missing key"):
            other.load_state_dict(state)
        assert snapshot(other) == before
    with pytest.raises(ValueError, match="state is of the method 'ewc' but this is 'mas'"):
        METHODS["mas"].build(stream, hidden=(12,)).load_state_dict(state)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
@pytest.mark.parametrize("name", ["ewc", "mas", "si", "rwalk"])
def test_importances_that_are_not_finite_and_positive_are_refused(name: str, value: float) -> None:
    state = copy.deepcopy(trained(name).state_dict())
    next(iter(state["extra"]["regulariser"]["importances"].values())).view(-1)[3] = value
    target = learner(name, seed=2)
    before = snapshot(target)
    with pytest.raises(ValueError, match="has NaN, infinite or negative values"):
        target.load_state_dict(state)
    assert snapshot(target) == before
