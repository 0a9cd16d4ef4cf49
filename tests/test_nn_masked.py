"""Masked layers: forward and gradients, tasks, conversion, state, reserved masks, capacity."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastcl
from fastcl.nn import (
    MaskedConv1d,
    MaskedConv2d,
    MaskedConv3d,
    MaskedConvTranspose2d,
    MaskedLinear,
    begin_task,
    capacity,
    end_task,
    masked_layers,
    plot_capacity,
    reserved_masks,
    set_scale,
    sparsity,
    to_masked,
    to_plain,
    use_task,
)

LAYERS: dict[str, tuple[Any, Any, tuple[Any, ...], tuple[int, ...]]] = {
    "linear": (MaskedLinear, nn.Linear, (6, 5), (4, 6)),
    "conv1d": (MaskedConv1d, nn.Conv1d, (3, 5, 3), (4, 3, 9)),
    "conv2d": (MaskedConv2d, nn.Conv2d, (3, 5, 3, 2, 1), (4, 3, 7, 8)),
    "conv3d": (MaskedConv3d, nn.Conv3d, (2, 5, 2), (3, 2, 4, 4, 4)),
    "transposed": (MaskedConvTranspose2d, nn.ConvTranspose2d, (3, 5, 4, 2, 1), (4, 3, 5, 5)),
}


def plain_twin(name: str, layer: Any, weight: Tensor) -> Any:
    _, plain, arguments, _ = LAYERS[name]
    twin = plain(*arguments)
    return lambda x: torch.func.functional_call(twin, {"weight": weight, "bias": layer.bias}, (x,))


@pytest.mark.parametrize("name", LAYERS)
def test_weight_masks(name: str) -> None:
    masked, _, arguments, shape = LAYERS[name]
    layer = masked(*arguments, mask="weight", compensate=False)
    assert (layer.embedding == 0).all()
    with torch.no_grad():
        layer.embedding.normal_()
    layer.scale = 3.0
    x = torch.randn(shape)
    y = layer(x)
    want = plain_twin(name, layer, layer.weight * torch.sigmoid(3.0 * layer.embedding))(x)
    torch.testing.assert_close(y, want)
    grads = torch.autograd.grad(y.square().sum(), (layer.weight, layer.embedding))
    for got, exact in zip(
        grads, torch.autograd.grad(want.square().sum(), (layer.weight, layer.embedding)), strict=True
    ):
        torch.testing.assert_close(got, exact, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(sparsity(layer), torch.sigmoid(3.0 * layer.embedding).mean())
    layer.end_task()
    assert layer.masks.dtype == torch.uint8
    assert layer.masks.shape == (1, (layer.weight.numel() + 7) // 8)
    assert torch.equal(layer.unpacked(0), layer.embedding >= 0)
    with use_task(layer, 0):
        torch.testing.assert_close(layer(x), plain_twin(name, layer, layer.weight * (layer.embedding >= 0))(x))


@pytest.mark.parametrize("name", LAYERS)
def test_unit_masks(name: str) -> None:
    masked, _, arguments, shape = LAYERS[name]
    layer = masked(*arguments, mask="unit", activation=torch.tanh, compensate=False)
    assert layer.embedding.shape == (5,)
    layer.scale = 3.0
    x = torch.randn(shape)
    y = layer(x)
    gate = torch.sigmoid(3.0 * layer.embedding).reshape(1, 5, *[1] * (y.dim() - 2))
    want = torch.tanh(plain_twin(name, layer, layer.weight)(x)) * gate
    torch.testing.assert_close(y, want)
    (got,) = torch.autograd.grad(y.square().sum(), layer.embedding)
    (exact,) = torch.autograd.grad(want.square().sum(), layer.embedding)
    torch.testing.assert_close(got, exact, rtol=1e-4, atol=1e-5)
    layer.end_task()
    with use_task(layer, 0):
        off = layer.unpacked(0) == 0
        assert (layer(x)[:, off] == 0).all()
        assert torch.equal(off, layer.embedding.detach() < 0)


@pytest.mark.parametrize("mask", ["weight", "unit"])
@pytest.mark.parametrize("name", LAYERS)
def test_conversion(name: str, mask: str) -> None:
    _, plain, arguments, shape = LAYERS[name]
    layer = plain(*arguments)
    masked = to_masked(layer, mask=mask)
    assert masked.weight is layer.weight
    with torch.no_grad():
        masked.embedding.normal_()
    masked.end_task()
    begin_task(masked)
    x = torch.randn(shape)
    with use_task(masked, 0):
        want = masked(x)
    back = to_plain(masked, 0)
    assert type(back) is plain
    torch.testing.assert_close(back(x), want)
    assert back.weight is not layer.weight
    torch.testing.assert_close(to_plain(masked)(x), to_plain(masked, None)(x))


def test_conversion_of_models() -> None:
    body = nn.Sequential(nn.Flatten(), nn.Linear(64, 7))
    model = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1, bias=False), nn.ReLU(), body, nn.Linear(7, 2))
    to_masked(model, mask="weight", skip=["3"])
    assert [name for name, _ in masked_layers(model)] == ["0", "2.1"]
    assert type(model[3]) is nn.Linear
    x = torch.randn(5, 1, 4, 4)
    end_task(model)
    with use_task(model, 0):
        want = model(x)
    to_plain(model, 0)
    assert not list(masked_layers(model))
    torch.testing.assert_close(model(x), want)
    relu = to_masked(nn.Linear(3, 4), mask="unit", activation=torch.relu)
    torch.testing.assert_close(to_plain(relu)(x[:, 0, :, :3]), _at_the_end(relu, x[:, 0, :, :3]))
    with pytest.raises(ValueError, match="no scaling of the weights"):
        to_plain(to_masked(nn.Linear(3, 4), mask="unit", activation=torch.tanh))
    with pytest.raises(ValueError, match="skip has \\['head'\\]"):
        to_masked(model, skip=["head"])
    with pytest.raises(ValueError, match="ReLU has no layer"):
        to_masked(nn.ReLU())


def _at_the_end(layer: Any, x: Tensor) -> Tensor:
    layer.end_task()
    with use_task(layer, 0):
        return layer(x)


def test_tasks_are_picked_and_put_back() -> None:
    model = nn.Sequential(MaskedLinear(4, 4, mask="unit"), MaskedLinear(4, 3))
    x = torch.randn(5, 4)
    outputs = []
    for _ in range(3):
        begin_task(model)
        with torch.no_grad():
            for _, layer in masked_layers(model):
                layer.embedding.normal_()
        end_task(model)
        outputs.append(_at(model, x, len(outputs)))
    begin_task(model)
    for t in range(3):
        assert torch.equal(_at(model, x, t), outputs[t])
    assert not torch.equal(outputs[0], outputs[1])
    with use_task(model, 1):
        with use_task(model, 0):
            assert torch.equal(model(x), outputs[0])
        assert torch.equal(model(x), outputs[1])
        with pytest.raises(ValueError, match="task is 3 but 3 masks"), use_task(model, 3):
            pass
        assert torch.equal(model(x), outputs[1])
    assert all(layer.task is None for _, layer in masked_layers(model))
    with pytest.raises(KeyError), use_task(model, 0):
        raise KeyError
    assert all(layer.task is None for _, layer in masked_layers(model))


def _at(model: nn.Module, x: Tensor, task: int) -> Tensor:
    with use_task(model, task):
        return model(x).detach()


@pytest.mark.parametrize("mask", ["weight", "unit"])
def test_state_dict(mask: str) -> None:
    model = MaskedLinear(9, 5, mask=mask)
    for _ in range(3):
        with torch.no_grad():
            model.embedding.normal_()
        model.end_task()
    other = MaskedLinear(9, 5, mask=mask)
    other.load_state_dict(model.state_dict())
    assert other.tasks == 3
    for t in range(3):
        assert torch.equal(other.unpacked(t), model.unpacked(t))
    assert torch.equal(other.reserved(), model.reserved())
    with pytest.raises(RuntimeError, match="size mismatch"):
        MaskedLinear(9, 6, mask=mask).load_state_dict(model.state_dict())


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("kind", [MaskedConv2d, MaskedConvTranspose2d])
def test_old_tasks_do_not_change(kind: Any, memory_format: Any) -> None:
    """DGMw: weights of recorded tasks keep every bit, so the old outputs too, while the new task learns."""
    model = nn.Sequential(kind(3, 8, 3, mask="weight"), nn.ReLU(), kind(8, 4, 3, mask="weight"))
    model.to(memory_format=memory_format)
    optimizer = fastcl.optim.MaskedAdam(model.parameters(), 0.05, weight_decay=0.1)
    x = torch.randn(4, 3, 8, 8).contiguous(memory_format=memory_format)
    kept: list[Tensor] = []
    for task in range(3):
        begin_task(model)
        reserved = reserved_masks(model)
        optimizer.reserve(reserved)
        assert len(reserved) == (4 if task else 0)
        plain = nn.Conv2d if kind is MaskedConv2d else nn.ConvTranspose2d
        teacher = nn.Sequential(plain(3, 6, 3), nn.ReLU(), plain(6, 4, 3)).requires_grad_(False)
        target, losses = 5 * teacher(x), []
        for step in range(30):
            set_scale(model, 1.0 + step)
            optimizer.zero_grad()
            loss = (model(x) - target).square().mean() + 0.02 * sparsity(model)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < losses[0]
        end_task(model)
        kept.append(_at(model, x, task))
        for t, want in enumerate(kept):
            assert torch.equal(_at(model, x, t), want)
    report = capacity(model)
    assert 0 < report["used"][0] < report["reserved"] < 1
    assert [row[i] for i, row in enumerate(report["overlap"])] == [1.0, 1.0, 1.0]


def test_reserved_of_units_is_hats() -> None:
    model = nn.Sequential(
        MaskedConv2d(1, 3, 3, mask="unit"), MaskedConvTranspose2d(3, 2, 3, mask="unit"), nn.Flatten(),
        MaskedLinear(2 * 16, 5, mask="unit"),
    )  # fmt: skip
    assert reserved_masks(model) == {}
    for _ in range(2):
        begin_task(model)
        end_task(model)
    a, b, c = (layer.reserved() for _, layer in masked_layers(model))
    found = reserved_masks(model)
    assert found[model[0].weight][1] is None
    assert torch.equal(found[model[0].weight][0], a)
    assert torch.equal(found[model[1].weight][0], a)
    assert torch.equal(found[model[1].weight][1], b)
    assert torch.equal(found[model[1].bias], b)
    assert torch.equal(found[model[3].weight][0], c)
    assert torch.equal(found[model[3].weight][1], b.repeat_interleave(16))
    assert torch.equal(a, torch.maximum(model[0].unpacked(0), model[0].unpacked(1)))
    fastcl.optim.MaskedSGD(model.parameters(), 0.1, reserved=found)  # fits
    wrong = nn.Sequential(MaskedLinear(3, 4, mask="unit"), MaskedLinear(6, 4, mask="unit"))
    end_task(wrong)
    with pytest.raises(ValueError, match="do not follow"):
        reserved_masks(wrong)


def test_soft_unit_masks() -> None:
    layer = MaskedLinear(3, 50, mask="unit", binary=False, s_max=2.0)
    layer.end_task()
    torch.testing.assert_close(layer.unpacked(0), torch.sigmoid(2.0 * layer.embedding.detach()))


def test_half_precision_and_autocast() -> None:
    x = torch.randn(4, 9)
    for mask in ("weight", "unit"):
        layer = MaskedLinear(9, 5, mask=mask, dtype=torch.bfloat16)
        layer.scale = 2.0
        layer(x.bfloat16()).sum().backward()
        assert layer.embedding.grad.dtype == torch.bfloat16
        assert (layer.embedding.grad != 0).any()
        layer = MaskedLinear(9, 5, mask=mask)
        with torch.autocast("cpu", torch.bfloat16):
            y = layer(x)
        assert y.dtype == torch.bfloat16
        y.float().sum().backward()
        assert layer.embedding.grad.dtype == torch.float32


@pytest.mark.parametrize("mask", ["weight", "unit"])
def test_compiles_into_one_graph(mask: str) -> None:
    torch._dynamo.reset()
    layer = MaskedLinear(9, 5, mask=mask)
    layer.scale = 2.0
    x = torch.randn(4, 9)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    compiled(x).square().sum().backward()
    found = layer.weight.grad.clone(), layer.embedding.grad.clone()
    layer.zero_grad()
    layer(x).square().sum().backward()
    torch.testing.assert_close(found, (layer.weight.grad, layer.embedding.grad))


def test_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    model = nn.Sequential(MaskedLinear(4, 9), MaskedLinear(9, 5, mask="unit"))
    for name in ("none.png", "some.png"):
        plot_capacity(model, tmp_path / name)
        assert (tmp_path / name).read_bytes()[:4] == b"\x89PNG"
        end_task(model)


def test_refused() -> None:
    with pytest.raises(ValueError, match="mask is 'row' but must be weight or unit"):
        MaskedLinear(2, 2, mask="row")
    with pytest.raises(ValueError, match=r"s_max is 0\.1"):
        MaskedLinear(2, 2, s_max=0.1)
    with pytest.raises(ValueError, match="activation is for unit masks"):
        MaskedLinear(2, 2, activation=torch.relu)
    with pytest.raises(ValueError, match="scale is nan"):
        set_scale(MaskedLinear(2, 2), float("nan"))
    with pytest.raises(RuntimeError, match="run the model forward first"):
        sparsity(MaskedLinear(2, 2))
    grouped = MaskedConv1d(4, 4, 3, groups=2, mask="unit")
    grouped.end_task()
    with pytest.raises(ValueError, match="2 groups"):
        reserved_masks(grouped)
