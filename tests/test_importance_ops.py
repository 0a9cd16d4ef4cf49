from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fastcl import ops


def problem(dtype: torch.dtype = torch.float64) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    shapes = [(3, 5), (7,), (), (2, 3, 4)]
    p, a, f = ([torch.randn(s, dtype=dtype) for s in shapes] for _ in range(3))
    return p, a, [t.abs() for t in f]


def test_penalty_gradcheck() -> None:
    p, a, f = problem()
    p = [t.requires_grad_() for t in p]
    assert torch.autograd.gradcheck(lambda *p: ops.quadratic_penalty(p, a, f, 3.0), p)
    with pytest.raises(RuntimeError, match="not differentiable"):
        torch.autograd.gradgradcheck(lambda *p: ops.quadratic_penalty(p, a, f, 3.0), p)


def test_penalty_upstream_gradient() -> None:
    p, a, f = problem()
    p = [t.requires_grad_() for t in p]
    (5 * ops.quadratic_penalty(p, a, f, 3.0)).backward()
    for x, y, z in zip(p, a, f, strict=True):
        torch.testing.assert_close(x.grad, 15 * z * (x - y).detach())


def test_penalty_constants_must_be_constant() -> None:
    p, a, f = problem()
    with pytest.raises(ValueError, match="anchors and importances are constants"):
        ops.quadratic_penalty([t.requires_grad_() for t in p], [t.requires_grad_() for t in a], f, 1.0)


def test_grad_form_adds_and_returns() -> None:
    p, a, f = problem()
    grads = [torch.randn_like(t) for t in p]
    want = [g + 3 * z * (x - y) for g, x, y, z in zip(grads, p, a, f, strict=True)]
    value = ops.quadratic_penalty_grad_(grads, p, a, f, 3.0)
    torch.testing.assert_close(value, ops.quadratic_penalty(p, a, f, 3.0))
    for g, w in zip(grads, want, strict=True):
        torch.testing.assert_close(g, w)


def test_importances_in_bf16() -> None:
    p, a, f = problem(torch.float32)
    half = [t.bfloat16() for t in f]
    torch.testing.assert_close(
        ops.quadratic_penalty(p, a, half, 3.0), ops.quadratic_penalty(p, a, [t.float() for t in half], 3.0)
    )


def test_large_sum_is_exact_enough() -> None:
    p, a = torch.full((3_000_001,), 1.1), torch.ones(3_000_001)
    got = ops.quadratic_penalty([p], [a], [torch.ones_like(p)], 2.0)
    want = (p.double() - a.double()).square().sum()
    assert abs(got.item() / want.item() - 1) < 1e-6


def test_empty_problem() -> None:
    assert ops.quadratic_penalty([], [], [], 1.0) == 0
    assert ops.quadratic_penalty_grad_([], [], [], [], 1.0) == 0


PENALTY_BAD = {
    "negative strength": (dict(strength=-1.0), "strength is -1"),
    "NaN strength": (dict(strength=math.nan), "strength is nan"),
    "infinite strength": (dict(strength=math.inf), "strength is inf"),
    "NaN importance": (dict(importances=[torch.tensor([1.0, math.nan])]), r"importances\[0\] has NaN or negative"),
    "negative importance": (dict(importances=[torch.tensor([1.0, -1.0])]), r"importances\[0\] has NaN or negative"),
    "importance shape": (dict(importances=[torch.ones(3)]), r"importances\[0\] has shape \[3\]"),
    "importance dtype": (dict(importances=[torch.ones(2).double()]), r"importances\[0\] must have the dtype"),
    "anchor shape": (dict(anchors=[torch.ones(1)]), r"anchors\[0\] has shape \[1\]"),
    "anchor dtype": (dict(anchors=[torch.ones(2).double()]), r"anchors\[0\] must have the dtype of params\[0\]"),
    "too few anchors": (dict(anchors=[]), "anchors has 0 tensors but must have as many as params, 1"),
    "too many importances": (dict(importances=[torch.ones(2)] * 2), "importances has 2 tensors"),
    "integer parameter": (dict(params=[torch.ones(2).int()]), r"params\[0\]"),
}


@pytest.mark.parametrize("case", PENALTY_BAD)
def test_bad_penalty_raises_before_writing(case: str) -> None:
    change, message = PENALTY_BAD[case]
    good = dict(params=[torch.ones(2)], anchors=[torch.zeros(2)], importances=[torch.ones(2)], strength=1.0)
    with pytest.raises(ValueError, match=message):
        ops.quadratic_penalty(**{**good, **change})
    if "params" in change:
        message = r"grads\[0\]|params\[0\]"
    g = torch.full((2,), 0.5)
    with pytest.raises(ValueError, match=message):
        ops.quadratic_penalty_grad_([g], **{**good, **change})
    assert g.tolist() == [0.5, 0.5]


def test_gradients_must_have_their_own_memory() -> None:
    p, a, f = torch.ones(2), torch.zeros(2), torch.ones(2)
    for grads, message in [
        ([p], r"params\[0\] shares memory"),
        ([a], r"anchors\[0\] shares"),
        ([f], r"importances\[0\]"),
    ]:
        with pytest.raises(ValueError, match=message):
            ops.quadratic_penalty_grad_(grads, [p], [a], [f], 1.0)
    assert (p.tolist(), a.tolist(), f.tolist()) == ([1.0, 1.0], [0.0, 0.0], [1.0, 1.0])


def outer_loop(grad: Tensor, activation: Tensor, power: int) -> Tensor:
    """The definition, sample by sample in float64."""
    g, a = grad.double(), activation.double()
    if g.dim() == 2:
        g, a = g.unsqueeze(1), a.unsqueeze(1)
    return sum((g[n].T @ a[n]).abs() ** power for n in range(len(g)))


SIZES = [(1, None, 1, 1), (3, None, 7, 9), (130, None, 17, 49), (300, None, 9, 97), (2, 1, 3, 4), (5, 7, 9, 50),
         (3, 300, 8, 48), (70, 5, 33, 130), (1, 9, 1, 100)]  # fmt: skip


@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sizes", SIZES)
def test_outer_is_the_loop_over_samples(sizes: tuple, dtype: torch.dtype, power: int) -> None:
    n, p, o, i = sizes
    lead = (n,) if p is None else (n, p)
    grad, activation = torch.randn(*lead, o).to(dtype), torch.randn(*lead, i).to(dtype)
    out = torch.rand(o, i, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    want = out.double() + outer_loop(grad, activation, power)
    ops.accumulate_outer_(out, grad, activation, power)
    torch.testing.assert_close(out.double(), want, rtol=1e-5 if dtype != torch.float64 else 1e-12, atol=1e-6)


def test_outer_takes_any_strides() -> None:
    grad, activation = torch.randn(9, 4, 6).transpose(0, 2), torch.randn(4, 6, 14).permute(1, 0, 2)[..., ::2]
    out = torch.zeros(7, 9).T
    ops.accumulate_outer_(out, grad, activation, 2)
    torch.testing.assert_close(out.double(), outer_loop(grad, activation, 2), rtol=1e-5, atol=1e-6)


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
    "integers": ((torch.zeros(3, 4), torch.ones(2, 3).int(), torch.ones(2, 4).int(), 2), "grad must be float32"),
}


@pytest.mark.parametrize("case", OUTER_BAD)
def test_bad_outer_raises_before_writing(case: str) -> None:
    args, message = OUTER_BAD[case]
    with pytest.raises(ValueError, match=message):
        ops.accumulate_outer_(*args)
    assert not args[0].any()


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
@pytest.mark.parametrize("features", [1, 5, 64, 65, 200])
def test_affine_is_the_loop_over_samples(features: int, view: str, power: int) -> None:
    def made() -> Tensor:
        if view == "features second":
            return torch.randn(3, features, 37).transpose(1, 2)
        return torch.randn(3, 37, features * 2)[..., ::2] if view == "odd" else torch.randn(3, 37, features)

    grad, x = made(), made()
    shift, scale = torch.randn(features).expand_as(x), torch.rand(3, 37, 1).expand_as(x)
    weight, bias = torch.rand(features), torch.rand(features)
    hat = (x.double() - shift.double()) * scale.double()
    want_w = weight.double() + ((grad.double() * hat).sum(1).abs() ** power).sum(0)
    want_b = bias.double() + (grad.double().sum(1).abs() ** power).sum(0)
    alone = bias.clone()
    ops.accumulate_affine_(weight, bias, grad, (x, shift, scale), power)
    torch.testing.assert_close(weight.double(), want_w, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(bias.double(), want_b, rtol=1e-5, atol=1e-5)
    ops.accumulate_affine_(None, alone, grad, None, power)
    torch.testing.assert_close(alone, bias)


def test_bad_affine() -> None:
    grad, out = torch.ones(2, 3, 4), torch.zeros(4)
    with pytest.raises(ValueError, match=r"biases\[0\] must be contiguous \[C\] with the features of grad, 4"):
        ops.accumulate_affine_(None, torch.zeros(5), grad, None, 2)
    with pytest.raises(ValueError, match="normalised must be"):
        ops.accumulate_affine_(out, None, grad, None, 2)
    with pytest.raises(ValueError, match=r"normalised\[1\] has shape"):
        ops.accumulate_affine_(out, None, grad, (grad.clone(), torch.ones(4), grad.clone()), 2)
    with pytest.raises(ValueError, match="power is 4"):
        ops.accumulate_affine_(None, out, grad, None, 4)
    with pytest.raises(ValueError, match="grad must be a CPU tensor"):
        ops.accumulate_affine_(None, out, torch.ones(3, 4), None, 2)
    assert not out.any()
