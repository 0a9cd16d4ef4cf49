"""SI and RWalk against their definitions, written out step by step, and their hooks with several optimizers."""

from __future__ import annotations

import copy
import gc
import math
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastcl

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.01),
    "adam": lambda p: torch.optim.Adam(p, 0.01),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 0.01),
}
X = torch.randn(40, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
Y = torch.randint(0, 4, (40,), generator=torch.Generator().manual_seed(2))


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)).double()


def train(model: nn.Module, optimizer: torch.optim.Optimizer, regulariser: Any, steps: int) -> list[tuple[Any, Any]]:
    """Steps with the regulariser; returns every step's task gradients and movements, measured independently."""
    history = []
    for k in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(X[k % 20 :]), Y[k % 20 :]).backward()
        grads = {n: p.grad.clone() for n, p in model.named_parameters()}
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        regulariser.add_gradients()
        optimizer.step()
        history.append((grads, {n: p.detach() - before[n] for n, p in model.named_parameters()}))
    return history


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_si_is_its_definition(name: str) -> None:
    model = network()
    optimizer = OPTIMIZERS[name](model.parameters())
    si = fastcl.SI(model, 2.0, optimizer, xi=0.05)
    expected = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
    for _ in range(2):
        start = {n: p.detach().clone() for n, p in model.named_parameters()}
        history = train(model, optimizer, si, 12)
        for n, p in model.named_parameters():
            omega: Tensor = sum(-g[n] * d[n] for g, d in history)
            expected[n] += omega.clamp(min=0) / ((p.detach() - start[n]) ** 2 + 0.05)
        si.consolidate()
    for n, want in expected.items():
        torch.testing.assert_close(si.importances[n], want)
    anchor = {n: p.detach().clone() for n, p in model.named_parameters()}
    train(model, optimizer, si, 3)
    want = 2.0 * sum((expected[n] * (p - anchor[n]) ** 2).sum() for n, p in model.named_parameters())
    torch.testing.assert_close(si.penalty(), want)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_rwalk_is_its_definition(name: str) -> None:
    model = network()
    optimizer = OPTIMIZERS[name](model.parameters())
    rwalk = fastcl.RWalk(model, 2.0, optimizer, alpha=0.3, delta_t=5, epsilon=0.01)
    names = [n for n, _ in model.named_parameters()]
    fisher = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
    old_score: dict[str, Tensor] | None = None
    for _ in range(2):
        score = {n: torch.zeros_like(fisher[n]) for n in names}
        history = train(model, optimizer, rwalk, 12)  # two windows of 5 and one of 2
        for first in (0, 5, 10):
            window = history[first : first + 5]
            for g, _ in window:
                for n in names:
                    fisher[n] = 0.7 * fisher[n] + 0.3 * g[n] ** 2
            for n in names:
                gain, moved = sum(-g[n] * d[n] for g, d in window), sum(d[n] for _, d in window)
                score[n] += (gain / (0.5 * fisher[n] * moved**2 + 0.01)).clamp(min=0)
        rwalk.consolidate()
        largest_f, largest_s = (max(t.max() for t in group.values()) for group in (fisher, score))
        score = {n: s / largest_s for n, s in score.items()}
        if old_score is not None:
            score = {n: 0.5 * (s + old_score[n]) for n, s in score.items()}
        old_score = score
        for n in names:
            torch.testing.assert_close(rwalk.importances[n], fisher[n] / largest_f + score[n])


@pytest.mark.parametrize("kind", [fastcl.SI, fastcl.RWalk])
def test_hooks_and_calls_agree(kind: Any) -> None:
    results = []
    for hooked in (True, False):
        model = network()
        optimizer = torch.optim.Adam(model.parameters(), 0.01)
        regulariser = kind(model, 1.0, optimizer if hooked else None)
        for _ in range(7):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(X), Y).backward()
            if not hooked:
                regulariser.before_step()
            optimizer.step()
            if not hooked:
                regulariser.after_step()
        regulariser.consolidate()
        results.append(regulariser.importances)
    assert all(torch.equal(results[0][n], results[1][n]) for n in results[0])


@pytest.mark.parametrize("kind", [fastcl.SI, fastcl.RWalk])
def test_state_continues_exactly(kind: Any) -> None:
    model = network()
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    a = kind(model, 1.0, optimizer)
    train(model, optimizer, a, 7)
    a.consolidate()
    train(model, optimizer, a, 7)
    b = kind(model, 1.0, None)
    b.load_state_dict(a.state_dict())
    a.consolidate()
    b.consolidate()
    assert all(torch.equal(a.importances[n], b.importances[n]) for n in a.importances)
    assert all(t.any() for t in b.importances.values())


def test_the_optimizer_does_not_keep_it_alive() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    gone = weakref.ref(fastcl.SI(model, 1.0, optimizer))
    gc.collect()
    assert gone() is None
    nn.functional.cross_entropy(model(X), Y).backward()
    optimizer.step()


def test_bad_input() -> None:
    model = network()
    with pytest.raises(ValueError, match="xi is 0"):
        fastcl.SI(model, 1.0, xi=0)
    with pytest.raises(ValueError, match="strength is -1"):
        fastcl.SI(model, -1.0)
    for wrong in ("alpha", "delta_t", "epsilon"):
        with pytest.raises(ValueError, match=f"{wrong} is 0"):
            fastcl.RWalk(model, 1.0, **{wrong: 0})
    with pytest.raises(RuntimeError, match="call before_step"):
        fastcl.SI(model, 1.0).after_step()


@pytest.mark.parametrize("kind", [fastcl.SI, fastcl.RWalk])
def test_grown_head_keeps_what_it_gathered(kind: Any) -> None:
    """New rows start with nothing; the old ones come out as if the head had not grown."""
    found = []
    for grow in (False, True):
        model = network()
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        regulariser = kind(model, 1.0, optimizer)
        train(model, optimizer, regulariser, 10)
        if grow:
            head = model[2]
            wide = nn.Linear(8, 6).double()
            with torch.no_grad():
                wide.weight[:4], wide.bias[:4] = head.weight, head.bias
            model[2] = wide
        regulariser.consolidate()
        found.append(regulariser.importances["2.weight"])
    assert found[1].shape == (6, 8)
    torch.testing.assert_close(found[1][:4], found[0])
    assert (found[1][4:] == 0).all()


class Heads(nn.Module):
    """A head for each task; the second comes later."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.heads, self.active = network()[:2], nn.ModuleList([nn.Linear(8, 4).double()]), 0

    def forward(self, x: Tensor) -> Tensor:
        return self.heads[self.active](self.body(x))


@pytest.mark.parametrize("when", ["after the first task", "within it"])
@pytest.mark.parametrize("kind", [fastcl.SI, fastcl.RWalk])
def test_a_parameter_that_comes_later_is_followed(kind: Any, when: str) -> None:
    torch.manual_seed(0)
    model = Heads()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    regulariser = kind(model, 1.0, optimizer)

    def steps() -> None:
        for k in range(12):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(X[k:]), Y[k:]).backward()
            regulariser.add_gradients()
            optimizer.step()

    steps()
    if when == "after the first task":
        regulariser.consolidate()
    model.heads.append(nn.Linear(8, 4).double())
    optimizer.add_param_group({"params": model.heads[1].parameters()})
    model.active = 1
    steps()
    regulariser.consolidate()
    later = regulariser.importances["heads.1.weight"]
    assert later.shape == (4, 8)
    assert (later > 0).any()
    assert torch.equal(regulariser.anchors["heads.1.weight"], model.heads[1].weight)
    assert regulariser.penalty() == 0  # nothing has moved since


def test_a_task_that_diverged_is_refused_and_nothing_changes() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    si = fastcl.SI(model, 1.0, optimizer)
    train(model, optimizer, si, 3)
    si.consolidate()
    train(model, optimizer, si, 3)
    si.omega["0.weight"][0, 0] = math.inf
    before = copy.deepcopy(si.state_dict())
    with pytest.raises(ValueError, match="NaN or infinite"):
        si.consolidate()
    after = si.state_dict()
    assert after["tasks"] == before["tasks"] == 1
    for key in ("importances", "anchors", "start", "omega"):
        assert all(torch.equal(t, before[key][name]) for name, t in after[key].items())
