"""The learner protocol, for every method: runs in anybody's loop, repeats, resumes, refuses bad input."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastcl import streams
from fastcl.checkpoint import CheckpointError
from fastcl.methods import METHODS, Method
from fastcl.runner import Config, Run

pytestmark = pytest.mark.filterwarnings("ignore::fastcl.FallbackWarning")


# hidden widths where a method has them; a small network of its own for the others
GAN = {"width": 4, "discriminator_width": 4, "latent": 16}
SMALL: dict[str, dict[str, Any]] = {
    "cln": {
        "width": 3,
        "latent": 4,
        "replay": 10,
        "iterations": 1,
        "vae_epochs": 1,
        "vae_steps": 1,
        "nflae_steps": 2,
        "finish": 2,
        "show": "real",  # a VAE of one step generates nothing
    },
    **{name: {**GAN, "finish": 1} for name in ("mergan-joint", "mergan-align", "dgm-w", "dgm-a")},
    "latent-generative-memory": {"hidden": (32,), "finish": 5},  # its GAN has hallucinated for a few steps only
}
CONVOLVES = [name for name, options in SMALL.items() if "width" in options]
CASES = [(name, setting) for name, method in METHODS.items() for setting in method.settings]


def small(name: str, *hidden: int) -> dict[str, Any]:
    return SMALL.get(name, {"hidden": hidden})


def quick(name: str) -> dict[str, Any]:
    tasks = 2 if name in CONVOLVES else 5  # what convolves is slow
    return {"epochs": 2, "batch_size": 128, "tasks": tasks, "options": small(name, 32)}


@pytest.fixture(autouse=True)
def no_judge(monkeypatch: pytest.MonkeyPatch) -> None:
    """The evaluator's classifier, a second a run, is tested in test_generative.py."""
    monkeypatch.setattr(Run, "_acc_generated", lambda run: None)


def weights(run: Run) -> list[Tensor]:
    return [p.detach().clone() for p in run.learner.model.parameters()]


@pytest.mark.parametrize(("name", "setting"), CASES)
def test_runs_in_anybodys_loop(name: str, setting: str) -> None:
    stream = streams.make(streams.load("digits"), "split", setting)
    learner = METHODS[name].build(stream, **small(name, 32), seed=1)
    for task in stream.tasks[:2]:
        learner.begin_task(task)
        x, y = learner.training_data(task)
        losses = [learner.observe(a, b) for _ in range(20) for a, b in zip(x.split(64), y.split(64), strict=True)]
        quarter = len(losses) // 4
        assert sum(losses[-quarter:]) < sum(losses[:quarter])
        learner.end_task([task.train()])
    x, y = stream.tasks[1].test()
    # what a method makes of samples whose task it must guess is tested for HAT
    found = learner.predict(x, stream.tasks[1] if setting == "task" or name in ("hat", "den") else None)
    assert found.shape == y.shape
    assert (found == y).float().mean() > 0.65  # the task learned last
    assert set(learner.predict(x, 0).tolist()) <= set(stream.tasks[0].classes)
    seen = {c for task in stream.tasks[:2] for c in task.classes}
    assert set(learner.predict(x).tolist()) <= seen


@pytest.mark.parametrize(("name", "setting"), CASES)
def test_same_seed_same_result(name: str, setting: str) -> None:
    a, b, c = (Run(Config(name, setting=setting, seed=s, **quick(name))) for s in (3, 3, 4))
    results = [run.train() for run in (a, b, c)]
    assert results[0]["accuracy"] == results[1]["accuracy"]
    assert all(torch.equal(x, y) for x, y in zip(weights(a), weights(b), strict=True))
    assert not all(torch.equal(x, y) for x, y in zip(weights(a), weights(c), strict=True))


class Stop(Exception):
    pass


@pytest.mark.parametrize("when", [(0, 0, 1), (0, 1, 2), (2, 0, 0), (4, 1, 1)])
@pytest.mark.parametrize("name", METHODS)
def test_interrupted_and_resumed_equals_uninterrupted(name: str, when: tuple[int, int, int], tmp_path: Path) -> None:
    config = Config(name, setting="task" if "task" in METHODS[name].settings else "class", **quick(name))
    when = (min(when[0], config.tasks - 1), *when[1:])
    whole = Run(config)
    expected = whole.train()

    def stop(task: int, epoch: int, batch: int, batches: int, loss: float) -> None:
        if (task, epoch, batch) == when:
            raise Stop

    with pytest.raises(Stop):
        Run(config, tmp_path).train(stop)
    if when[:2] == (0, 0):  # nothing saved yet
        with pytest.raises(CheckpointError, match="is not a checkpoint"):
            Run(config, tmp_path, resume=True)
        return
    resumed = Run(config, tmp_path, resume=True)
    result = resumed.train()
    assert result["accuracy"] == expected["accuracy"]
    assert all(torch.equal(x, y) for x, y in zip(weights(whole), weights(resumed), strict=True))


def test_resume_refuses_another_run(tmp_path: Path) -> None:
    config = Config("ewc", **quick("ewc"))
    Run(config, tmp_path).train()
    with pytest.raises(ValueError, match=r"seed is 5 but the checkpoint in .* was made with 0"):
        Run(Config("ewc", seed=5, **quick("ewc")), tmp_path, resume=True)
    with pytest.raises(ValueError, match="resume needs checkpoint"):
        Run(config, resume=True)


@pytest.mark.parametrize("name", METHODS)
def test_bad_input(name: str) -> None:
    setting = METHODS[name].settings[0]
    stream = streams.make(streams.load("digits"), "split", setting)
    learner = METHODS[name].build(stream, **small(name, 16))
    x, y = stream.tasks[0].train()
    with pytest.raises(RuntimeError, match="begin_task must come first"):
        learner.observe(x, y)
    learner.begin_task(stream.tasks[0])
    before = [p.detach().clone() for p in learner.model.parameters()]
    with pytest.raises(ValueError, match=r"unknown label 7 but must be one of \[0, 1\]"):
        learner.observe(x, torch.full_like(y, 7))
    with pytest.raises(ValueError, match="y is empty"):
        learner.observe(x[:0], y[:0])
    with pytest.raises(ValueError, match="task is 3 but only 1 tasks have begun"):
        learner.predict(x, 3)
    assert all(torch.equal(a, b) for a, b in zip(before, learner.model.parameters(), strict=True))
    with pytest.raises(ValueError, match="state is of the method 'other'"):
        learner.load_state_dict({**learner.state_dict(), "method": "other"})
    with pytest.raises(ValueError, match="setting is 'both'"):
        _again(learner, setting="both")
    with pytest.raises(ValueError, match="lr is 0 but must be positive"):
        _again(learner, setting=learner.setting, lr=0)


def _again(learner: Method, **options: Any) -> Method:
    own = [learner.generator] if "generator" in inspect.signature(type(learner)).parameters else []
    return type(learner)(learner.model, *own, **options)


def test_ewc_needs_data_to_end_a_task() -> None:
    stream = streams.make(streams.load("digits"), "split", "task")
    learner = METHODS["ewc"].build(stream, hidden=(16,))
    learner.begin_task(stream.tasks[0])
    with pytest.raises(ValueError, match="batches is empty"):
        learner.end_task([])


def test_descriptions() -> None:
    for name, method in METHODS.items():
        assert method.name == name
        assert issubclass(method, Method)
        assert method.paper
        assert method.seed
        assert method.__doc__


@pytest.mark.mnist
def test_ewc_remembers_split_mnist(mnist: Path) -> None:
    """EWC keeps what fine-tuning forgets (Hsu et al. 2018: 97.7 against 93.5)."""
    accuracy = {}
    for name, options in (("finetune", {}), ("ewc", {"strength": 1e4})):
        config = Config(name, "mnist", str(mnist), setting="task", epochs=2, options={"hidden": (200, 200), **options})
        accuracy[name] = Run(config).train()["average_accuracy"]
    assert accuracy["ewc"] > 0.97
    assert accuracy["ewc"] > accuracy["finetune"] + 0.02
