"""DGR and the latent and online memories: their losses, what they hold; no generative memory reads an old image."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fastcl import streams
from fastcl.methods import METHODS, Method
from fastcl.runner import Config, Run

from .generative import GAN, STREAM, run_tasks

REPLAYING: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("dgm-w", "dgm-a", "mergan-joint", "mergan-align"), GAN),
    "dgr": {"hidden": (16,), "latent": 4},
    "online-generative-memory": {"hidden": (16,), "latent": 4},
    "latent-generative-memory": {"hidden": (16, 16), "prototypes": True},
}


@pytest.mark.parametrize("name", REPLAYING)
def test_no_old_image_is_ever_read(name: str) -> None:
    """Each task's loader works only while the task runs, and its images are spoilt when it has ended."""
    now, given = {"task": 0}, []

    def guarded(task: streams.Task) -> streams.Task:
        def train() -> tuple[Tensor, Tensor]:
            assert now["task"] == task.index, f"task {task.index} was read during task {now['task']}"
            x, y = task.train()
            given.append(x.clone())
            return given[-1], y

        return replace(task, load_train=train)

    stream = replace(STREAM, tasks=tuple(guarded(task) for task in STREAM.tasks))
    learner = METHODS[name].build(stream, **REPLAYING[name])
    torch.manual_seed(0)
    for task in stream.tasks[:3]:
        now["task"] = task.index
        learner.begin_task(task)
        x, y = learner.training_data(task)
        for part in torch.arange(len(x))[:64].split(32):
            learner.observe(x[part], y[part])
        learner.end_task([(x, y)])
        for read in given:
            read.fill_(float("nan"))  # whoever kept them would now learn NaN
    assert all(torch.isfinite(p).all() for p in learner.model.parameters())
    if hasattr(learner, "generate"):
        images, meant = learner.generate(20)
        assert torch.isfinite(images).all()
        assert set(meant.tolist()) <= set(range(6))


@pytest.mark.parametrize("name", [name for name in REPLAYING if name != "latent-generative-memory"])
def test_steps_in_bfloat16_learn_what_float32_learns(name: str) -> None:
    """Parameters stay float32 and near those of float32's steps, but are not the same; images are made in float32."""
    found = []
    for precision in ("float32", "bfloat16"):
        learner = run_tasks(METHODS[name].build(STREAM, **REPLAYING[name], precision=precision), STREAM, 1, 3)
        images, _ = learner.generate(6)
        assert images.dtype == torch.float32
        found.append([p.detach().clone() for p in learner.generator.parameters()])
    assert all(p.dtype == torch.float32 for p in found[1])
    assert any(not torch.equal(a, b) for a, b in zip(*found, strict=True))
    for a, b in zip(*found, strict=True):
        if a.shape == b.shape:  # dgm grows by what its masks took
            assert (a - b).abs().max() < 0.1
    with pytest.raises(ValueError, match="precision is 'half'"):
        METHODS[name].build(STREAM, **REPLAYING[name], precision="half")


@pytest.mark.parametrize("labels", ["hard", "soft"])
def test_dgr_s_loss_is_the_formula(labels: str) -> None:
    learner = run_tasks(METHODS["dgr"].build(STREAM, **REPLAYING["dgr"], labels=labels), STREAM, 1)
    learner.begin_task(STREAM.tasks[1])
    images = torch.rand(5, 1, 8, 8)
    with torch.no_grad():
        learner.model[-1].bias.add_(torch.arange(10.0) / 10)
        before, now = learner.solver(images)[:, :2], learner.model(images)[:, :4]
        if labels == "hard":
            expected = F.cross_entropy(now, before.argmax(1))
        else:
            expected = -4 * ((before / 2).softmax(1) * (now / 2).log_softmax(1)[:, :2]).sum(1).mean()
        torch.testing.assert_close(learner._remembered(images), expected)


MODES: list[tuple[str, Callable[[float, float], bool]]] = [
    ("distill", lambda held, free: held < 0.8 * free),
    ("project", lambda held, free: held < 0.3 * free),
]


@pytest.mark.parametrize(("mode", "better"), MODES)
def test_online_memory_holds_what_is_said_of_remembered_images(
    mode: str, better: Callable[[float, float], bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same steps with and without: how far outputs on the remembered batch move."""
    moved = []
    for active in (True, False):
        learner = METHODS["online-generative-memory"].build(STREAM, hidden=(64,), latent=4, mode=mode, weight=5.0)
        run_tasks(learner, STREAM, 1, steps=8)
        learner.begin_task(STREAM.tasks[1])
        torch.manual_seed(1)
        images, zeros = learner.memory_of.sample(16)
        monkeypatch.setattr(learner.memory_of, "sample", lambda n, i=images, z=zeros: (i, z))
        monkeypatch.setattr(learner.memory_of, "learn", lambda *args: None)
        if not active:
            monkeypatch.setattr(learner, f"_{mode}", lambda x, y, i, f=learner: Method.observe(f, x, y))
        said = learner.model(images).detach()
        x, y = STREAM.tasks[1].train()
        for a, b in zip(x[:160].split(32), y[:160].split(32), strict=True):
            learner.observe(a, b)
        moved.append((learner.model(images).detach() - said)[:, :4].norm().item())
    assert better(*moved)


def test_lookahead_descends_the_change_that_the_step_will_make() -> None:
    """The gradient of ||f(x') - f_ahead(x')||^2 by finite differences, through the inner gradient."""
    learner = METHODS["online-generative-memory"].build(STREAM, hidden=(8,), latent=4, mode="lookahead", rate=0.05)
    run_tasks(learner, STREAM, 1, steps=2)
    learner.begin_task(STREAM.tasks[1])
    learner.model.double()
    learner.optimizer = torch.optim.SGD(learner.model.parameters(), 0.0)  # the step itself is not looked at
    x, y = (t[:8] for t in STREAM.tasks[1].train())
    x, images = x.double(), torch.rand(4, 1, 8, 8, dtype=torch.float64)

    def change() -> float:
        params = list(learner.model.parameters())
        gradients = torch.autograd.grad(learner.loss(x, y), params)
        ahead = copy.deepcopy(learner.model)
        with torch.no_grad():
            for p, g in zip(ahead.parameters(), gradients, strict=True):
                p.sub_(0.05 * g)
            return (learner.model(images) - ahead(images))[:, :4].square().sum(1).mean().item()

    weight = learner.model[-1].weight
    before, expected = weight.detach().clone(), {}
    for at in ((0, 0), (2, 3), (3, 7)):
        ends = []
        for step in (1e-5, -1e-5):
            with torch.no_grad():
                weight[at] += step
            ends.append(change())
            with torch.no_grad():
                weight[at] -= step
        expected[at] = (ends[0] - ends[1]) / 2e-5
    learner._lookahead(x, y, images)
    for at, slope in expected.items():
        assert (before[at] - weight[at]).item() / 0.05 == pytest.approx(slope, rel=1e-3, abs=1e-7)


def test_latent_memory_holds_the_embedder_and_hallucinates_known_classes() -> None:
    drift = {}
    for hold in ("mas", "none"):
        learner = METHODS["latent-generative-memory"].build(STREAM, hidden=(32, 32), hold=hold, strength=1e4)
        run_tasks(learner, STREAM, 1)
        x, _ = STREAM.tasks[0].test()
        before = learner.embedder(x).detach()
        learner.begin_task(STREAM.tasks[1])
        a, b = STREAM.tasks[1].train()
        for p, q in zip(a.split(32), b.split(32), strict=True):
            learner.observe(p, q)
        drift[hold] = (learner.embedder(x) - before).norm().item()
        features, classes = learner._hallucinated(50)
        assert set(classes.tolist()) == {0, 1}
        assert features.shape == (50, 32)
        assert (features >= 0).all()
    assert drift["mas"] < 0.3 * drift["none"]
    held = METHODS["latent-generative-memory"].build(STREAM, hidden=(32, 32))
    with torch.no_grad():
        held.embedder[0][-1].bias[3] = -100.0  # a unit that is off for all images would be free to turn on for them
    run_tasks(held, STREAM, 1, 1)
    assert (held.regulariser.state_dict()["importances"]["0.1.bias"] > 0).all()
    ewc = METHODS["latent-generative-memory"].build(STREAM, hidden=(32, 32), hold="ewc")
    run_tasks(ewc, STREAM, 1)
    assert all(name.startswith("0.") for name in ewc.regulariser.state_dict()["importances"])
    assert all(p.requires_grad for p in ewc.model.parameters())


def test_the_finish_teaches_the_head_alone_what_is_hallucinated(monkeypatch: pytest.MonkeyPatch) -> None:
    learner = METHODS["latent-generative-memory"].build(STREAM, hidden=(32, 32), finish=0)
    run_tasks(learner, STREAM, 2)
    before = copy.deepcopy(learner)
    torch.manual_seed(1)
    middle = 3 * torch.rand(4, 32)  # a generator that has learned
    monkeypatch.setattr(learner.generator, "sample", lambda y: middle[y] + torch.rand(len(y), 32))
    y = torch.arange(4).repeat(50)
    z = learner.generator.sample(y).detach() * learner.scale

    def right() -> float:
        return (learner.head(z)[:, :4].argmax(1) == y).float().mean().item()

    first = right()
    learner.finish = 200
    learner._finish(32)
    assert right() > max(first, 0.9)
    for name, p in learner.embedder.state_dict().items():
        assert torch.equal(p, before.embedder.state_dict()[name])
    assert any(not torch.equal(a, b) for a, b in zip(learner.head.parameters(), before.head.parameters(), strict=True))
    with pytest.raises(ValueError, match="finish -1"):
        METHODS["latent-generative-memory"].build(STREAM, finish=-1)


def test_prototypes_follow_the_drift() -> None:
    learner = METHODS["latent-generative-memory"].build(STREAM, hidden=(16, 16), prototypes=True, hold="none")
    run_tasks(learner, STREAM, 1)
    x, y = STREAM.tasks[0].train()
    torch.testing.assert_close(learner.means[1], learner.embedder(x[y == 1]).mean(0).detach())
    old = {c: m.clone() for c, m in learner.means.items()}
    learner.begin_task(STREAM.tasks[1])
    with torch.no_grad():  # every feature moves by the same amount
        learner.embedder[0][-1].bias.add_(50.0)
        learner.old_embedder[0][-1].bias.add_(40.0)
    learner._follow([STREAM.tasks[1].train()])
    for c, mean in old.items():
        torch.testing.assert_close(learner.means[c] - mean, torch.full((16,), 10.0), rtol=1e-4, atol=1e-3)


def test_generated_accuracy_is_measured_for_generative_methods_alone() -> None:
    result = Run(Config("dgr", tasks=2, epochs=2, options={"generator": "cvae", "hidden": (64,)})).train()
    assert 0 <= result["acc_generated"] <= 1
    assert result["memory"] > 0
    assert Run(Config("finetune", tasks=2, epochs=1)).train()["acc_generated"] is None
