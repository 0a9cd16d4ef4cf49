"""DGR, MeRGAN, DGM and the online and latent memories: their losses, what they hold, and that no old image is read."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastcl import streams
from fastcl.methods import METHODS, Method
from fastcl.runner import Config, Run

STREAM = streams.make(streams.load("digits"), "split", "class", 5)
GAN = {"width": 4, "discriminator_width": 4, "latent": 16}
REPLAYING: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("dgm-w", "dgm-a", "mergan-joint", "mergan-align"), GAN),
    "dgr": {"hidden": (16,), "latent": 4},
    "online-generative-memory": {"hidden": (16,), "latent": 4},
    "latent-generative-memory": {"hidden": (16, 16), "prototypes": True},
}


def run_tasks(learner: Method, stream: streams.Stream, tasks: int, steps: int = 6) -> Method:
    torch.manual_seed(0)
    for task in stream.tasks[:tasks]:
        learner.begin_task(task)
        x, y = learner.training_data(task)
        for part in torch.randperm(len(x))[: 32 * steps].split(32):
            learner.observe(x[part], y[part])
        learner.end_task([task.train()])
    return learner


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


@pytest.mark.parametrize("name", ["dgm-w", "dgm-a"])
def test_dgm_makes_an_old_task_s_images_again_to_the_bit(name: str) -> None:
    learner = METHODS[name].build(STREAM, **GAN)
    torch.manual_seed(0)
    y, made = torch.tensor([0, 1, 1, 0]), []
    for task in STREAM.tasks[:4]:
        learner.begin_task(task)
        x, labels = task.train()
        for part in torch.randperm(len(x))[:256].split(32):
            learner.observe(x[part], labels[part])
        learner.end_task([(x, labels)])
        made.append(learner.generator.generate(y, torch.Generator().manual_seed(1)))
    assert made[0].std() > 0.01
    assert all(torch.equal(made[0], again) for again in made)
    assert learner.sizes == sorted(learner.sizes)


def test_dgm_anneals_over_the_epochs_it_was_told() -> None:
    learner = METHODS["dgm-w"].build(STREAM, **GAN, epochs=2, s_max=100.0)
    task = STREAM.tasks[0]
    learner.begin_task(task)
    x, y = task.train()
    scales = []
    for _ in range(3):
        for a, b in zip(x.split(64), y.split(64), strict=True):
            learner.observe(a, b)
            scales.append(learner.generator.layers[0].scale)
    batches = -(-len(x) // 64)
    assert scales[batches - 1] == pytest.approx(50.0, rel=0.01)  # the ceiling of the first epoch
    assert scales[2 * batches - 1] == 100.0
    assert scales[-1] == 100.0  # beyond what was told it stays
    assert scales[:batches] == sorted(scales[:batches])


def test_dgm_s_rates_fall_to_0_over_the_last_part_of_a_task() -> None:
    learner = METHODS["dgm-w"].build(STREAM, **GAN, epochs=2, cooling=0.5, lr=1e-3)
    task = STREAM.tasks[0]
    learner.begin_task(task)
    x, y = task.train()
    rates = []
    for _ in range(2):
        for a, b in zip(x.split(64), y.split(64), strict=True):
            learner.observe(a, b)
            (rate,) = {g["lr"] for o in (learner.optimizer, learner.generator_optimizer) for g in o.param_groups}
            rates.append(rate)
    half = len(rates) // 2
    assert rates[: half + 1] == [1e-3] * (half + 1)
    assert rates[half:] == pytest.approx([1e-3 * (half - i) / half for i in range(half)])


def test_dgm_s_classifier_sees_every_class_alike_often(monkeypatch: pytest.MonkeyPatch) -> None:
    learner = run_tasks(METHODS["dgm-w"].build(STREAM, **GAN, finish=0), STREAM, 2)
    learner.begin_task(STREAM.tasks[2])
    replayed, labels = learner.replay
    assert labels.bincount().tolist() == [-(-len(STREAM.tasks[2].train()[1]) // 2)] * 4
    assert replayed.dtype == torch.uint8
    seen: list[Tensor] = []
    monkeypatch.setattr("fastcl.methods.dgm.class_loss", lambda logits, y, classes: seen.append(y) or logits.sum() * 0)
    x, y = STREAM.tasks[2].train()
    learner.observe(x[:32], y[:32])
    assert (seen[0] >= 4).sum() == 16  # two new classes beside four old ones: 32 old images, 16 new
    assert (seen[0] < 4).sum() == 32


@pytest.mark.parametrize("name", ["dgm-w", "mergan-joint"])
def test_the_finish_shows_every_class_alike_often_and_half_of_its_own_real(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    learner = run_tasks(METHODS[name].build(STREAM, **GAN, finish=0), STREAM, 1)
    learner.begin_task(STREAM.tasks[1])
    x, y = STREAM.tasks[1].train()
    learner.observe(x[:64], y[:64])
    learner.finish = 20
    seen: list[tuple[Tensor, Tensor]] = []
    images: list[Tensor] = []
    monkeypatch.setattr("fastcl.methods.method.jitter", lambda x: images.append(x) or x)
    monkeypatch.setattr(
        "fastcl.methods.method.class_loss",
        lambda logits, y, classes: seen.append((images[-1], y)) or logits.sum() * 0,
    )
    learner.end_task([(x, y)])
    shown, told = (torch.cat(part) for part in zip(*seen, strict=True))
    real = (shown.flatten(1).unsqueeze(1) == x.flatten(1)).all(2).any(1)
    share = told.bincount() / len(told)
    assert len(share) == 4
    assert (share - 0.25).abs().max() < 0.03
    assert not real[told < 2].any()
    assert real[told >= 2].float().mean() == pytest.approx(0.5, abs=0.05)


def test_mergan_goes_on_with_the_critic_as_it_was_before_the_finish() -> None:
    learner = run_tasks(METHODS["mergan-joint"].build(STREAM, **GAN, finish=0), STREAM, 1)
    before = {name: p.clone() for name, p in learner.model.state_dict().items()}
    learner.finish = 1
    learner.end_task([STREAM.tasks[0].train()])
    assert any(not torch.equal(p, before[name]) for name, p in learner.model.state_dict().items())
    again = METHODS["mergan-joint"].build(STREAM, **GAN)
    again.load_state_dict(learner.state_dict())
    for one in (learner, again):
        one.begin_task(STREAM.tasks[1])
        assert all(torch.equal(p, before[name]) for name, p in one.model.state_dict().items())


@pytest.mark.parametrize("name", ["dgm-w", "mergan-align"])
def test_wrong_training_is_refused(name: str) -> None:
    for option, wrong in (("cooling", 1.5), ("epochs", 0), ("finish", -1)):
        with pytest.raises(ValueError, match=f"{option} (is )?{wrong}"):
            METHODS[name].build(STREAM, **GAN, **{option: wrong})


def test_mergan_aligns_by_the_paper_s_term(monkeypatch: pytest.MonkeyPatch) -> None:
    """The generator's gradient with alignment less the one without is that of lambda/2 ||2 G - 2 G_prev||^2."""
    found = []
    for strength in (0.0, 0.5):
        learner = run_tasks(METHODS["mergan-align"].build(STREAM, **GAN, strength=strength, aligned=8), STREAM, 1)
        learner.begin_task(STREAM.tasks[1])
        with torch.no_grad():
            for p in learner.generator.parameters():
                p.add_(0.1)
        kept = {}
        monkeypatch.setattr(
            learner.generator_optimizer, "step", lambda k=kept, g=learner.generator: k.update(
                {n: p.grad.clone() for n, p in g.named_parameters()}
            ),
        )  # fmt: skip
        drawn: list[Tensor] = []
        own_z = learner._z
        monkeypatch.setattr(learner, "_z", lambda n, d, f=own_z, k=drawn: k.append(f(n, d)) or k[-1])
        own_past, past = learner._past, []
        monkeypatch.setattr(learner, "_past", lambda n, d, f=own_past, k=past: k.append(f(n, d)) or k[-1])
        torch.manual_seed(3)
        y = torch.tensor([2, 3, 3, 2])
        learner._generator_step(y)
        found.append(kept)
    generator = copy.deepcopy(learner.generator)
    made = generator(torch.cat(drawn), torch.cat([y, *past]))[4:]
    was = learner.previous(drawn[1], past[0]).detach()
    (0.5 / 2 * (2 * made - 2 * was).square().sum()).backward()
    for name, p in generator.named_parameters():
        expected = torch.zeros_like(p) if p.grad is None else p.grad
        torch.testing.assert_close(found[1][name] - found[0][name], expected, rtol=1e-3, atol=1e-4)


def test_mergan_joint_takes_its_snapshot_s_images_for_real(monkeypatch: pytest.MonkeyPatch) -> None:
    learner = run_tasks(METHODS["mergan-joint"].build(STREAM, **GAN), STREAM, 1)
    learner.begin_task(STREAM.tasks[1])
    calls: list[int] = []

    def spy(judge: nn.Module, real: Tensor, fake: Tensor, penalty: float) -> Tensor:
        calls.append(len(real))
        return judge.value(real).sum() * 0

    monkeypatch.setattr("fastcl.methods.mergan.critic_loss", spy)
    x, y = STREAM.tasks[1].train()
    learner.observe(x[:20], y[:20])
    assert calls == [40]


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
