"""accumulate_outer_, accumulate_conv_ and accumulate_affine_ against the definition: a loop over samples in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastcl import ops

from .samples import FLOATS


def relative_error(got: Tensor, want: Tensor) -> float:
    """Of the worst element; elements that cancel to nearly nothing are held against the mean."""
    scale = torch.maximum(want.abs(), 1e-3 * want.abs().mean())
    return ((got.double() - want).abs() / scale).max().item()


def outer_loop(grad: Tensor, activation: Tensor, power: int) -> Tensor:
    """The definition in float64, one batch-1 outer product a sample."""
    g, a = grad.double(), activation.double()
    if g.dim() == 2:
        g, a = g.unsqueeze(1), a.unsqueeze(1)
    return (g.transpose(1, 2) @ a).abs().pow(power).sum(0)  # [N, O, I]: every sample's own gradient


SIZES = [(1, None, 1, 1), (3, None, 7, 9), (130, None, 17, 49), (300, None, 9, 97), (2, 1, 3, 4), (5, 7, 9, 50),
         (3, 300, 8, 48), (70, 5, 33, 130), (1, 9, 1, 100),
         (1, None, 5, 64), (8, None, 3, 201), (8, 1, 70, 130), (9, None, 3, 64)]  # fmt: skip


def sums_of(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_outer_is_the_loop_over_samples(sizes: tuple, dtype: torch.dtype, power: int) -> None:
    n, p, o, i = sizes
    lead = (n,) if p is None else (n, p)
    grad, activation = torch.randn(*lead, o).to(dtype), torch.randn(*lead, i).to(dtype)
    out = torch.rand(o, i, dtype=sums_of(dtype))
    want = out.double() + outer_loop(grad, activation, power)
    ops.accumulate_outer_(out, grad, activation, power)
    assert relative_error(out, want) < (1e-4 if dtype != torch.float64 else 1e-12)
    # typical: a millionth; the worst above is where a sum over positions cancels
    assert ((out.double() - want).abs() / want).median() < 1e-6


STRIDES = {
    "transposed": lambda n, p, f: torch.randn(f, p, n).permute(2, 1, 0),
    "positions last, as a convolution's output": lambda n, p, f: torch.randn(n, f, p).transpose(1, 2),
    "every second feature": lambda n, p, f: torch.randn(n, p, 2 * f)[..., ::2],
    "samples expanded": lambda n, p, f: torch.randn(1, p, f).expand(n, p, f),
    "positions expanded": lambda n, p, f: torch.randn(n, 1, f).expand(n, p, f),
    "all the same": lambda n, p, f: torch.randn(()).expand(n, p, f),
}


@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("positions", [1, 6])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("strides", STRIDES)
def test_outer_takes_any_strides(strides: str, dtype: torch.dtype, positions: int, power: int) -> None:
    for other in STRIDES:
        grad, activation = STRIDES[strides](9, positions, 7).to(dtype), STRIDES[other](9, positions, 11).to(dtype)
        forms = [(grad, activation)] if positions > 1 else [(grad, activation), (grad[:, 0], activation[:, 0])]
        for g, a in forms:
            out = torch.zeros(11, 7, dtype=sums_of(dtype)).T
            ops.accumulate_outer_(out, g, a, power)
            assert relative_error(out, outer_loop(g, a, power)) < 1e-4


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("strides", STRIDES)
def test_outer_of_few_samples_takes_any_strides(strides: str, dtype: torch.dtype) -> None:
    for other in STRIDES:
        grad, activation = STRIDES[strides](3, 1, 7).to(dtype), STRIDES[other](3, 1, 71).to(dtype)
        out = torch.zeros(7, 71, dtype=sums_of(dtype))
        ops.accumulate_outer_(out, grad, activation, 2)
        assert relative_error(out, outer_loop(grad, activation, 2)) < 1e-4


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_outer_sums_any_dtype_in_float64(dtype: torch.dtype) -> None:
    grad, activation = torch.randn(5, 7, 9).to(dtype), torch.randn(5, 7, 11).to(dtype)
    out = torch.zeros(9, 11, dtype=torch.float64)
    ops.accumulate_outer_(out, grad, activation, 2)
    assert relative_error(out, outer_loop(grad, activation, 2)) < 1e-12


@pytest.mark.parametrize("shape", [(2, 20_000), (3000, 3)], ids=["many positions", "many samples"])
def test_outer_over_long_sums_of_one_sign(shape: tuple[int, int]) -> None:
    """As behind a ReLU: nothing cancels, and float32 sums must not stagnate."""
    grad, activation = torch.rand(*shape, 5) + 0.5, torch.rand(*shape, 6) + 0.5
    out = torch.zeros(5, 6)
    ops.accumulate_outer_(out, grad, activation, 2)
    assert relative_error(out, outer_loop(grad, activation, 2)) < 1e-4


def test_outer_shows_nan_and_inf_where_they_are() -> None:
    """A NaN gradient spoils its own row of the importances, and only that: the caller sees it."""
    grad, activation = torch.randn(4, 3, 20), torch.randn(4, 3, 60)
    grad[1, 2, 9] = float("nan")
    activation[0, 0, 50] = float("inf")
    out = torch.zeros(20, 60)
    ops.accumulate_outer_(out, grad, activation, 2)
    bad = ~out.isfinite()
    want = torch.zeros(20, 60, dtype=torch.bool)
    want[9], want[:, 50] = True, True
    assert torch.equal(bad, want)


def test_outer_with_nothing_to_add() -> None:
    out = torch.ones(3, 4)
    ops.accumulate_outer_(out, torch.zeros(0, 3), torch.zeros(0, 4), 2)
    assert torch.equal(out, torch.ones(3, 4))


OUTER_BAD = {
    "power": ((torch.zeros(3, 4), torch.ones(2, 3), torch.ones(2, 4), 3), "power is 3"),
    "out dtype": ((torch.zeros(3, 4).bfloat16(), torch.ones(2, 3), torch.ones(2, 4), 2), "out must be float32"),
    "out shape": ((torch.zeros(4, 3), torch.ones(2, 3), torch.ones(2, 4), 2), r"out must be \[O, I\].*\[3, 4\]"),
    "samples": ((torch.zeros(3, 4), torch.ones(2, 3), torch.ones(5, 4), 2), "activation must have the samples"),
    "positions": ((torch.zeros(3, 4), torch.ones(2, 6, 3), torch.ones(2, 5, 4), 2), "activation must have the samples"),
    "dimensions": ((torch.zeros(3, 4), torch.ones(3), torch.ones(4), 2), "grad must be"),
    "dtypes": ((torch.zeros(3, 4), torch.ones(2, 3), torch.ones(2, 4).double(), 2), "activation must have the dtype"),
    "one has positions": ((torch.zeros(3, 4), torch.ones(2, 3), torch.ones(2, 5, 4), 2), "activation must have"),
    "out of one dimension": ((torch.zeros(12), torch.ones(2, 3), torch.ones(2, 4), 2), r"out must be \[O, I\]"),
    "out expanded": ((torch.zeros(1, 4).expand(3, 4), torch.ones(2, 3), torch.ones(2, 4), 2), "out overlaps itself"),
    "negative power": ((torch.zeros(3, 4), torch.ones(2, 3), torch.ones(2, 4), -2), "power is -2"),
    "integers": ((torch.zeros(3, 4), torch.ones(2, 3).int(), torch.ones(2, 4).int(), 2), "grad must be float32"),
}


@pytest.mark.parametrize("case", OUTER_BAD)
def test_bad_outer_raises_before_writing(case: str) -> None:
    args, message = OUTER_BAD[case]
    with pytest.raises(ValueError, match=message):
        ops.accumulate_outer_(*args)
    assert not args[0].any()


@pytest.mark.parametrize("name", ["out", "grad", "activation", "power"])
@pytest.mark.parametrize("wrong", [None, "x"], ids=str)
def test_outer_of_other_types(name: str, wrong: object) -> None:
    good = dict(out=torch.zeros(3, 4), grad=torch.ones(2, 3), activation=torch.ones(2, 4), power=2)
    with pytest.raises(TypeError, match=name):
        ops.accumulate_outer_(**{**good, name: wrong})
    assert not good["out"].any()


@pytest.mark.parametrize("shared", ["grad", "activation"])
def test_outer_may_not_read_what_it_writes(shared: str) -> None:
    memory = torch.ones(3, 3)
    args = dict(out=memory, grad=torch.ones(3, 3), activation=torch.ones(3, 3), power=2)
    with pytest.raises(ValueError, match=f"{shared}.* shares memory with out"):
        ops.accumulate_outer_(**{**args, shared: memory})
    assert torch.equal(memory, torch.ones(3, 3))


def conv_loop(weight: tuple[int, ...], grad: Tensor, x: Tensor, stride, padding, dilation, groups, power) -> Tensor:
    f = (torch.conv1d, torch.conv2d, torch.conv3d)[len(stride) - 1]
    total = torch.zeros(weight, dtype=torch.float64)
    for n in range(len(x)):
        w = torch.zeros(weight, dtype=torch.float64, requires_grad=True)
        y = f(x[n : n + 1].double(), w, None, stride, padding, dilation, groups)
        total += torch.autograd.grad((y * grad[n : n + 1].double()).sum(), w)[0].abs() ** power
    return total


CONVS = [  # weight, input, stride, padding, dilation, groups
    ((5, 3, 3), (4, 3, 11), [2], [1], [1], 1),
    ((6, 2, 4), (3, 4, 12), [1], [3], [2], 2),
    ((9, 3, 3, 3), (4, 3, 9, 8), [1, 1], [1, 1], [1, 1], 1),
    ((8, 20, 3, 2), (3, 40, 7, 6), [2, 1], [1, 0], [1, 2], 2),
    ((16, 32, 1, 1), (5, 32, 6, 5), [2, 2], [0, 0], [1, 1], 1),
    ((12, 1, 3, 3), (3, 12, 5, 5), [1, 1], [1, 1], [1, 1], 12),
    ((7, 60, 2, 2), (3, 60, 2, 2), [1, 1], [0, 0], [1, 1], 1),  # one position: the form that factorises
    ((4, 3, 5, 5), (2, 3, 40, 40), [1, 1], [2, 2], [1, 1], 1),  # more positions than one block
    ((5, 2, 2, 3, 2), (3, 2, 4, 5, 4), [1, 2, 1], [0, 1, 1], [2, 1, 1], 1),
]


@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
@pytest.mark.parametrize("case", CONVS)
def test_conv_is_the_loop_over_samples(case: tuple, layout: str, power: int) -> None:
    weight, shape, *rest = case
    x = torch.randn(shape)
    f = (torch.conv1d, torch.conv2d, torch.conv3d)[len(rest[0]) - 1]
    grad = torch.randn_like(f(x, torch.zeros(weight), None, *rest))
    if layout == "channels_last":
        x, grad = (t.movedim(1, -1).contiguous().movedim(-1, 1) for t in (x, grad))
    if layout == "sliced":
        x, grad = (torch.stack([t, t], -1)[..., 0] for t in (x, grad))
    out = torch.rand(weight)
    want = out.double() + conv_loop(weight, grad, x, *rest, power)
    ops.accumulate_conv_(out, grad, x, *rest, power)
    torch.testing.assert_close(out.double(), want, rtol=5e-5, atol=1e-5)  # the sum over positions cancels


CONV_BAD = {
    "power": (dict(power=0), "power is 0"),
    "input channels": (dict(input=torch.ones(2, 5, 6, 6)), "out must be .channels of grad"),
    "grad channels": (dict(grad=torch.ones(2, 3, 4, 4)), "out must be .channels of grad"),
    "samples": (dict(grad=torch.ones(3, 4, 4, 4)), "of the same N"),
    "dimensions": (dict(grad=torch.ones(2, 4, 4)), "of the same N"),
    "stride": (dict(stride=[1]), "must each have 2 numbers"),
    "stride 0": (dict(stride=[0, 1]), "stride and dilation must be at least 1"),
    "negative padding": (dict(padding=[-1, 0]), "padding not negative"),
    "too many positions": (dict(grad=torch.ones(2, 4, 5, 4)), "more positions"),
    "groups": (dict(groups=0), "out must be"),
    "dtype": (dict(input=torch.ones(2, 3, 6, 6).double()), "input must have the dtype"),
    "dilation 0": (dict(dilation=[1, 0]), "stride and dilation must be at least 1"),
    "padding": (dict(padding=[0, 0, 0]), "stride, padding and dilation must each have 2 numbers"),
    "integers": (dict(grad=torch.ones(2, 4, 4, 4).int(), input=torch.ones(2, 3, 6, 6).int()), "grad must be float32"),
}


@pytest.mark.parametrize("case", CONV_BAD)
def test_bad_conv_raises_before_writing(case: str) -> None:
    change, message = CONV_BAD[case]
    out = torch.zeros(4, 3, 3, 3)
    good = dict(out=out, grad=torch.ones(2, 4, 4, 4), input=torch.ones(2, 3, 6, 6), stride=[1, 1], padding=[0, 0],
                dilation=[1, 1], groups=1, power=2)  # fmt: skip
    ops.accumulate_conv_(**{**good, "out": out.clone()})
    with pytest.raises(ValueError, match=message):
        ops.accumulate_conv_(**{**good, **change})
    assert not out.any()


@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("view", ["features last", "features second", "odd"])
@pytest.mark.parametrize("of", ["feature", "position", "both"])
@pytest.mark.parametrize("positions", [1, 37, 530])
@pytest.mark.parametrize("features", [1, 5, 64, 65, 200])
def test_affine_is_the_loop_over_samples(features: int, positions: int, of: str, view: str, power: int) -> None:
    for dtype in (torch.float32, torch.bfloat16):

        def made(dtype: torch.dtype = dtype) -> Tensor:
            if view == "features second":
                return torch.randn(3, features, positions).to(dtype).transpose(1, 2)
            wide = torch.randn(3, positions, features * 2).to(dtype)
            return wide[..., ::2] if view == "odd" else wide[..., :features].contiguous()

        grad, x = made(), made()
        each = {"feature": (features,), "position": (3, positions, 1)}
        shift = torch.randn(each["feature" if of == "both" else of]).to(dtype).expand_as(x)
        scale = torch.rand(each["position" if of == "both" else of]).to(dtype).expand_as(x)
        weight, bias = torch.rand(features), torch.rand(features)
        hat = (x.double() - shift.double()) * scale.double()
        want_w = weight.double() + ((grad.double() * hat).sum(1).abs() ** power).sum(0)
        want_b = bias.double() + (grad.double().sum(1).abs() ** power).sum(0)
        alone = bias.clone()
        ops.accumulate_affine_(weight, bias, grad, (x, shift, scale), power)
        atol = 1e-5 if positions <= 37 else 1e-4  # longer sums cancel more
        torch.testing.assert_close(weight.double(), want_w, rtol=1e-5, atol=atol)
        torch.testing.assert_close(bias.double(), want_b, rtol=1e-5, atol=atol)
        ops.accumulate_affine_(None, alone, grad, None, power)
        torch.testing.assert_close(alone, bias, rtol=1.3e-6 if positions <= 37 else 1e-5, atol=atol)


def test_bad_affine() -> None:
    grad, out = torch.ones(2, 3, 4), torch.zeros(4)
    with pytest.raises(ValueError, match=r"biases\[0\] must be contiguous \[C\] with the features of grad, 4"):
        ops.accumulate_affine_(None, torch.zeros(5), grad, None, 2)
    with pytest.raises(ValueError, match="normalised must be"):
        ops.accumulate_affine_(out, None, grad, None, 2)
    with pytest.raises(ValueError, match=r"normalised\[1\] has shape"):
        ops.accumulate_affine_(out, None, grad, (grad.clone(), torch.ones(4), grad.clone()), 2)
    with pytest.raises(ValueError, match=r"biases\[0\] must have the dtype of weights\[0\]"):
        ops.accumulate_affine_(out, out.double(), grad, (grad, grad, grad), 2)
    with pytest.raises(ValueError, match=r"normalised\[2\] must have the dtype of grad"):
        ops.accumulate_affine_(out, None, grad, (grad, grad, grad.double()), 2)
    with pytest.raises(ValueError, match=r"weights\[0\] must be float32 or float64"):
        ops.accumulate_affine_(out.bfloat16(), None, grad, (grad, grad, grad), 2)
    with pytest.raises(ValueError, match="grad must be float32"):
        ops.accumulate_affine_(None, out, grad.int(), None, 2)
    with pytest.raises(ValueError, match="shares memory"):
        ops.accumulate_affine_(out, out, grad, (grad, grad, grad), 2)
    with pytest.raises(TypeError, match="weights"):
        ops.accumulate_affine_("gamma", None, grad, (grad, grad, grad), 2)
    with pytest.raises(TypeError, match="grad"):
        ops.accumulate_affine_(None, out, None, None, 2)
    with pytest.raises(ValueError, match="power is 4"):
        ops.accumulate_affine_(None, out, grad, None, 4)
    with pytest.raises(ValueError, match="grad must be a CPU tensor"):
        ops.accumulate_affine_(None, out, torch.ones(3, 4), None, 2)
    assert not out.any()
