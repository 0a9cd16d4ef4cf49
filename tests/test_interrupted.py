"""What an error, a Ctrl-C or a skipped step leaves behind: nothing."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastcl
from fastcl.optim import MaskedAdam, MaskedSGD, protect


class Network(nn.Module):
    """BatchNorm, dropout, and a parameter of no layer, which goes through torch.func."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 3, 2), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Dropout(0.5))
        self.scale, self.head = nn.Parameter(torch.rand(27)), nn.Linear(27, 4)
        self.stop: BaseException | None = None
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        h = self.body(x) * self.scale
        self.calls += 1
        if self.stop is not None and self.calls >= 2:
            raise self.stop
        return self.head(h)


def everything(model: nn.Module) -> list[Any]:
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks)) for m in model.modules()]
    modes = [m.training for m in model.modules()]
    leaves = [(p.requires_grad, id(p), p.grad_fn, len(p._backward_hooks or ())) for p in model.parameters()]
    bits = [t.numpy().tobytes() for t in model.state_dict().values()]
    grads = [p.grad.numpy().tobytes() for p in model.parameters()]
    return [hooks, modes, leaves, bits, grads, torch.get_rng_state().tolist(), torch.is_grad_enabled()]


PASSES: dict[str, Callable[[nn.Module, Any], Any]] = {
    "empirical": lambda model, batches: fastcl.fisher_diagonal(model, batches),
    "exact": lambda model, batches: fastcl.fisher_diagonal(model, batches, "exact"),
    "batched": lambda model, batches: fastcl.fisher_diagonal(model, batches, "batched"),
    "loss": lambda model, batches: fastcl.fisher_diagonal(
        model, batches, loss=lambda out, y: nn.functional.cross_entropy(out, y, reduction="none")
    ),
    "mas": lambda model, batches: fastcl.mas_importance(model, batches),
    "mas, vector": lambda model, batches: fastcl.mas_importance(model, batches, "vector"),
}


@pytest.mark.filterwarnings("ignore::fastcl.FallbackWarning")
@pytest.mark.parametrize("where", ["in the data", "in the model", "nowhere"])
@pytest.mark.parametrize("error", [RuntimeError("broken"), KeyboardInterrupt()], ids=["error", "Ctrl-C"])
@pytest.mark.parametrize("kind", PASSES)
def test_an_importance_pass_leaves_no_trace(kind: str, error: BaseException, where: str) -> None:
    model = Network()
    model.body[1].eval()  # another mode than its neighbours'
    x, y = torch.rand(6, 1, 4, 4), torch.arange(6) % 4
    for p in model.parameters():
        p.grad = torch.full_like(p, 0.5)
    before = everything(model)

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        yield x, y
        if where == "in the data":
            raise error
        yield x, y

    if where == "nowhere":
        PASSES[kind](model, batches())
    else:
        if where == "in the model":
            model.stop = error
        with pytest.raises(type(error)):
            PASSES[kind](model, batches())
    assert everything(model) == before
    model.stop = None
    assert len(PASSES[kind](model, [(x, y)])) == len([*model.parameters()])  # and it works again


@pytest.mark.parametrize("make", [lambda m: fastcl.EWC(m, 1.0, "separate"), lambda m: fastcl.MAS(m, 1.0)])
def test_an_interrupted_consolidation_changes_nothing(make: Callable[[nn.Module], Any]) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    x, y = torch.rand(5, 4), torch.arange(5) % 3
    regulariser = make(model)
    regulariser.consolidate([(x, y)])
    before = {k: v.clone() for k, v in regulariser.importances.items()}

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        yield x + 1, y
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        regulariser.consolidate(batches())
    assert regulariser.tasks == 1
    assert all(torch.equal(before[k], v) for k, v in regulariser.importances.items())


RESERVED = torch.tensor([True, False, False, True])
OPTIMIZERS: dict[str, Callable[[nn.Parameter], torch.optim.Optimizer]] = {
    "MaskedAdam": lambda p: MaskedAdam([p], 0.1, weight_decay=0.1, amsgrad=True, reserved={p: RESERVED}),
    "MaskedSGD": lambda p: MaskedSGD([p], 0.1, momentum=0.9, weight_decay=0.1, reserved={p: RESERVED}),
    "protected": lambda p: torch.optim.AdamW([p], 0.1),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_that_grad_scaler_skips_leaves_masks_and_state(name: str) -> None:
    p = nn.Parameter(torch.arange(4.0))
    optimizer = OPTIMIZERS[name](p)
    guard = protect(optimizer, {p: RESERVED}) if name == "protected" else optimizer
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)

    def step(factor: float) -> None:
        optimizer.zero_grad()
        scaler.scale((p * torch.tensor([1.0, factor, 2.0, 3.0])).sum()).backward()
        scaler.step(optimizer)
        scaler.update()

    def snapshot() -> list[Any]:
        masks = guard._masks if name == "protected" else guard.reserved
        state = [t.clone() if isinstance(t, Tensor) else t for t in optimizer.state[p].values()]
        return [p.detach().clone(), *state, len(masks)]

    step(1.0)
    for bad in (math.inf, math.nan):
        before, scale = snapshot(), scaler.get_scale()
        step(bad)
        assert scaler.get_scale() < scale  # it was skipped
        for a, b in zip(before, snapshot(), strict=True):
            assert torch.equal(a, b) if isinstance(a, Tensor) else a == b
    step(1.0)
    assert p[RESERVED].tolist() == [0.0, 3.0]
    assert (p[~RESERVED] != torch.tensor([1.0, 2.0])).all()


@pytest.mark.parametrize("name", ["SI", "RWalk"])
def test_path_regularisers_forget_a_skipped_step(name: str) -> None:
    """The infinite gradient of a step that GradScaler skips must not reach their sums."""
    found = []
    for skips in (False, True):
        torch.manual_seed(0)
        model = nn.Linear(3, 2)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        regulariser = getattr(fastcl, name)(model, 1.0, optimizer)
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        for i in range(4):
            for factor in (math.inf, 1.0) if skips and i == 1 else (1.0,):
                optimizer.zero_grad()
                scaler.scale((model(torch.ones(2, 3) * (i + 1)) * factor).sum()).backward()
                scaler.unscale_(optimizer)
                regulariser.add_gradients()
                scaler.step(optimizer)
                scaler.update()
        regulariser.consolidate()
        found.append(regulariser.importances)
    for key, value in found[0].items():
        assert value.isfinite().all()
        torch.testing.assert_close(found[1][key], value)
