"""CLN's steps, and that no old image is read."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastcl import streams
from fastcl.methods import CLN

STREAM = streams.make(streams.load("digits"), "split", "class", 5)
SIZE = {"width": 4, "latent": 4, "replay": 40}
QUICK: dict[str, Any] = {**SIZE, "iterations": 1, "vae_epochs": 1, "vae_steps": 1, "nflae_steps": 3, "finish": 1}


def trained(stream: streams.Stream, tasks: int, epochs: int = 1, **options: Any) -> CLN:
    torch.manual_seed(0)
    cln = CLN.build(stream, **{**QUICK, **options})
    for task in stream.tasks[:tasks]:
        cln.begin_task(task)
        x, y = task.train()
        for _ in range(epochs):
            for part in torch.randperm(len(x)).split(64):
                cln.observe(x[part], y[part])
        cln.end_task([(x, y)])
    return cln


@pytest.mark.parametrize(("pools", "last"), [(2, "conv5"), (None, "conv13")])
def test_everything_grows_by_the_paper_s_steps(pools: int | None, last: str) -> None:
    cln = trained(STREAM, 3, encoder_pools=pools)
    assert [r["widths"][0] for r in cln.reports] == [4, 7, 10]
    assert [r["latent"] for r in cln.reports] == [4, 10, 16]
    assert cln.model.head.out_features == 6
    assert cln.vae.classes.n_components == 6
    assert cln.vae.encoder.get_submodule(last).out_channels == cln.model.get_submodule(last).out_channels == 10
    assert sum(isinstance(m, torch.nn.Conv2d) for m in cln.vae.encoder) == int(last[4:])
    again = CLN.build(STREAM, **QUICK, encoder_pools=pools)
    again.load_state_dict(cln.state_dict())
    x = torch.rand(3, 1, 8, 8)
    again.vae.eval(), cln.vae.eval()
    assert all(torch.equal(a, b) for a, b in zip(again.vae.encode(x), cln.vae.encode(x), strict=True))
    assert set(cln.reports[2]["synthesised"]) == {"0", "1", "2", "3"}
    assert cln.old is None  # replay ends with its task


def test_no_old_image_is_ever_read() -> None:
    """Each task's loader works only while the task runs."""
    now = {"task": 0}

    def guarded(task: streams.Task) -> streams.Task:
        def train() -> tuple[Tensor, Tensor]:
            assert now["task"] == task.index, f"task {task.index} was read during task {now['task']}"
            x, y = task.train()
            return x.clone(), y

        return replace(task, load_train=train)

    stream = replace(STREAM, tasks=tuple(guarded(task) for task in STREAM.tasks))
    cln = CLN.build(stream, **QUICK)
    for task in stream.tasks[:3]:
        now["task"] = task.index
        cln.begin_task(task)
        x, y = task.train()
        cln.observe(x[:64], y[:64])
        cln.end_task([(x, y)])
        # nothing of the task's own images is kept: what is poisoned now would show in any later step
        x.fill_(float("nan"))
    assert all(p.isfinite().all() for p in cln.model.parameters())
    assert all(p.isfinite().all() for p in cln.vae.parameters())
    kept = [t for t in vars(cln).values() if isinstance(t, Tensor)]
    assert not kept


def test_synthesised_images_are_what_the_classifier_says_they_are() -> None:
    cln = trained(STREAM, 1, 8, iterations=3, vae_steps=100)
    (images, labels), shares = cln.synthesise([0, 1], 50)
    assert images.dtype == torch.uint8
    assert labels.bincount().tolist() == [50, 50]
    assert min(shares.values()) > 0.3
    found = cln.predict(images.float() / 255)
    assert (found == labels).float().mean() > 0.9  # shifted repeats may differ


def test_the_classifier_is_shown_synthesised_images_of_every_class_alike_often(monkeypatch: pytest.MonkeyPatch) -> None:
    cln = trained(STREAM, 2)
    cln.begin_task(STREAM.tasks[2])
    shown: list[Tensor] = []
    monkeypatch.setattr("fastcl.methods.cln.jitter", lambda x: shown.append(x) or x)
    x, y = STREAM.tasks[2].train()
    nowhere = torch.full_like(x[:60], torch.nan)
    assert cln.loss(nowhere, y[:60]).isfinite()  # the real ones are counted, not seen
    assert len(shown[0]) == 60
    new, old = shown[0][:20], shown[0][20:]
    among = [(group.float() / 255).flatten(1) for group in (cln.new_shown[0], cln.past_shown[0])]
    assert all((image.flatten() == among[0]).all(1).any() for image in new)
    assert all((image.flatten() == among[1]).all(1).any() for image in old)
    cln.show, cln.new_shown = "real", None
    assert cln.loss(nowhere, y[:60]).isnan()


def test_spread_moves_the_latents_away_from_their_mean() -> None:
    vae = trained(STREAM, 1).vae.eval()
    y = torch.zeros(500, dtype=torch.long)
    narrow, usual, wide = (vae.sample(y, torch.Generator().manual_seed(0), spread=s) for s in (0.0, 1.0, 2.0))
    assert torch.equal(usual, vae.sample(y, torch.Generator().manual_seed(0)))
    assert narrow.std(0).max() == 0
    assert wide.std(0).mean() > 1.2 * usual.std(0).mean()


def test_soft_labels_are_what_the_classifier_made_of_the_images() -> None:
    cln = trained(STREAM, 1)
    before = copy.deepcopy(cln.model).eval()
    cln.begin_task(STREAM.tasks[1])
    images, _, logits = cln.past_shown
    torch.testing.assert_close(logits, before(images.float() / 255))


def test_too_few_are_augmented() -> None:
    x = torch.randint(0, 255, (3, 1, 8, 8), dtype=torch.uint8)
    found = CLN._augmented(x, 10)
    assert torch.equal(found[:3], x)
    assert len(found) == 10


def test_outliers_add_more_filters_than_the_fixed_number() -> None:
    fixed, more = trained(STREAM, 2), trained(STREAM, 2, grow="outliers", rounds=2)
    assert sum(more.reports[1]["widths"]) >= sum(fixed.reports[1]["widths"])


def test_learns_more_than_the_last_task() -> None:
    options = {
        "width": 6,
        "latent": 8,
        "iterations": 2,
        "vae_steps": 100,
        "replay": 100,
        "nflae_steps": 10,
        "finish": 60,
    }
    cln = trained(STREAM, 2, 6, **options)
    accuracy = [(cln.predict(x) == y).float().mean().item() for x, y in (task.test() for task in STREAM.tasks[:2])]
    assert min(accuracy) > 0.5  # fine-tuning: 0 and 1
    assert sum(accuracy) / 2 > 0.75


def test_pictures(tmp_path: Path) -> None:
    cln = trained(STREAM, 2)
    cln.plot_growth(tmp_path / "growth.png")
    cln.plot_generated(tmp_path / "generated.png")
    assert all((tmp_path / name).stat().st_size > 5000 for name in ("growth.png", "generated.png"))


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="grow must be"):
        CLN.build(STREAM, grow="always")
    for name, wrong in (("show", "all"), ("labels", "none"), ("spread", 0.0), ("spread", float("nan"))):
        with pytest.raises(ValueError, match=f"{name} is"):
            CLN.build(STREAM, **{name: wrong})
    with pytest.raises(ValueError, match="replay is 0"):
        CLN.build(STREAM, replay=0)
    with pytest.raises(ValueError, match="multiples of 4"):
        trained(replace(STREAM, input_shape=(1, 10, 10), tasks=STREAM.tasks), 1)
