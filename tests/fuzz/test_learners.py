"""Regularisers and learners on bad arguments, bad batches, calls in the wrong order: refused, and nothing changed."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import fastcl
from fastcl import streams
from fastcl.methods import METHODS

EXAMPLES = int(os.environ.get("FASTCL_FUZZ", "0"))
REFUSALS = (ValueError, TypeError, RuntimeError, IndexError)
NUMBERS = [0, 1, 0.5, 2.5, -1, -0.0, 1e-40, 1e38, math.nan, math.inf, -math.inf, None, "1", 1j, True]


def quickly(strategy: Any, n: int) -> Callable[[Callable[[Any], None]], None]:
    def decorate(f: Callable[[Any], None]) -> None:
        settings(
            max_examples=EXAMPLES or n,
            derandomize=not EXAMPLES,
            database=None,
            deadline=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )(given(strategy)(f))()

    return decorate


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 3))


def batch(n: int = 6) -> tuple[Tensor, Tensor]:
    return torch.randn(n, 5), torch.arange(n) % 3


def real(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


# ---- constructors: what is refused is what the docstrings say, and what is taken works ----

CONSTRUCTORS: dict[str, tuple[Any, dict[str, Callable[[Any], bool]]]] = {
    "EWC": (fastcl.EWC, {"strength": lambda v: real(v) and v >= 0, "gamma": lambda v: real(v) and 0 <= v <= 1}),
    "MAS": (fastcl.MAS, {"strength": lambda v: real(v) and v >= 0, "alpha": lambda v: real(v) and 0 <= v <= 1}),
    "SI": (fastcl.SI, {"strength": lambda v: real(v) and v >= 0, "xi": lambda v: real(v) and v > 0}),
    "RWalk": (
        fastcl.RWalk,
        {
            "strength": lambda v: real(v) and v >= 0,
            "alpha": lambda v: real(v) and 0 < v <= 1,
            "delta_t": lambda v: isinstance(v, int) and v >= 1,
            "epsilon": lambda v: real(v) and v > 0,
        },
    ),
}
NAMES = {
    "form": ("separate", "single", "online", "Online", None),
    "kind": ("exact", "map", "fisher"),
    "merge": ("sum", "ema", 1),
}


def one_step(regulariser: Any, net: nn.Module) -> None:
    x, y = batch()
    net.zero_grad()
    nn.functional.cross_entropy(net(x), y).backward()
    regulariser.add_gradients()
    with torch.no_grad():
        for p in net.parameters():
            p.sub_(0.1 * p.grad)
    if hasattr(regulariser, "after_step"):
        regulariser.after_step()


@pytest.mark.parametrize("name", CONSTRUCTORS)
def test_constructors(name: str) -> None:
    make, fields = CONSTRUCTORS[name]

    @quickly(st.fixed_dictionaries({field: st.sampled_from([1, 0.5, *NUMBERS]) for field in fields}), 60)
    def run(options: dict[str, Any]) -> None:
        good = all(valid(options[field]) for field, valid in fields.items())
        net = model()
        if not good:
            with pytest.raises((ValueError, TypeError)):
                make(net, **options)
            return
        regulariser = make(net, **options)
        for _ in range(2):
            one_step(regulariser, net)
            regulariser.consolidate([batch()])
        for f in regulariser.importances.values():
            assert (f >= 0).all()
        assert regulariser.penalty().item() >= 0


@pytest.mark.parametrize(("make", "field"), [(fastcl.EWC, "form"), (fastcl.EWC, "kind"), (fastcl.MAS, "merge")])
def test_constructors_refuse_other_names(make: Any, field: str) -> None:
    *_, wrong = NAMES[field]
    with pytest.raises(ValueError, match=field):
        make(model(), 1.0, **{field: wrong})


# ---- batches ----

X, Y = batch()
BATCHES: dict[str, Any] = {
    "none": [],
    "not iterable": 3,
    "an empty batch": [(X[:0], Y[:0])],
    "without labels": [X],
    "labels of another number": [(X, Y[:-1])],
    "labels 0-d": [(X, Y[0])],
    "float labels": [(X, Y.float())],
    "labels too large": [(X, Y + 1)],
    "negative labels": [(X, Y - 5)],
    "another width": [(X[:, :4], Y)],
    "integers": [(X.long(), Y)],
    "float64": [(X.double(), Y)],
    "a list": [(X.tolist(), Y)],
    "None": [None],
    "good, then bad": [(X, Y), (X[:, :4], Y)],
    "NaN": [(X.clone().fill_(math.nan), Y)],
    "inf": [(X.clone().fill_(math.inf), Y)],
    "good": [(X, Y)],
}


class Kept:
    """All that a pass must leave alone."""

    def __init__(self, net: nn.Module) -> None:
        self.net = net
        self.state = {name: t.clone() for name, t in net.state_dict().items()}
        self.rest = self._rest()

    def _rest(self) -> list[Any]:
        modules = list(self.net.modules())
        hooks = [len(m._forward_hooks) + len(m._backward_hooks) + len(m._forward_pre_hooks) for m in modules]
        return [[m.training for m in modules], hooks, [p.grad for p in self.net.parameters()]]

    def check(self) -> None:
        assert all(torch.equal(t, self.state[name]) for name, t in self.net.state_dict().items())
        assert self._rest() == self.rest


@pytest.mark.filterwarnings("ignore::fastcl.FallbackWarning")
@pytest.mark.parametrize("kind", ["exact", "sample", "empirical", "map", "batched", "mas"])
@pytest.mark.parametrize("what", BATCHES)
def test_importance_passes(what: str, kind: str) -> None:
    """They raise, or what they return is not negative; NaN only of a NaN. The model is as it was either way."""
    net = model()
    before = Kept(net)
    try:
        if kind == "mas":
            found = fastcl.mas_importance(net, BATCHES[what])
        else:
            found = fastcl.fisher_diagonal(net, BATCHES[what], kind)
    except REFUSALS:
        found = None
    before.check()
    if found is None:
        assert what != "good"
        return
    assert what not in ("none", "not iterable", "an empty batch", "another width", "None", "good, then bad")
    assert not (kind == "empirical" and "label" in what), "labels that do not fit"
    for f in found.values():
        assert what in ("NaN", "inf") or (f >= 0).all()


@pytest.mark.filterwarnings("ignore::fastcl.FallbackWarning")
@pytest.mark.parametrize("make", [fastcl.EWC, fastcl.MAS])
@pytest.mark.parametrize("what", [what for what in BATCHES if what not in ("good", "integers", "float64")])
def test_consolidate_refuses_and_changes_nothing(what: str, make: Any) -> None:
    net = model()
    regulariser = make(net, 1.0)
    regulariser.consolidate([(X, Y)])
    state, before = _flat(regulariser.state_dict()), Kept(net)
    try:
        regulariser.consolidate(BATCHES[what])
    except REFUSALS:
        before.check()
        assert _same(_flat(regulariser.state_dict()), state)
    else:  # labels are not MAS's business
        assert make is fastcl.MAS
        assert "label" in what


def _flat(state: Any) -> list[Any]:
    if isinstance(state, dict):
        return [x for key in state for x in (key, *_flat(state[key]))]
    return [state.clone() if isinstance(state, Tensor) else state]


def _same(a: list[Any], b: list[Any]) -> bool:
    if len(a) != len(b):
        return False
    return all(torch.equal(x, y) if isinstance(x, Tensor) else x == y for x, y in zip(a, b, strict=True))


WRONG: dict[str, Callable[[Tensor], Any]] = {
    "NaN": lambda t: t * math.nan,
    "inf": lambda t: t + math.inf,
    "negative": lambda t: t - 5,
    "one row more": lambda t: torch.cat([t, t[:1]]),
    "transposed": lambda t: t.t() if t.dim() > 1 else t[:-1],
    "0-d": lambda t: t.sum(),
    "float64": lambda t: t.double(),
    "float16": lambda t: t.half(),
    "integers": lambda t: t.long(),
    "complex": lambda t: t.to(torch.complex64),
    "on meta": lambda t: t.to("meta"),
    "None": lambda t: None,
    "a list": lambda t: t.tolist(),
}


@pytest.mark.parametrize("first", [True, False], ids=["first task", "second task"])
@pytest.mark.parametrize("what", WRONG)
@pytest.mark.parametrize("form", ["separate", "online", "mas"])
def test_merge_refuses_and_changes_nothing(form: str, what: str, first: bool) -> None:
    net = model()
    regulariser: Any = fastcl.MAS(net, 1.0) if form == "mas" else fastcl.EWC(net, 1.0, form=form)
    good = {name: torch.rand(p.shape) for name, p in net.named_parameters()}
    if not first:
        regulariser.merge(good)
    state = _flat(regulariser.state_dict())
    for name in ("0.weight", "3.bias"):
        with pytest.raises(REFUSALS):
            regulariser.merge({**good, name: WRONG[what](good[name])})
        assert _same(_flat(regulariser.state_dict()), state)
    regulariser.merge(good)
    assert regulariser.penalty().isfinite()


# ---- learners ----

STREAM = {setting: streams.make(streams.load("digits"), "split", setting) for setting in ("task", "domain", "class")}
FAST = ["finetune", "joint", "ewc", "mas", "si", "rwalk", "lwf", "icarl", "hat", "den"]
MOVES = [
    "observe",
    "observe",
    "an empty batch",
    "an unknown label",
    "a negative label",
    "float labels",
    "fewer labels",
    "another width",
    "NaN",
    "predict",
    "predict a task to come",
    "begin",
    "end",
    "end without data",
]


class Play:
    """A learner, and moves of anybody's loop, in any order."""

    def __init__(self, name: str) -> None:
        setting = METHODS[name].settings[0]
        self.stream = STREAM[setting]
        self.learner = METHODS[name].build(self.stream, hidden=(8,), seed=0)
        self.begun = 0

    def data(self) -> tuple[Tensor, Tensor]:
        x, y = self.stream.tasks[max(0, self.begun - 1)].train()
        return x[:16], y[:16]

    def move(self, what: str) -> Any:
        x, y = self.data()
        learner = self.learner
        if what == "begin":
            learner.begin_task(self.stream.tasks[self.begun])
            self.begun += 1
        elif what == "end":
            learner.end_task([(x, y)])
        elif what == "end without data":
            learner.end_task([])
        elif what == "predict":
            return learner.predict(x)
        elif what == "predict a task to come":
            return learner.predict(x, self.begun)
        else:
            bad: dict[str, tuple[Tensor, Any]] = {
                "observe": (x, y),
                "an empty batch": (x[:0], y[:0]),
                "an unknown label": (x, torch.full_like(y, 77)),
                "a negative label": (x, torch.full_like(y, -1)),
                "float labels": (x, y.float()),
                "fewer labels": (x, y[:-1]),
                "another width": (x[..., :-1], y),
                "NaN": (x.clone().fill_(math.nan), y),
            }
            return learner.observe(*bad[what])
        return None

    def weights(self) -> list[Tensor]:
        return [t.detach().clone() for t in self.learner.model.state_dict().values()]


@pytest.mark.filterwarnings("ignore::fastcl.FallbackWarning")
@pytest.mark.parametrize("name", FAST)
def test_protocol_in_any_order(name: str) -> None:
    @quickly(st.lists(st.sampled_from(MOVES), min_size=3, max_size=9), 8)
    def run(moves: list[str]) -> None:
        play = Play(name)
        for what in moves:
            if what == "begin" and play.begun == len(play.stream.tasks):
                continue
            before = play.weights()
            try:
                play.move(what)
            except REFUSALS:
                assert what != "begin"
                assert not (what in ("observe", "predict", "end") and play.begun), what
                if not what.startswith("end"):
                    assert all(torch.equal(a, b) for a, b in zip(before, play.weights(), strict=True)), what
            else:
                observed = what not in ("observe", "predict", "begin", "end", "end without data")
                assert not observed, f"{name} learned from {what}"
                # nothing to end: a method without anything to do there does nothing
                assert play.begun or what.startswith("end"), f"{what} before begin_task"
            for t in play.weights():
                assert not t.is_floating_point() or t.isfinite().all()
        if not play.begun:
            play.move("begin")
        assert math.isfinite(play.move("observe"))
