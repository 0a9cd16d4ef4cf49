"""LwF, iCaRL, latent space alignment and stored samples, against their formulas on small problems."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fastcl import metrics, streams
from fastcl.methods import METHODS, Method, entropy_within_tasks
from fastcl.nn import Discriminator
from fastcl.runner import Config, Run


def stream(setting: str) -> streams.Stream:
    return streams.make(streams.load("digits"), "split", setting, 5)


def trained(learner: Method, setting: str, tasks: int, epochs: int = 2) -> Method:
    torch.manual_seed(0)
    for task in stream(setting).tasks[:tasks]:
        learner.begin_task(task)
        x, y = learner.training_data(task)
        for _ in range(epochs):
            for part in torch.randperm(len(x)).split(32):
                learner.observe(x[part], y[part])
        learner.end_task([task.train()])
    return learner


@pytest.mark.parametrize("setting", ["task", "class", "domain"])
def test_lwf_s_loss_is_the_formula(setting: str) -> None:
    tasks = stream(setting).tasks
    learner = trained(METHODS["lwf"].build(stream(setting), hidden=(16,), strength=0.7), setting, 2)
    learner.begin_task(tasks[2])
    with torch.no_grad():
        learner.model[-1].weight.mul_(1.1)
        x, y = (t[:9] for t in tasks[2].train())
        now, before = learner.model(x), learner.previous(x)

        def soft(columns: list[int]) -> Tensor:
            p, q = (before[:, columns] / 2).softmax(1), (now[:, columns] / 2).log_softmax(1)
            return -4 * (p * q).sum(1).mean()

        groups = {"task": [[0, 1], [2, 3]], "class": [[0, 1, 2, 3]], "domain": [[0, 1]]}[setting]
        own = {"task": [4, 5], "class": [0, 1, 2, 3, 4, 5], "domain": [0, 1]}[setting]
        right = torch.tensor([own.index(c) for c in y.tolist()])
        expected = F.cross_entropy(now[:, own], right) + 0.7 * sum(soft(g) for g in groups)
        torch.testing.assert_close(learner.loss(x, y), expected)


def test_icarl_s_loss_and_means_are_the_paper_s() -> None:
    tasks = stream("class").tasks
    learner = trained(METHODS["icarl"].build(stream("class"), hidden=(16,), budget=40), "class", 2)
    assert len(learner.exemplars) == 40
    x, y = tasks[1].test()
    features = F.normalize(learner.model[:-1](x), dim=1)
    means = []
    for c in range(4):
        phi = F.normalize(learner.model[:-1](learner.exemplars.samples[0, c]), dim=1).mean(0)
        means.append(phi / phi.norm())
    nearest = torch.cdist(features, torch.stack(means)).argmin(1)
    assert torch.equal(learner.predict(x), nearest)
    assert torch.equal(learner.predict(x, 1), torch.cdist(features, torch.stack(means[2:])).argmin(1) + 2)
    learner.begin_task(tasks[2])
    x, y = learner.training_data(tasks[2])
    assert len(x) == len(tasks[2].train()[0]) + 40
    x, y = x[-60:], y[-60:]  # old and new
    with torch.no_grad():
        learner.model[-1].weight.mul_(1.1)
        target = F.one_hot(y, 6).float()
        target[:, :4] = learner.previous(x)[:, :4].sigmoid()
        expected = F.binary_cross_entropy_with_logits(learner.model(x)[:, :6], target, reduction="none").sum(1).mean()
        torch.testing.assert_close(learner.loss(x, y), expected)


def test_icarl_s_means_follow_the_network() -> None:
    learner = trained(METHODS["icarl"].build(stream("class"), hidden=(16,), budget=20), "class", 1)
    x, _ = stream("class").tasks[0].test()
    learner.predict(x)
    _, before = learner._class_means()
    with torch.no_grad():
        learner.model[1].weight.normal_()
    assert not torch.allclose(learner._class_means()[1], before)


@pytest.mark.parametrize("setting", ["task", "domain", "class"])
@pytest.mark.parametrize("name", ["ewc", "si", "rwalk", "mas"])
def test_stored_samples_help(name: str, setting: str) -> None:
    """EWC-S and its kin keep at most the budget, and remember more by it alone than without."""
    accuracy = []
    for budget in (0, 100):
        options = {"budget": budget, "hidden": (48,), "strength": 0.0}
        run = Run(Config(name, setting=setting, epochs=6, tasks=5, options=options))
        accuracy.append(run.train()["average_accuracy"])
        assert len(run.learner.exemplars) <= budget
    assert accuracy[1] > accuracy[0] + (0.3 if setting == "class" else 0.02 if setting == "domain" else -0.02)


def test_entropy_within_tasks_is_each_task_s_own() -> None:
    logits, y = torch.randn(4, 5), torch.tensor([0, 1, 3, 4])
    expected = torch.stack(
        [
            F.cross_entropy(logits[:2, :2], y[:2], reduction="sum"),
            F.cross_entropy(logits[2:, 2:], y[2:] - 2, reduction="sum"),
        ]
    )
    torch.testing.assert_close(entropy_within_tasks(logits, y, [(0, 1), (2, 3, 4)]), expected.sum() / 4)


# ---- latent space alignment ----


@pytest.mark.parametrize("options", [{}, {"bridge": "mlp"}, {"parallel": True}], ids=["affine", "mlp", "parallel"])
def test_old_heads_read_the_new_space_through_the_bridges(options: dict[str, object]) -> None:
    learner = trained(METHODS["latent-space-alignment"].build(stream("task"), hidden=(32,), **options), "task", 3, 6)
    x, y = stream("task").tasks[0].test()
    z = learner.model[:-1](x)
    for g in reversed(learner.bridges):
        z = g(z)
    torch.testing.assert_close(learner.logits(x, 0), learner.model[-1](z)[:, :2], rtol=1e-3, atol=1e-3)
    right = (learner.predict(x, 0) == y).float().mean()
    without = (learner.model(x)[:, :2].argmax(1) == y).float().mean()
    assert right > 0.8
    assert right >= without


def test_old_heads_do_not_move() -> None:
    learner = METHODS["latent-space-alignment"].build(stream("task"), hidden=(16,))
    trained(learner, "task", 1)
    head = learner.model[-1].weight[:2].detach().clone()
    task = stream("task").tasks[1]
    learner.begin_task(task)
    x, y = task.train()
    for part in torch.arange(len(x)).split(32):
        learner.observe(x[part], y[part])
    assert torch.equal(learner.model[-1].weight[:2], head)
    old, _ = stream("task").tasks[0].test()
    expected = learner.model[-1](learner.previous(old))[:, :2].argmax(1)  # the bridge is not there yet
    assert torch.equal(learner.predict(old, 0), expected)


def test_parallel_starts_every_task_alike() -> None:
    learner = METHODS["latent-space-alignment"].build(stream("task"), hidden=(16,), parallel=True)
    start = [p.detach().clone() for p in learner.model[:-1].parameters()]
    trained(learner, "task", 1)
    assert not torch.equal(start[0], learner.model[1].weight)
    learner.begin_task(stream("task").tasks[1])
    assert all(torch.equal(a, b) for a, b in zip(start, learner.model[:-1].parameters(), strict=True))


def test_lost_per_hop() -> None:
    matrix = [[1.0, 0.0, 0.0], [0.9, 0.8, 0.0], [0.7, 0.6, 1.0]]
    assert metrics.lost_per_hop(matrix) == pytest.approx([0.15, 0.3])
    assert metrics.lost_per_hop([[0.5]]) == []


def test_joint_training_of_the_gans_classifier() -> None:
    learner = METHODS["joint"].build(stream("class"), network="discriminator", discriminator_width=4)
    trained(learner, "class", 2, epochs=4)
    x, y = (torch.cat(parts) for parts in zip(*(t.test() for t in stream("class").tasks[:2]), strict=True))
    assert isinstance(learner.model, Discriminator)
    learner.model.eval()
    with torch.no_grad():
        assert (learner.model(x)[:, :4].argmax(1) == y).float().mean() > 0.9


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("lwf", {"strength": -1}, "strength is -1"),
        ("lwf", {"temperature": 0}, "temperature is 0"),
        ("icarl", {"budget": -5}, "budget is -5"),
        ("ewc", {"budget": -5}, "budget is -5"),
        ("latent-space-alignment", {"bridge": "rope"}, "bridge is 'rope'"),
        ("latent-space-alignment", {"ridge": -1}, "ridge is -1"),
        ("latent-generative-memory", {"hold": "glue"}, "hold must be ewc, mas or none"),
        ("latent-generative-memory", {"penalty": float("nan")}, "penalty is nan"),
        ("latent-generative-memory", {"critic_steps": 0}, "critic_steps is 0"),
        ("online-generative-memory", {"mode": "wait"}, "mode is 'wait'"),
        ("online-generative-memory", {"ball": "foot"}, "ball is 'foot'"),
        ("online-generative-memory", {"steps": 0}, "steps is 0"),
        ("online-generative-memory", {"eps": 0}, "eps is 0"),
        ("dgr", {"labels": "none"}, "labels must be hard or soft"),
        ("dgr", {"r": 0}, "r is 0"),
        ("mergan-joint", {"critic_steps": 0}, "critic_steps is 0"),
        ("mergan-align", {"strength": -1}, "strength is -1"),
        ("dgm-w", {"epochs": 0}, "epochs is 0"),
        ("dgm-w", {"s_max": 0.5}, "s_max is 0.5"),
        ("dgm-a", {"schedule": "slow"}, "schedule is 'slow'"),
        ("dgm-a", {"optimizer": torch.optim.SGD}, "optimizer must be left out"),
        ("cln", {"show": "nothing"}, "show is 'nothing'"),
        ("joint", {"network": "cnn"}, "network is 'cnn' but must be mlp or discriminator"),
    ],
)
def test_bad_options_are_named(name: str, options: dict[str, object], message: str) -> None:
    setting = METHODS[name].settings[0]
    with pytest.raises(ValueError, match=message):
        METHODS[name].build(stream(setting), **options)
