"""fisher_diagonal against float64 loops of batch-1 backward passes, and what it must leave untouched."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

import fastcl

from . import oracle
from .zoo import MODELS, build

pytestmark = pytest.mark.filterwarnings("ignore::fastcl.FallbackWarning")


def halves(x: Tensor, y: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Two uneven batches: a mean over batches instead of samples would show."""
    return [(x[:5], y[:5]), (x[5:], y[5:])]


@pytest.mark.parametrize("name", MODELS)
def test_empirical_is_the_batch_1_loop(name: str) -> None:
    model, x, y = build(name)
    found = fastcl.fisher_diagonal(model, halves(x, y))
    assert oracle.worst_relative_error(found, oracle.empirical_fisher(model, x, y)) < 1e-5


@pytest.mark.parametrize("name", ["mlp", "tied", "conv2d", "transposed", "embedding", "lstm"])
def test_exact_is_the_expectation_over_labels(name: str) -> None:
    model, x, _ = build(name)
    found = fastcl.fisher_diagonal(model, [x], kind="exact")
    assert oracle.worst_relative_error(found, oracle.exact_fisher(model, x)) < 1e-5


def test_kinds_agree_where_they_must() -> None:
    model, x, _ = build("mlp")
    model.eval()
    with torch.no_grad():
        best = model(x).argmax(1)
    by_map = fastcl.fisher_diagonal(model, [x], kind="map")
    assert oracle.worst_relative_error(by_map, oracle.empirical_fisher(model, x, best)) < 1e-5
    # `sample` is unbiased for `exact`
    exact = fastcl.fisher_diagonal(model, [x], kind="exact")
    generator = torch.Generator().manual_seed(1)
    draws = [fastcl.fisher_diagonal(model, [x], kind="sample", generator=generator) for _ in range(400)]
    for name, want in exact.items():
        found = torch.stack([d[name] for d in draws]).mean(0)
        assert (found.sum() / want.sum() - 1).abs() < 0.1


def test_sample_follows_its_generator() -> None:
    model, x, _ = build("mlp")
    one, two = (
        fastcl.fisher_diagonal(model, [x], kind="sample", generator=torch.Generator().manual_seed(7)) for _ in range(2)
    )
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_batched_is_the_square_of_the_mean() -> None:
    model, x, y = build("mlp")
    found = fastcl.fisher_diagonal(model, halves(x, y), kind="batched")
    expected = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for a, b in halves(x, y):
        grads = torch.autograd.grad(nn.functional.cross_entropy(model(a), b), list(model.parameters()))
        for total, g in zip(expected.values(), grads, strict=True):
            total += g.square() / 2
    for name, want in expected.items():
        torch.testing.assert_close(found[name], want)


def test_batch_size_does_not_matter() -> None:
    model, x, y = build("conv2d")
    whole = fastcl.fisher_diagonal(model, [(x, y)])
    single = fastcl.fisher_diagonal(model, [(x[n : n + 1], y[n : n + 1]) for n in range(len(x))])
    for name, want in whole.items():
        torch.testing.assert_close(single[name], want)


def test_classes_restrict_the_softmax() -> None:
    model, x, y = build("mlp")
    columns = [0, 2, 3]
    y = torch.tensor(columns)[y % 3]
    found = fastcl.fisher_diagonal(model, [(x, y)], classes=columns)
    assert oracle.worst_relative_error(found, oracle.empirical_fisher(model, x, y, columns)) < 1e-5
    exact = fastcl.fisher_diagonal(model, [x], kind="exact", classes=columns)
    assert oracle.worst_relative_error(exact, oracle.exact_fisher(model, x, columns)) < 1e-5
    assert not found["2.bias"][1]


def test_own_loss() -> None:
    model, x, _ = build("mlp")
    target = torch.randn(len(x), 4)

    def loss(output: Tensor, y: Tensor) -> Tensor:
        return (output - y).square().sum(1)

    found = fastcl.fisher_diagonal(model, [(x, target)], loss=loss)
    cotangent = 2 * (model.eval()(x) - target).detach()
    expected = {name: total / len(x) for name, total in oracle.per_sample(model, x, cotangent, 2).items()}
    assert oracle.worst_relative_error(found, expected) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes(dtype: torch.dtype) -> None:
    model, x, y = build("conv2d")
    want = oracle.empirical_fisher(model, x, y)
    found = fastcl.fisher_diagonal(model.to(dtype), [(x.to(dtype), y)])
    limit = 1e-12 if dtype == torch.float64 else 0.15  # bfloat16: the model itself is that inexact
    assert oracle.worst_relative_error(found, want) < limit
    assert all(f.dtype == (torch.float64 if dtype == torch.float64 else torch.float32) for f in found.values())


def test_tuple_and_dict_inputs() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.s = nn.Linear(3, 4), nn.Linear(2, 4), nn.Parameter(torch.randn(4))

        def forward(self, left: Tensor, right: Tensor) -> Tensor:
            return self.a(left) * self.s + self.b(right)

    model, left, right, y = Two(), torch.randn(6, 3), torch.randn(6, 2), torch.randint(0, 4, (6,))
    as_tuple = fastcl.fisher_diagonal(model, [((left, right), y)])
    as_dict = fastcl.fisher_diagonal(model, [({"right": right, "left": left}, y)])
    for name in as_tuple:
        torch.testing.assert_close(as_tuple[name], as_dict[name])
    assert as_tuple["s"].abs().sum() > 0


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("error", [Interrupted, KeyboardInterrupt])
def test_leaves_the_model_as_it_was(error: type[BaseException]) -> None:
    model, x, y = build("conv2d")
    model[1].eval()  # a module in another mode than its neighbours
    calls: list[int] = []
    handle = model[0].register_forward_hook(lambda *_: calls.append(1))
    for p in model.parameters():
        p.grad = torch.full_like(p, 0.5)
    modes = [m.training for m in model.modules()]
    state = {name: t.clone() for name, t in model.state_dict().items()}
    hooks = [len(m._forward_hooks) for m in model.modules()]
    rng = torch.get_rng_state()

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        yield x, y
        raise error

    fastcl.fisher_diagonal(model, [(x, y)])
    with pytest.raises(error):
        fastcl.fisher_diagonal(model, batches())

    assert modes == [m.training for m in model.modules()]
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())
    assert all(torch.equal(p.grad, torch.full_like(p, 0.5)) for p in model.parameters())
    assert hooks == [len(m._forward_hooks) for m in model.modules()]
    assert torch.equal(rng, torch.get_rng_state())
    assert len(calls) == 4  # the caller's hook still ran: two passes, and a look at the shapes before each
    handle.remove()


def test_buffers_that_forward_writes_are_restored() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 4)
            self.register_buffer("seen", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.seen += len(x)
            return self.layer(x)

    model = Counting()
    fastcl.fisher_diagonal(model, [(torch.randn(5, 3), torch.zeros(5, dtype=torch.int64))])
    assert model.seen == 0


def test_callers_hook_may_change_a_layers_output() -> None:
    model, x, y = build("mlp")
    handle = model[0].register_forward_hook(lambda _m, _a, output: 2 * output)
    found = fastcl.fisher_diagonal(model, [(x, y)])
    want = oracle.empirical_fisher(model, x, y)  # a deep copy keeps the hook
    handle.remove()
    assert oracle.worst_relative_error(found, want) < 1e-5


def test_works_under_no_grad_and_skips_frozen_parameters() -> None:
    model, x, y = build("lora")
    with torch.no_grad():
        found = fastcl.fisher_diagonal(model, [(x, y)])
    assert set(found) == {"down.weight", "up.weight", "head.weight", "head.bias"}


def test_unused_parameters_have_importance_zero() -> None:
    model = nn.ModuleDict({"used": nn.Linear(3, 4), "unused": nn.Linear(3, 4)})
    model.forward = lambda x: model["used"](x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing to fall back for
        found = fastcl.fisher_diagonal(model, [(torch.randn(5, 3), torch.zeros(5, dtype=torch.int64))])
    assert not found["unused.weight"].any()
    assert found["used.weight"].any()


def test_fallback_names_the_module_once() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.strange = nn.Bilinear(3, 3, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.strange(x, x)

    batch = (torch.randn(5, 3), torch.zeros(5, dtype=torch.int64))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        fastcl.fisher_diagonal(Odd(), [batch, batch])
    texts = [str(w.message) for w in said if w.category is fastcl.FallbackWarning]
    assert len(texts) == 1
    assert "strange (Bilinear)" in texts[0]


def test_input_overwritten_after_the_layer_is_refused() -> None:
    class Overwrites(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = x.clone()
            y = self.layer(x)
            x.zero_()
            return y

    with pytest.raises(RuntimeError, match="overwritten in place"):
        fastcl.fisher_diagonal(Overwrites(), [(torch.randn(5, 3), torch.zeros(5, dtype=torch.int64))])


def test_bad_input() -> None:
    model, x, y = build("mlp")
    with pytest.raises(ValueError, match="kind is 'true'"):
        fastcl.fisher_diagonal(model, [(x, y)], kind="true")
    with pytest.raises(ValueError, match="batches is empty"):
        fastcl.fisher_diagonal(model, [])
    with pytest.raises(ValueError, match="needs the label y"):
        fastcl.fisher_diagonal(model, [x])
    with pytest.raises(ValueError, match="unknown label 4"):
        fastcl.fisher_diagonal(model, [(x, torch.full((13,), 4))])
    with pytest.raises(ValueError, match=r"unknown label 1: must be one of \[0, 2\]"):
        fastcl.fisher_diagonal(model, [(x, torch.ones(13, dtype=torch.int64))], classes=[0, 2])
    with pytest.raises(ValueError, match="output columns 0 to 3"):
        fastcl.fisher_diagonal(model, [(x, y)], classes=[0, 9])
    with pytest.raises(ValueError, match="one label for each of the 13 samples"):
        fastcl.fisher_diagonal(model, [(x, y[:3])])
    with pytest.raises(ValueError, match="one number a sample"):
        fastcl.fisher_diagonal(model, [(x, y)], loss=nn.functional.cross_entropy)
    with pytest.raises(ValueError, match="loss cannot be given"):
        fastcl.fisher_diagonal(model, [x], kind="exact", loss=nn.functional.cross_entropy)
    with pytest.raises(ValueError, match="no parameter that requires grad"):
        fastcl.fisher_diagonal(model.requires_grad_(False), [(x, y)])
    coupled = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4, track_running_stats=False))
    with pytest.raises(ValueError, match="samples are coupled"):
        fastcl.fisher_diagonal(coupled, [(x, y)])


def test_no_graph_outlives_a_pass() -> None:
    """A node that holds its own hook would live for ever: each batch would leave its graph behind."""
    import weakref

    Conv2d, Flatten, Linear = torch.nn.Conv2d, torch.nn.Flatten, torch.nn.Linear
    model = torch.nn.Sequential(Conv2d(1, 2, 3), Conv2d(2, 2, 3, bias=False), Flatten(), Linear(18, 2))
    marks: list[weakref.ref] = []

    class Mark:
        pass

    def note(module: torch.nn.Module, args: tuple, out: torch.Tensor) -> None:
        if out.requires_grad:
            mark = out.grad_fn.metadata["mark"] = Mark()  # lives as long as the node
            marks.append(weakref.ref(mark))

    model[0].register_forward_hook(note)
    fastcl.fisher_diagonal(model, [(torch.randn(5, 1, 7, 7), torch.zeros(5, dtype=torch.int64))])
    assert marks
    assert all(mark() is None for mark in marks)
