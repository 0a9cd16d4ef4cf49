"""HAT: exactly zero forgetting with binary masks, heads, inferred tasks, resuming."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from fastcl import streams
from fastcl.methods import HAT
from fastcl.nn import MaskedLinear, mlp
from fastcl.runner import Config, Run


def learn(learner: Any, tasks: Any, epochs: int = 4, record: list[Any] | None = None) -> None:
    for task in tasks:
        learner.begin_task(task)
        x, y = learner.training_data(task)
        for _ in range(epochs):
            for a, b in zip(x.split(32), y.split(32), strict=True):
                learner.observe(a, b)
        learner.end_task([(x, y)])
        if record is not None:
            probe = tasks[0].test()[0]
            record.append([learner.logits(probe, t) for t in range(len(learner.tasks))])


OPTIMIZERS = {
    "MaskedAdam": None,
    "Adam, protected": lambda params: torch.optim.Adam(params, 2e-3, weight_decay=0.01),
    "SGD, protected": lambda params: torch.optim.SGD(params, 0.05, momentum=0.9, weight_decay=1e-3),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_old_tasks_outputs_never_change(optimizer: str) -> None:
    """Forgetting is zero to the last bit of the logits, not only in accuracy."""
    stream = streams.make(streams.load("digits"), "split", "task")
    learner = HAT.build(stream, hidden=(40, 40), strength=0.1, optimizer=OPTIMIZERS[optimizer])
    outputs: list[Any] = []
    learn(learner, stream.tasks[:4], record=outputs)
    for later in outputs:
        for t, logits in enumerate(later):
            assert torch.equal(logits, outputs[t][t])
    assert not torch.equal(outputs[0][0], outputs[1][1])
    report = learner.occupancy()
    assert len(report["used"]) == 4
    assert 0 < report["used"][0] <= report["reserved"] <= 1


def test_soft_masks_forget_a_little_or_nothing() -> None:
    stream = streams.make(streams.load("digits"), "split", "task")
    learner = HAT.build(stream, hidden=(40,), binary=False)
    outputs: list[Any] = []
    learn(learner, stream.tasks[:2], record=outputs)
    assert ((learner.layers[0].masks > 0) & (learner.layers[0].masks < 1)).any()
    torch.testing.assert_close(outputs[1][0], outputs[0][0], rtol=0.3, atol=0.3)


@pytest.mark.parametrize("scenario", ["split", "permuted"])
def test_learns_digits_without_forgetting(scenario: str) -> None:
    result = Run(Config("hat", scenario=scenario, setting="task", tasks=5, epochs=8, seed=1)).train()
    assert result["forgetting"] == 0.0
    assert result["average_accuracy"] > (0.97 if scenario == "split" else 0.8)
    accuracy = result["accuracy"]
    for later in range(5):
        for task in range(later):
            assert accuracy[later][task] == accuracy[task][task]


def test_task_of_least_entropy() -> None:
    stream = streams.make(streams.load("digits"), "split", "class")
    learner = HAT.build(stream, hidden=(60,))
    learn(learner, stream.tasks[:2], epochs=8)
    x = torch.cat([task.test()[0] for task in stream.tasks[:2]])
    found = learner.predict(x)
    for n in range(0, len(x), 20):
        entropies = []
        for t in range(2):
            p = learner.logits(x[n : n + 1], t).softmax(1)
            entropies.append(-(p * p.log()).sum().item())
        assert found[n].item() in learner.tasks[entropies.index(min(entropies))]
    y = torch.cat([task.test()[1] for task in stream.tasks[:2]])
    assert (found == y).float().mean() > 0.6


def test_scale_follows_the_epoch_and_embeddings_are_clamped() -> None:
    stream = streams.make(streams.load("digits"), "split", "task")
    learner = HAT.build(stream, hidden=(20,), clamp=0.5)
    learner.begin_task(stream.tasks[0])
    x, y = stream.tasks[0].train()
    scales: list[float] = []
    learner.layers[0].register_forward_pre_hook(lambda layer, _: scales.append(layer.scale))
    for _ in range(2):
        for a, b in zip(x.split(32), y.split(32), strict=True):
            learner.observe(a, b)
    n = len(scales) // 2
    assert scales[:n] == scales[n:]
    assert scales[0] == 1 / 400
    assert scales[n - 1] == 400.0
    assert learner.layers[0].embedding.abs().max() <= 0.5
    assert learner.layers[0].scale == 400.0


def test_resumes_to_the_bit(tmp_path: Path) -> None:
    stream = streams.make(streams.load("digits"), "split", "task")
    a, b = (HAT.build(stream, hidden=(20,), seed=2) for _ in range(2))
    torch.manual_seed(0)
    learn(a, stream.tasks[:2], epochs=2)
    b.load_state_dict(copy.deepcopy(a.state_dict()))
    for learner in (a, b):
        torch.manual_seed(1)
        learn(learner, stream.tasks[2:4], epochs=2)
    for p, q in zip(a.model.parameters(), b.model.parameters(), strict=True):
        assert torch.equal(p, q)
    assert torch.equal(a.layers[0].masks, b.layers[0].masks)
    a.plot_occupancy(tmp_path / "occupancy.png")
    assert (tmp_path / "occupancy.png").stat().st_size > 1000


def test_refused() -> None:
    stream = streams.make(streams.load("digits"), "split", "task")
    with pytest.raises(ValueError, match="model must have layers with unit masks"):
        HAT(mlp((64,), (8,), 10), setting="task")
    with pytest.raises(ValueError, match="model must have layers with unit masks"):
        HAT(torch.nn.Sequential(MaskedLinear(64, 8), torch.nn.Linear(8, 10)), setting="task")
    for option in ({"s_max": 0.5}, {"strength": -1.0}, {"clamp": float("nan")}):
        with pytest.raises(ValueError, match=next(iter(option))):
            HAT.build(stream, **option)
    with pytest.raises(ValueError, match="hat works in task, class"):
        HAT.build(streams.make(streams.load("digits"), "split", "domain"))
    learner = HAT.build(stream, hidden=(8,))
    learner.begin_task(stream.tasks[0])
    with pytest.raises(ValueError, match="unknown label 2"):
        learner.observe(torch.zeros(1, 1, 8, 8), torch.tensor([2]))
    with pytest.raises(ValueError, match="only 1 tasks have begun"):
        learner.predict(torch.zeros(1, 1, 8, 8), 1)
    assert learner.predict(torch.zeros(2, 1, 8, 8), stream.tasks[3]).tolist() == [6, 6]
