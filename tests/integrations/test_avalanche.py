"""The plugins in avalanche-lib itself; skipped where it is not installed (`make integrations` installs it apart)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

pytestmark = pytest.mark.filterwarnings("ignore")
avalanche = pytest.importorskip("avalanche", reason="avalanche-lib is not installed: make integrations")

from avalanche.benchmarks import tensors_benchmark  # noqa: E402
from avalanche.models import MultiHeadClassifier, MultiTaskModule  # noqa: E402
from avalanche.models.dynamic_modules import IncrementalClassifier  # noqa: E402
from avalanche.training.plugins import LwFPlugin as TheirLwF  # noqa: E402
from avalanche.training.supervised import Naive  # noqa: E402

import fastcl  # noqa: E402
from fastcl import streams  # noqa: E402
from fastcl.integrations.avalanche import (  # noqa: E402
    EWCPlugin,
    LwFPlugin,
    MASPlugin,
    RWalkPlugin,
    SynapticIntelligencePlugin,
)


def benchmark(tasks: int = 2, labelled: bool = False, each: int = 64) -> Any:
    """Digits, two a task."""
    stream = streams.make(streams.load("digits"), "split", "class", 5)
    train = [tuple(t[:each] for t in task.train()) for task in stream.tasks[:tasks]]
    test = [task.test() for task in stream.tasks[:tasks]]
    labels = list(range(tasks)) if labelled else [0] * tasks
    return tensors_benchmark(train_tensors=train, test_tensors=test, task_labels=labels)


class Heads(MultiTaskModule):
    """A head for each task, which grows when its task comes."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU())
        self.head = MultiHeadClassifier(16, 2)

    def forward(self, x: torch.Tensor, task_labels: Any) -> torch.Tensor:
        return self.head(self.body(x), task_labels)


def model(kind: str) -> nn.Module:
    torch.manual_seed(0)
    if kind == "heads":
        return Heads()
    head = IncrementalClassifier(16, 2) if kind == "growing" else nn.Linear(16, 10)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), head)


def trained(kind: str, plugin: Any, tasks: int = 2) -> tuple[nn.Module, list[float]]:
    """The model after the tasks, and its losses, batch by batch."""
    net = model(kind)
    losses: list[float] = []

    class Record(fastcl.integrations.avalanche.SupervisedPlugin):
        def after_training_iteration(self, strategy: Any, **kwargs: Any) -> None:
            losses.append(float(strategy.loss))

    strategy = Naive(
        net,
        torch.optim.SGD(net.parameters(), 0.1),
        train_mb_size=16,
        train_epochs=2,
        plugins=[p for p in (plugin, Record()) if p is not None],
        evaluator=avalanche.training.plugins.EvaluationPlugin(),
    )
    torch.manual_seed(1)
    for experience in benchmark(tasks, kind == "heads").train_stream:
        strategy.train(experience, shuffle=False)
    return net, losses


PLUGINS = {
    "ewc": lambda s: EWCPlugin(s),
    "online ewc": lambda s: EWCPlugin(s, "online", 0.9),
    "mas": lambda s: MASPlugin(s),
    "si": lambda s: SynapticIntelligencePlugin(s, 0.1),
    "rwalk": lambda s: RWalkPlugin(s),
}


@pytest.mark.parametrize("kind", ["plain", "growing", "heads"])
@pytest.mark.parametrize("name", PLUGINS)
def test_plugins_hold_weights_in_avalanche_s_own_loop(name: str, kind: str) -> None:
    """Strength 0 is Naive to the bit; a strong penalty keeps what the first task needs near where it left it."""
    naive, _ = trained(kind, None)
    free, _ = trained(kind, PLUGINS[name](0.0))
    assert all(torch.equal(a, b) for a, b in zip(naive.parameters(), free.parameters(), strict=True))
    first = PLUGINS[name](1.0)
    trained(kind, first, tasks=1)
    top = max(float(omega.max()) for omega in first.regulariser.importances.values())
    strong, losses = trained(kind, PLUGINS[name](0.5 / (0.1 * 2 * top)))  # half of where descent turns unstable
    assert all(loss == loss for loss in losses)

    def away(net: nn.Module) -> float:
        total = 0.0
        for n, p in net.named_parameters():
            if n in first.regulariser.importances:
                omega, anchor = first.regulariser.importances[n], first.regulariser.anchors[n]
                rows = tuple(slice(size) for size in omega.shape)
                total += float((omega * (p.detach()[rows] - anchor).square()).sum())
        return total

    assert away(strong) < 0.9 * away(naive)


def test_ewc_is_fastcl_s_in_a_plain_loop() -> None:
    """Two tasks by hand, with twice the strength: Avalanche's penalty has no 1/2."""
    net, losses = trained("plain", EWCPlugin(3.0))
    mine = model("plain")
    optimizer = torch.optim.SGD(mine.parameters(), 0.1)
    ewc = fastcl.EWC(mine, 6.0, "separate")
    stream = streams.make(streams.load("digits"), "split", "class", 5)
    expected = []
    for task in stream.tasks[:2]:
        x, y = (t[:64] for t in task.train())
        for _ in range(2):
            for a, b in zip(x.split(16), y.split(16), strict=True):
                optimizer.zero_grad()
                loss = nn.functional.cross_entropy(mine(a), b)
                loss.backward()
                expected.append(float(loss.detach() + ewc.add_gradients()))
                optimizer.step()
        ewc.consolidate(zip(x.split(16), y.split(16), strict=True))
    assert losses == pytest.approx(expected, rel=1e-4)
    for a, b in zip(net.parameters(), mine.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["plain", "heads"])
def test_lwf_is_avalanche_s(kind: str) -> None:
    theirs, their_losses = trained(kind, TheirLwF(2.0, 2.0), tasks=3)
    mine, my_losses = trained(kind, LwFPlugin(2.0, 2.0), tasks=3)
    assert my_losses == pytest.approx(their_losses, rel=1e-3, abs=1e-5)
    for a, b in zip(mine.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_si_leaves_excluded_parameters_alone() -> None:
    plugin = SynapticIntelligencePlugin([0.0, 50.0], 0.1, excluded_parameters=["1.weight"])
    trained("plain", plugin)
    assert "1.weight" not in plugin.regulariser.importances
    assert "1.bias" in plugin.regulariser.importances
    assert plugin.regulariser.strength == 100.0


def test_bad_arguments_raise_when_the_plugin_is_made() -> None:
    for make, message in (
        (lambda: EWCPlugin(-1.0), "strength is -1"),
        (lambda: EWCPlugin(1.0, "both"), "mode is 'both'"),
        (lambda: EWCPlugin(1.0, "online"), "decay_factor is None"),
        (lambda: EWCPlugin(1.0, "separate", 0.5), "decay_factor is 0.5"),
        (lambda: MASPlugin(1.0, 2.0), "alpha is 2"),
        (lambda: SynapticIntelligencePlugin(1.0, 0.0), "xi is 0"),
        (lambda: RWalkPlugin(1.0, 0.9, 0), "delta_t is 0"),
        (lambda: LwFPlugin(1.0, 0.0), "temperature is 0"),
    ):
        with pytest.raises(ValueError, match=message):
            make()


def test_a_criterion_must_be_asked_sample_by_sample() -> None:
    from fastcl.integrations.avalanche import _per_sample

    assert _per_sample(nn.CrossEntropyLoss()) is None
    smooth = _per_sample(nn.CrossEntropyLoss(label_smoothing=0.1))
    assert smooth(torch.zeros(3, 2), torch.zeros(3, dtype=torch.int64)).shape == (3,)
    with pytest.raises(ValueError, match="must have torch's `reduction`"):
        _per_sample(lambda a, b: a)
