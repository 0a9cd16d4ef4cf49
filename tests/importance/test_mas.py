"""mas_importance against float64 loops, and MAS's merges."""

from __future__ import annotations

import pytest
import torch

import fastcl

from . import oracle
from .zoo import MODELS, build

pytestmark = pytest.mark.filterwarnings("ignore::fastcl.FallbackWarning")


def output_of(model: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(x)


@pytest.mark.parametrize("name", MODELS)
def test_norm_is_the_batch_1_loop(name: str) -> None:
    model, x, _ = build(name)
    found = fastcl.mas_importance(model, [x[:5], x[5:]])
    total = oracle.per_sample(model, x, 2 * output_of(model, x), 1)
    assert oracle.worst_relative_error(found, {n: t / len(x) for n, t in total.items()}) < 5e-5


@pytest.mark.parametrize("name", ["mlp", "conv2d", "tied"])
def test_vector_sums_over_outputs(name: str) -> None:
    model, x, _ = build(name)
    found = fastcl.mas_importance(model, [x], output="vector")
    expected: dict[str, torch.Tensor] = {}
    for c in range(4):
        v = torch.zeros(len(x), 4)
        v[:, c] = 1
        for n, t in oracle.per_sample(model, x, v, 1).items():
            expected[n] = expected.get(n, 0) + t / len(x)
    assert oracle.worst_relative_error(found, expected) < 1e-5


def test_labels_are_ignored() -> None:
    model, x, y = build("mlp")
    a, b = fastcl.mas_importance(model, [(x, y)]), fastcl.mas_importance(model, [x])
    assert all(torch.equal(a[n], b[n]) for n in a)


@pytest.mark.parametrize(("merge", "shares"), [("sum", (1.0, 1.0)), ("ema", (0.25, 0.75))])
def test_merges(merge: str, shares: tuple[float, float]) -> None:
    model, x, _ = build("mlp")
    mas = fastcl.MAS(model, 3.0, merge, alpha=0.25)
    first = fastcl.mas_importance(model, [x])
    mas.consolidate([x])
    assert all(torch.equal(mas.importances[n], first[n]) for n in first)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1
    second = fastcl.mas_importance(model, [x[:4]])
    mas.consolidate([x[:4]])
    for n in first:
        torch.testing.assert_close(mas.importances[n], shares[0] * first[n] + shares[1] * second[n])


def test_half() -> None:
    model, x, _ = build("mlp")
    both = [fastcl.MAS(model, 3.0, half=half) for half in (True, False)]
    for mas in both:
        mas.consolidate([x])
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1
    torch.testing.assert_close(both[1].penalty(), 2 * both[0].penalty())


def test_bad_input() -> None:
    model, x, _ = build("mlp")
    with pytest.raises(ValueError, match="output is 'length'"):
        fastcl.mas_importance(model, [x], output="length")
    with pytest.raises(ValueError, match="batches is empty"):
        fastcl.mas_importance(model, [])
    with pytest.raises(ValueError, match="merge is 'max'"):
        fastcl.MAS(model, 1.0, "max")
    with pytest.raises(ValueError, match="alpha is 2"):
        fastcl.MAS(model, 1.0, "ema", alpha=2)
    with pytest.raises(ValueError, match="output is 'length'"):
        fastcl.MAS(model, 1.0, output="length")
