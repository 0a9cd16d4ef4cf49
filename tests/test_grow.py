"""Growing and shrinking: the function stays, and everything that belongs to a parameter follows it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fastcl
from fastcl.nn import MaskedConv2d, MaskedLinear, end_task, grow, masked_layers, mlp, reindex, shrink, trace, use_task


class Net(nn.Module):
    """Functions, methods, BatchNorm, a transposed convolution and a flatten between the layers."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(1, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.up = nn.ConvTranspose2d(4, 5, 2, stride=2)
        self.b = nn.Conv2d(5, 6, 3, stride=2, bias=False)
        self.out = nn.Linear(6 * 9, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = F.leaky_relu(self.norm(self.a(x)))
        h = F.max_pool2d(self.up(h).relu(), 2)
        return self.out(torch.flatten(self.b(F.interpolate(h, size=(7, 7))), 1))


def trained(model: nn.Module, x: Tensor, optimizer: torch.optim.Optimizer) -> None:
    for _ in range(3):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


def test_trace_follows_the_units() -> None:
    assert trace(Net()) == {"a": ("norm", "up"), "up": ("b",), "b": ("out",), "out": ()}
    assert trace(mlp((4,), (8, 8), 2)) == {"1": ("3",), "3": ("5",), "5": ()}


def test_layers_whose_units_meet_others_are_left_out() -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            h = self.a(x)
            return self.c(F.layer_norm(h + self.b(h), (4,)))

    assert set(trace(Residual())) == {"c"}
    with pytest.raises(ValueError, match="plan has no layer a"):
        grow(Residual(), {"a": 1})


def test_what_cannot_be_traced_asks_for_a_plan() -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x) if x.sum() > 0 else x)

    model, x = Branching(), torch.ones(2, 4)
    with pytest.raises(ValueError, match="by hand"):
        grow(model, {"a": 1})
    want = model(x).detach()
    grow(model, {"a": 1}, plan={"a": ("b",)})
    torch.testing.assert_close(model(x), want)


@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_the_function_stays_and_everything_follows(format: torch.memory_format) -> None:
    model, x = Net().to(memory_format=format), torch.randn(8, 1, 7, 7)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    ewc = fastcl.EWC(model, 10.0)
    trained(model, x, optimizer)
    ewc.consolidate([(x, torch.zeros(8, dtype=torch.int64))])
    trained(model, x, optimizer)
    model.eval()
    want, penalty = model(x).detach(), ewc.penalty().detach()
    moments = {n: optimizer.state[p]["exp_avg"].clone() for n, p in model.named_parameters()}
    identities = [*map(id, model.parameters())]
    grow(model, {"a": 3, "up": 2, "b": 4}, optimizer=optimizer, regularisers=[ewc])
    assert identities == [*map(id, model.parameters())]
    torch.testing.assert_close(model(x), want)
    torch.testing.assert_close(ewc.penalty(), penalty)
    assert (model.a.out_channels, model.norm.num_features, model.up.in_channels, model.up.out_channels) == (7, 7, 7, 7)
    assert model.out.weight.shape == (3, 10 * 9)
    assert model.b.weight.is_contiguous(memory_format=format)
    for name, p in model.named_parameters():
        m = optimizer.state[p]["exp_avg"]
        assert m.shape == p.shape
        corner = tuple(slice(size) for size in moments[name].shape)
        assert torch.equal(m[corner], moments[name])
        assert m.count_nonzero() == moments[name].count_nonzero()
    model.train()
    trained(model, x, optimizer)  # goes on
    assert model.out.weight[:, 6 * 9 :].abs().sum() > 0  # new units learn


def test_shrink_is_the_inverse() -> None:
    model, x = Net().eval(), torch.randn(8, 1, 7, 7)
    optimizer = torch.optim.SGD(model.parameters(), 1e-2, momentum=0.9)
    trained(model, x, optimizer)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    moments = [optimizer.state[p]["momentum_buffer"].clone() for p in model.parameters()]
    grow(model, {"a": 3, "b": 2}, optimizer=optimizer)
    shrink(model, {"a": [4, 5, 6], "b": torch.tensor([7, 6])}, optimizer=optimizer)
    for name, t in model.state_dict().items():
        assert torch.equal(t, before[name]), name
    for p, m in zip(model.parameters(), moments, strict=True):
        assert torch.equal(optimizer.state[p]["momentum_buffer"], m)


def test_removing_units_without_outgoing_weights_changes_nothing() -> None:
    model, x = mlp((4,), (6, 5), 2), torch.randn(9, 4)
    with torch.no_grad():
        model[3].weight[:, [1, 4]] = 0
    want = model(x).detach()
    shrink(model, {"1": [1, 4]})
    torch.testing.assert_close(model(x), want)


def test_a_repeated_unit_is_a_copy() -> None:
    model, x = mlp((4,), (6,), 2), torch.randn(9, 4)
    want = model(x).detach()
    reindex(model, {"1": torch.tensor([0, 1, 2, 3, 4, 5, 2])})
    assert torch.equal(model[1].weight[6], model[1].weight[2])
    assert torch.equal(model[3].weight[:, 6], model[3].weight[:, 2])
    with torch.no_grad():
        model[3].weight[:, 6] = 0
    torch.testing.assert_close(model(x), want)


@pytest.mark.parametrize("form", ["bool", "packed", "soft", "vectors"])
def test_reserved_weights_stay_reserved(form: str) -> None:
    model, x = mlp((4,), (6,), 2), torch.randn(9, 4)
    w = model[1].weight
    used = torch.rand(6, 4) > 0.5
    given: Any = {
        "bool": used,
        "packed": fastcl.ops.pack_mask(used),
        "soft": used.float(),
        "vectors": (used[:, 0].float(), torch.ones(4)),
    }[form]
    if form == "vectors":
        used = used[:, :1].expand(6, 4)
    optimizer = fastcl.optim.MaskedAdam(model.parameters(), 1e-2, weight_decay=0.1, reserved={w: given})
    trained(model, x, optimizer)
    before = w.detach().clone()
    grow(model, {"1": 5}, optimizer=optimizer, outgoing="init")
    trained(model, x, optimizer)
    moved = w.detach()[:6] != before
    assert torch.equal(moved, ~used)
    assert (optimizer.state[w]["exp_avg"][6:] != 0).any()


@pytest.mark.parametrize("mask", ["unit", "weight"])
def test_masks_of_old_tasks_do_not_see_new_units(mask: str) -> None:
    model = nn.Sequential(
        MaskedConv2d(1, 4, 3, mask=mask), nn.ReLU(), nn.Flatten(), MaskedLinear(4 * 25, 6, mask=mask), nn.Linear(6, 2)
    )
    for _, layer in masked_layers(model):
        nn.init.normal_(layer.embedding)
    end_task(model)
    x = torch.randn(3, 1, 7, 7)
    with use_task(model, 0):
        want = model(x).detach()
    grow(model, {"0": 3, "3": 2}, outgoing="init")
    with use_task(model, 0):
        got = model(x)
    if mask == "unit":
        torch.testing.assert_close(got[:, :], want)
    else:  # a new unit has no weight of an old task, but its bias passes through the last, unmasked layer
        with torch.no_grad():
            model[4].weight[:, 6:] = 0
        with use_task(model, 0):
            torch.testing.assert_close(model(x), want)
    del want, got
    model(x).sum().backward()
    assert all(p.grad.shape == p.shape for p in model.parameters() if p.grad is not None)


def test_a_single_layer() -> None:
    layer, x = nn.Linear(3, 2), torch.randn(5, 3)
    want = layer(x)
    grow(layer, 2, inputs=1)
    torch.testing.assert_close(layer(F.pad(x, (0, 1), value=7.0))[:, :2], want)


def test_si_goes_on_over_grown_parameters() -> None:
    model, x = mlp((4,), (6,), 2), torch.randn(9, 4)
    optimizer = torch.optim.SGD(model.parameters(), 1e-2)
    si = fastcl.SI(model, 1.0, optimizer)
    trained(model, x, optimizer)
    si.consolidate()
    grow(model, {"1": 2}, optimizer=optimizer, regularisers=[si])
    trained(model, x, optimizer)
    shrink(model, {"1": [0]}, optimizer=optimizer, regularisers=[si])
    trained(model, x, optimizer)
    si.consolidate()
    assert {n: f.shape for n, f in si.importances.items()} == {n: p.shape for n, p in model.named_parameters()}


def test_bad_input_changes_nothing() -> None:
    model = nn.Sequential(nn.Conv2d(2, 4, 1, groups=2), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.Flatten(), nn.Linear(4, 2))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    for call, match in (
        (lambda: grow(model, {"0": 1}), "2 groups"),
        (lambda: grow(model, {"2": 0}), "positive"),
        (lambda: grow(model, {"7": 1}), "does not have"),
        (lambda: grow(model, {"1": 1}), "ReLU"),
        (lambda: grow(model, 1), "must name the layers"),
        (lambda: grow(model, {"2": 1}, plan={"2": ("1",)}), "cannot grow"),
        (lambda: grow(model, {"2": 1}, outgoing="random"), "outgoing"),
        (lambda: shrink(model, {"2": [4]}), "outside"),
        (lambda: shrink(model, {"2": [0, 1, 2, 3]}), "one must stay"),
        (lambda: reindex(model, {"2": torch.tensor([0, -2])}), "places"),
    ):
        with pytest.raises(ValueError, match=match):
            call()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
