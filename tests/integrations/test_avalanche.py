"""The plugins in avalanche-lib itself; skipped where it is not installed (`make integrations` installs it apart)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

pytestmark = pytest.mark.filterwarnings("ignore")
avalanche = pytest.importorskip("avalanche", reason="avalanche-lib is not installed: make integrations")

from avalanche.benchmarks import tensors_benchmark  # noqa: E402
from avalanche.models import MlpVAE, MultiHeadClassifier, MultiTaskModule, VAE_loss  # noqa: E402
from avalanche.models.dynamic_modules import IncrementalClassifier  # noqa: E402
from avalanche.training.plugins import LwFPlugin as TheirLwF  # noqa: E402
from avalanche.training.plugins import generative_replay as theirs  # noqa: E402
from avalanche.training.supervised import Naive, VAETraining  # noqa: E402

import fastcl  # noqa: E402
from fastcl import streams  # noqa: E402
from fastcl.integrations.avalanche import (  # noqa: E402
    EWCPlugin,
    GenerativeReplayPlugin,
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
        (lambda: GenerativeReplayPlugin(replay_size=0), "replay_size is 0"),
        (lambda: GenerativeReplayPlugin(weight_replay_loss=-1.0), "weight_replay_loss is -1"),
        (lambda: GenerativeReplayPlugin(value_range=(1.0, 0.0)), r"value_range is \(1.0, 0.0\)"),
        (lambda: GenerativeReplayPlugin(object(), replay=generator()), "both given"),
        (lambda: GenerativeReplayPlugin(None, False, replay=generator()), "has not learned anything"),
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


def generator() -> fastcl.nn.Replay:
    return fastcl.nn.Replay(fastcl.nn.VAE((1, 8, 8), (64, 64), 8, 0.1))


def quiet() -> Any:
    return avalanche.training.plugins.EvaluationPlugin()


def vae_strategy(plugin: Any) -> VAETraining:
    """Avalanche's own generator, training with replay of itself."""
    vae = MlpVAE((1, 8, 8), nhid=4)
    return VAETraining(
        model=vae,
        optimizer=torch.optim.Adam(vae.parameters(), 1e-3),
        criterion=VAE_loss,
        train_mb_size=16,
        train_epochs=1,
        plugins=[plugin],
        evaluator=quiet(),
    )


@pytest.mark.parametrize(
    "options", [{}, {"replay_size": 5}, {"increasing_replay_size": True}], ids=["plain", "size", "increasing"]
)
def test_replay_from_a_generator_strategy_is_avalanche_s_to_the_bit(options: dict[str, Any]) -> None:
    """The solver and its generator, whose model is its own generator, over three tasks."""
    found = []
    for module in (theirs, fastcl.integrations.avalanche):
        torch.manual_seed(2)
        scholar = vae_strategy(module.GenerativeReplayPlugin(**options))
        net = model("plain")
        strategy = Naive(
            net,
            torch.optim.SGD(net.parameters(), 0.1),
            train_mb_size=16,
            plugins=[module.TrainGeneratorAfterExpPlugin(), module.GenerativeReplayPlugin(scholar, **options)],
            evaluator=quiet(),
        )
        torch.manual_seed(1)
        for experience in benchmark(3).train_stream:
            strategy.train(experience, shuffle=False)
        found.append([*net.parameters(), *scholar.model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_weighted_replay_is_the_loss_of_what_is_replayed() -> None:
    plugin = GenerativeReplayPlugin(
        is_weighted_replay=True,
        replay_size=7,
        weight_replay_loss=0.5,
        weight_replay_loss_factor=1.01,
        replay=generator(),
    )
    checked: list[float] = []

    class Check(fastcl.integrations.avalanche.SupervisedPlugin):
        def before_update(self, strategy: Any, **kwargs: Any) -> None:
            if plugin.untrained_solver:
                return
            x, y = plugin._old
            assert len(x) == 7
            assert torch.equal(y, plugin.old_model(x).argmax(1))
            with torch.no_grad():
                new = nn.functional.cross_entropy(strategy.model(strategy.mb_x), strategy.mb_y)
                old = nn.functional.cross_entropy(strategy.model(x), y)
            weight = 0.5 * 1.01 ** len(checked)
            assert float(strategy.loss) == pytest.approx(float(new + weight * old), rel=1e-5)
            checked.append(weight)

    net = model("plain")
    strategy = Naive(
        net,
        torch.optim.SGD(net.parameters(), 0.1),
        train_mb_size=16,
        plugins=[plugin, Check()],
        evaluator=quiet(),
    )
    for experience in benchmark(3).train_stream:
        strategy.train(experience)
    assert len(checked) == 2 * 64 // 16
    assert plugin.weight_replay_loss == pytest.approx(0.5 * 1.01 ** len(checked))


def forgetful(plugin: Any, scale: float = 1.0) -> float:
    """The accuracy on the first task after the second one."""
    net = model("plain")
    strategy = Naive(
        net,
        torch.optim.SGD(net.parameters(), 0.1),
        train_mb_size=16,
        train_epochs=20,
        plugins=[p for p in (plugin,) if p is not None],
        evaluator=quiet(),
    )
    stream = streams.make(streams.load("digits"), "split", "class", 5)
    train = [tuple(t[:256] for t in task.train()) for task in stream.tasks[:2]]
    train = [(scale * x, y) for x, y in train]
    torch.manual_seed(0)
    for experience in tensors_benchmark(train_tensors=train, test_tensors=train, task_labels=[0, 0]).train_stream:
        strategy.train(experience)
    x, y = stream.tasks[0].test()
    return float((net(scale * x).argmax(1) == y).float().mean())


def test_our_own_generator_remembers() -> None:
    assert forgetful(None) < 0.2
    plugin = GenerativeReplayPlugin(replay=generator())
    assert forgetful(plugin) > 0.8
    assert plugin.replay.learned == 2 * 20 * 16
    assert forgetful(GenerativeReplayPlugin(replay=generator(), value_range=(0.0, 2.0)), 2.0) > 0.8


def test_the_default_generator_has_the_data_s_shape() -> None:
    plugin = GenerativeReplayPlugin()
    trained("plain", plugin)
    assert plugin.replay.generator.input_shape == (1, 8, 8)
    assert plugin.replay.learned == 2 * 2 * 64 // 16


def test_replay_raises_before_it_trains() -> None:
    with pytest.raises(ValueError, match=r"values from 0 to 1 but must have them in value_range, 0 to 0.5"):
        trained("plain", GenerativeReplayPlugin(value_range=(0.0, 0.5)))
    with pytest.raises(ValueError, match="model has a head for each task"):
        trained("heads", GenerativeReplayPlugin())
    with pytest.raises(ValueError, match="no generator that has learned"):
        trained("plain", GenerativeReplayPlugin(untrained_solver=False))
    net = model("plain")
    mixed = [theirs.TrainGeneratorAfterExpPlugin(), GenerativeReplayPlugin(vae_strategy(GenerativeReplayPlugin()))]
    strategy = Naive(net, torch.optim.SGD(net.parameters(), 0.1), plugins=mixed, evaluator=quiet())
    with pytest.raises(ValueError, match="trains generators of Avalanche's plugin only"):
        strategy.train(benchmark(1).train_stream[0])
