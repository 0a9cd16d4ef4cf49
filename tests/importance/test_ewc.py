"""EWC's three forms against their definitions, its fused gradient, growth, state."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

import fastcl

FORMS = ["separate", "single", "online"]


def model_and_tasks() -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)).double()
    return model, [(torch.randn(11, 6).double(), torch.randint(0, 4, (11,))) for _ in range(3)]


def moved(model: nn.Module) -> None:
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn_like(p)


def history(ewc: fastcl.EWC, model: nn.Module, tasks: list) -> list[tuple[dict[str, Tensor], dict[str, Tensor]]]:
    """Consolidates on every task, moving the weights in between; returns each task's own Fisher and anchor."""
    past = []
    for task in tasks:
        moved(model)
        past.append(
            (
                fastcl.fisher_diagonal(model, [task], ewc.kind),
                {n: p.detach().clone() for n, p in model.named_parameters()},
            )
        )
        ewc.consolidate([task])
    moved(model)
    return past


def by_definition(form: str, gamma: float, past: list, model: nn.Module, strength: float) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    last = past[-1][1]
    for age, (fisher, anchor) in enumerate(reversed(past)):
        for name, p in model.named_parameters():
            centre = anchor[name] if form == "separate" else last[name]
            weight = gamma**age if form == "online" else 1.0
            total = total + weight * (fisher[name] * (p - centre).square()).sum()
    return 0.5 * strength * total


@pytest.mark.parametrize("form", FORMS)
def test_penalty_and_gradient_are_the_definition(form: str) -> None:
    model, tasks = model_and_tasks()
    ewc = fastcl.EWC(model, 30.0, form=form, gamma=0.7)
    expected = by_definition(form, 0.7, history(ewc, model, tasks), model, 30.0)
    torch.testing.assert_close(ewc.penalty(), expected)
    want = torch.autograd.grad(expected, list(model.parameters()))
    got = torch.autograd.grad(ewc.penalty(), list(model.parameters()))
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w)


@pytest.mark.parametrize("form", FORMS)
def test_add_gradients_is_the_penaltys_backward(form: str) -> None:
    model, tasks = model_and_tasks()
    ewc = fastcl.EWC(model, 5.0, form=form)
    history(ewc, model, tasks)
    loss = model(tasks[0][0]).square().sum()
    (loss + ewc.penalty()).backward()
    want = [p.grad for p in model.parameters()]
    model.zero_grad()
    model(tasks[0][0]).square().sum().backward()
    value = ewc.add_gradients()
    torch.testing.assert_close(value, ewc.penalty().detach())
    for p, w in zip(model.parameters(), want, strict=True):
        torch.testing.assert_close(p.grad, w)


def test_memory_does_not_grow_with_tasks() -> None:
    model, tasks = model_and_tasks()
    ewc = fastcl.EWC(model, 5.0, form="separate")
    sizes = []
    for task in tasks:
        ewc.consolidate([task])
        state = ewc.state_dict()
        sizes.append(sum(t.numel() for group in ("importances", "anchors") for t in state[group].values()))
    assert len(set(sizes)) == 1


def test_before_the_first_task_it_is_nothing() -> None:
    model, _ = model_and_tasks()
    ewc = fastcl.EWC(model, 5.0)
    assert ewc.penalty() == 0
    assert ewc.add_gradients() == 0
    assert all(p.grad is None for p in model.parameters())


def test_protects_what_it_learned() -> None:
    """A strong penalty keeps the important weights; without it the same steps move them far."""
    distance = {}
    for strength in (0.0, 1e4):
        model, tasks = model_and_tasks()
        ewc = fastcl.EWC(model, strength)
        ewc.consolidate([tasks[0]])
        old = torch.cat([a.flatten() for a in ewc.anchors.values()])
        fisher = torch.cat([f.flatten() for f in ewc.importances.values()])
        optimizer = torch.optim.Adam(model.parameters(), 1e-2)
        for _ in range(30):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(tasks[1][0]), tasks[1][1]).backward()
            ewc.add_gradients()
            optimizer.step()
        new = torch.cat([p.detach().flatten() for p in model.parameters()])
        distance[strength] = (fisher * (new - old).square()).sum().item()
    assert distance[1e4] < 0.1 * distance[0.0]


@pytest.mark.parametrize("form", FORMS)
def test_grown_head_keeps_old_importances_and_frees_new_rows(form: str) -> None:
    model, tasks = model_and_tasks()
    ewc = fastcl.EWC(model, 5.0, form=form)
    ewc.consolidate([tasks[0]])
    before = ewc.importances["2.weight"].clone()
    wide = nn.Linear(8, 6).double()
    with torch.no_grad():
        wide.weight[:4], wide.bias[:4] = model[2].weight, model[2].bias
    model[2] = wide
    assert ewc.penalty() == 0
    with torch.no_grad():
        wide.weight[4:] += 1  # new rows are free
    assert ewc.penalty() == 0
    torch.testing.assert_close(ewc.importances["2.weight"][:4], before)
    ewc.consolidate([tasks[1]])
    assert ewc.importances["2.weight"].shape == (6, 8)
    model[2] = nn.Linear(8, 3).double()
    with pytest.raises(ValueError, match="may grow, not shrink"):
        ewc.penalty()


def test_state_continues_exactly() -> None:
    model, tasks = model_and_tasks()
    ewc = fastcl.EWC(model, 5.0, form="separate")
    history(ewc, model, tasks[:2])
    again = fastcl.EWC(model, 5.0, form="separate")
    again.load_state_dict(ewc.state_dict())
    ewc.consolidate([tasks[2]])
    again.consolidate([tasks[2]])
    moved(model)
    assert torch.equal(ewc.penalty(), again.penalty())


def test_bad_state_is_refused_and_changes_nothing() -> None:
    model, tasks = model_and_tasks()
    ewc = fastcl.EWC(model, 5.0)
    ewc.consolidate([tasks[0]])
    good = ewc.state_dict()
    for wrong, message in [
        ({**good, "importances": {"other": torch.ones(2)}, "anchors": {"other": torch.ones(2)}}, "another model"),
        ({**good, "importances": {**good["importances"], "0.bias": torch.full((8,), math.nan)}}, "0.bias has NaN"),
        ({**good, "importances": {**good["importances"], "0.bias": torch.ones(99)}}, "0.bias has shape"),
    ]:
        with pytest.raises(ValueError, match=message):
            ewc.load_state_dict(wrong)
        assert ewc.state_dict()["importances"].keys() == good["importances"].keys()


def test_bf16_storage() -> None:
    model, tasks = model_and_tasks()
    model.float()
    full, half = fastcl.EWC(model, 5.0), fastcl.EWC(model, 5.0, dtype=torch.bfloat16)
    for ewc in (full, half):
        ewc.consolidate([(tasks[0][0].float(), tasks[0][1])])
    assert half.importances["0.weight"].dtype == torch.bfloat16
    moved(model)
    torch.testing.assert_close(half.penalty(), full.penalty(), rtol=1e-2, atol=0)


def test_bad_arguments() -> None:
    model, tasks = model_and_tasks()
    for strength in (-1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="strength is"):
            fastcl.EWC(model, strength)
    with pytest.raises(ValueError, match="form is 'many'"):
        fastcl.EWC(model, 1.0, form="many")
    with pytest.raises(ValueError, match="kind is 'right'"):
        fastcl.EWC(model, 1.0, kind="right")
    with pytest.raises(ValueError, match=r"gamma is 1\.5"):
        fastcl.EWC(model, 1.0, gamma=1.5)
    ewc = fastcl.EWC(model, 1.0)
    ewc.consolidate([tasks[0]])
    before = {name: f.clone() for name, f in ewc.importances.items()}
    with pytest.raises(ValueError, match="batches is empty"):
        ewc.consolidate([])
    poisoned = {name: torch.full_like(f, math.nan) for name, f in before.items()}
    with pytest.raises(ValueError, match="NaN"):
        ewc.merge(poisoned)
    assert all(torch.equal(ewc.importances[name], f) for name, f in before.items())
    assert ewc.tasks == 1
