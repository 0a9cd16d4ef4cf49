"""MeRGAN and DGM: what their generators hold, their losses, and the finish."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from fastcl.methods import METHODS

from .generative import GAN, STREAM, run_tasks


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
    state = learner.state_dict()
    name, whole = next(iter(before.items()))
    state["extra"]["critic"] = {**before, name: whole[1:]}
    with pytest.raises(ValueError, match=r"state\.extra\.critic.*shape"):
        again.load_state_dict(state)


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


@pytest.mark.parametrize(("width", "precision", "wanted"), [
    (16, "auto", False), (80, "auto", True), (16, "bfloat16", True), (80, "float32", False),
])  # fmt: skip
def test_on_a_cpu_only_wide_convolutions_change_precision(
    monkeypatch: pytest.MonkeyPatch, width: int, precision: str, wanted: bool
) -> None:
    monkeypatch.setattr("fastcl.nn.precision.has_fast_bfloat16", lambda device: True)  # a CPU with AMX
    learner = METHODS["mergan-joint"].build(STREAM, **{**GAN, "discriminator_width": width}, precision=precision)
    with learner.mixed():
        assert torch.is_autocast_enabled("cpu") == wanted
