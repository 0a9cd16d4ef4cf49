"""Convolutions with the batch last, and the networks on them, against torch's own convolutions."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fastcl
from fastcl import _ops
from fastcl.nn import DCGAN, Discriminator, DynamicGenerator, batch_last, critic_loss
from fastcl.ops import _chwn

from .conftest import ROOT

needs_kernels = pytest.mark.skipif(_ops.pure_python, reason="built without a compiler")
# N, C, O, (H, W), kernel, stride, padding: both sides of every vector and block, odd maps, taps that meet nothing
CASES = [
    (64, 1, 16, (28, 28), (5, 5), 2, 2),
    (10, 16, 32, (14, 14), (5, 5), 2, 2),
    (3, 33, 13, (7, 7), (5, 5), 2, 2),
    (33, 13, 9, (8, 8), (4, 4), 2, 1),
    (48, 1, 9, (5, 6), (3, 2), 1, 0),
    (16, 5, 7, (4, 4), (4, 4), 1, 0),
    (17, 3, 5, (9, 4), (3, 3), 3, 1),
    (1, 2, 1, (1, 1), (5, 5), 2, 2),
    (8, 2, 3, (6, 7), (2, 2), 3, 0),  # stride over the kernel: pixels that nothing reads
    (4, 2, 3, (5, 5), (4, 4), 2, 0),  # one place, of which a row and a column are no part
]


def drawn(case: Any, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """x [C, H, W, N], weight and y [O, H', W', N]."""
    n, c, o, size, kernel, stride, padding = case
    x, weight = torch.randn(c, *size, n, dtype=dtype), torch.randn(o, c, *kernel, dtype=dtype)
    out = [(a + 2 * padding - b) // stride + 1 for a, b in zip(size, kernel, strict=True)]
    return x, weight, torch.randn(o, *out, n, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_torch_s_convolution(case: Any, dtype: torch.dtype) -> None:
    x, weight, y = drawn(case, dtype)
    stride, padding = case[-2:]
    images, exact, above = x.permute(3, 0, 1, 2).double(), weight.double(), y.permute(3, 0, 1, 2).double()
    images.requires_grad_()
    exact.requires_grad_()
    made = F.conv2d(images, exact, None, stride, padding)
    of_images, of_weight = torch.autograd.grad(made, [images, exact], above)
    taps = weight[0, 0].numel()
    for got, want, terms in (
        (_chwn.conv(x, weight, stride, padding), made.permute(1, 2, 3, 0), len(x) * taps),
        (_chwn.conv_input(y, weight, stride, padding, x.shape[1:3]), of_images.permute(1, 2, 3, 0), len(y) * taps),
        (_chwn.conv_weight(y, x, stride, padding, weight.shape[2:]), of_weight, y[0].numel()),
    ):
        assert got.is_contiguous()
        # a sum of so many products is of size sqrt(terms), and so is what is added up one after the other on the way
        close = torch.finfo(dtype).eps * terms**0.5
        torch.testing.assert_close(got.double(), want, rtol=0, atol=max(64, terms**0.5) * close)


@pytest.mark.parametrize("case", CASES[3:], ids=str)
def test_gradients_of_every_order(case: Any) -> None:
    n, c, o, size, kernel, stride, padding = case
    x, weight, y = drawn((min(n, 2), min(c, 2), min(o, 2), size, kernel, stride, padding), torch.float64)
    tensors = [t.requires_grad_() for t in (x, weight, y)]
    forms: list[tuple[Callable[..., Tensor], tuple[Tensor, Tensor]]] = [
        (lambda x, w: _chwn.conv(x, w, stride, padding), (tensors[0], tensors[1])),
        (lambda y, w: _chwn.conv_input(y, w, stride, padding, size), (tensors[2], tensors[1])),
        (lambda y, x: _chwn.conv_weight(y, x, stride, padding, kernel), (tensors[2], tensors[0])),
    ]
    for form, inputs in forms:
        assert torch.autograd.gradcheck(form, inputs)
        assert torch.autograd.gradgradcheck(form, inputs)


@needs_kernels
@pytest.mark.parametrize("case", CASES[:5], ids=str)
def test_same_bits_for_any_number_of_threads_and_images_beside(case: Any) -> None:
    """And for strided inputs."""
    x, weight, y = drawn(case, torch.float32)
    numbers = case[-2:]
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(
            [
                _chwn.conv(x, weight, *numbers),
                _chwn.conv_input(y, weight, *numbers, x.shape[1:3]),
                _chwn.conv_weight(y, x, *numbers, weight.shape[2:]),
            ]
        )
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))
    strided = torch.stack([x, x], 2)[:, :, 0]
    assert torch.equal(_chwn.conv(strided[..., :1], weight, *numbers), found[0][0][..., :1])
    assert torch.equal(_chwn.conv_input(y[..., 1:3], weight, *numbers, x.shape[1:3]), found[0][1][..., 1:3])


def test_opcheck(opcheck: Callable) -> None:
    x, weight, y = drawn(CASES[6], torch.float32)
    numbers = CASES[6][-2:]
    opcheck(_chwn._forward, (x, weight, *numbers))
    opcheck(_chwn._input, (y, weight, *numbers, *x.shape[1:3]))
    opcheck(_chwn._weight, (y, x, *numbers, *weight.shape[2:]))


@needs_kernels
def test_refuses_what_does_not_fit() -> None:
    x, weight, y = drawn(CASES[3], torch.float32)
    for match, call in (
        ("weight has 13 channels but x has 5", lambda: _chwn.conv(x[:5], weight, 2, 1)),
        ("x must be float32 or float64", lambda: _chwn.conv(x.half(), weight.half(), 2, 1)),
        ("weight must have the dtype of", lambda: _chwn.conv(x, weight.double(), 2, 1)),
        ("x must be a CPU tensor of 4 dimensions", lambda: _chwn.conv(x[0], weight, 2, 1)),
        ("x is empty", lambda: _chwn.conv(x[..., :0], weight, 2, 1)),
        ("stride is 0", lambda: _chwn.conv(x, weight, 0, 1)),
        ("a map of 3 with padding 0 is smaller than the kernel, 4", lambda: _chwn.conv(x[:, :3], weight, 1, 0)),
        (r"y must be \[9, 3, 3, 33\]", lambda: _chwn.conv_input(y, weight, 2, 1, (7, 7))),
        (r"y must be \[9, 4, 4, 32\]", lambda: _chwn.conv_weight(y, x[..., :32], 2, 1, (4, 4))),
    ):
        with pytest.raises(ValueError, match=match):
            call()


# ---- BatchNorm of rows ----


def rows(n: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """x [3, n] far from 0, weight and bias."""
    return 10 + torch.randn(3, n, dtype=dtype), torch.randn(3, dtype=dtype), torch.randn(3, dtype=dtype)


@pytest.mark.parametrize("n", [2, 31, 32, 33, 70])
def test_norm_has_all_gradients_twice(n: int) -> None:
    x, weight, bias = (t.requires_grad_() for t in rows(n))
    for form, inputs in (
        (lambda x, w, b: _chwn.norm(x, w, b, 1e-5)[0], (x, weight, bias)),
        (lambda x: _chwn.norm(x, None, None, 1e-5)[0], (x,)),
    ):
        assert torch.autograd.gradcheck(form, inputs)
        assert torch.autograd.gradgradcheck(form, inputs)


@pytest.mark.parametrize("momentum", [0.1, 0.0, None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_norm_is_torch_s_batchnorm(dtype: torch.dtype, momentum: float | None) -> None:
    """Three batches of other sizes, running statistics and counts; in eval mode; and the same bits on any threads."""
    x, weight, bias = rows(16385, dtype)
    ours, theirs = (nn.BatchNorm2d(3, momentum=momentum, dtype=dtype) for _ in range(2))
    for layer in (ours, theirs):
        layer.load_state_dict({**layer.state_dict(), "weight": weight, "bias": bias})
    for n in (5, 16385, 64):
        maps = x[:, :n, None, None]
        torch.testing.assert_close(
            batch_last.norm(ours, maps), theirs(maps.permute(3, 0, 1, 2)).permute(1, 2, 3, 0), rtol=1e-5, atol=1e-5
        )
    for a, b in zip(ours.buffers(), theirs.buffers(), strict=True):
        torch.testing.assert_close(a, b)
    ours.eval()
    theirs.eval()
    torch.testing.assert_close(batch_last.norm(ours, maps)[None, :, :, 0, 0], theirs(maps[None, ..., 0])[..., 0])
    if _chwn.available:
        torch.set_num_threads(1)
        want = _chwn.norm(x, weight, bias, 1e-5)
        torch.set_num_threads(3)
        assert all(map(torch.equal, want, _chwn.norm(x, weight, bias, 1e-5)))
    with pytest.raises(ValueError, match="more than 1 value"):
        batch_last.norm(ours.train(), x[:, :1, None, None])


def test_opcheck_of_norm(opcheck: Callable) -> None:
    x, weight, bias = rows(33, torch.float32)
    y, mean, _, r = _chwn._norm_op(x, weight, bias, 1e-5)
    opcheck(_chwn._norm_op, (x, weight, bias, 1e-5))
    opcheck(_chwn._norm_op, (x[:, ::2], None, None, 1e-5))
    opcheck(_chwn._norm_backward_op, (y, x, weight, mean, r))
    opcheck(_chwn._norm_twice_op, (y, bias, bias, y, x, weight, mean, r))


@needs_kernels
def test_norm_refuses_what_does_not_fit() -> None:
    x, weight, bias = rows(5, torch.float32)
    for match, call in (
        ("x must be float32 or float64", lambda: _chwn.norm(x.half(), None, None, 1e-5)),
        ("weight must be a CPU tensor with a number for each row of x", lambda: _chwn.norm(x, weight[:2], bias, 1e-5)),
        ("bias must have the dtype of x", lambda: _chwn.norm(x, weight, bias.double(), 1e-5)),
        (r"x must be a CPU tensor \[C, L\], not empty", lambda: _chwn.norm(x[0], weight, bias, 1e-5)),
    ):
        with pytest.raises(ValueError, match=match):
            call()


# ---- the other instruction sets ----


@needs_kernels
@pytest.mark.skipif("FASTCL_INNER" in os.environ, reason="runs itself")
@pytest.mark.parametrize("level", ["avx2", "baseline"])
def test_on_lower_instruction_sets(level: str) -> None:
    """The values again; this CPU's own, the widest, are what all other tests run on."""
    environment = {**os.environ, "FASTCL_CPU": level, "FASTCL_INNER": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "equals_torch or norm_is or stay"]
    done = subprocess.run([*command, __file__], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert " passed" in done.stdout


# ---- the networks ----


def by_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_chwn, "available", False)


def outcome(call: Callable[[], Tensor], params: list[nn.Parameter]) -> list[Tensor]:
    loss = call()
    return [loss.detach(), *torch.autograd.grad(loss, params, allow_unused=True, materialize_grads=True)]


@needs_kernels
@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 9, 12)])
def test_a_discriminator_s_losses_and_gradients_stay(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int, int], norm: bool
) -> None:
    """The gradient penalty's second derivatives too, through BatchNorm; running statistics; and in eval mode."""
    found = []
    for change in (lambda _: None, by_torch):
        change(monkeypatch)
        torch.manual_seed(1)
        critic = Discriminator(shape, 3, 4, norm=norm).double()
        real, fake, y = torch.rand(5, *shape).double(), torch.rand(5, *shape).double(), torch.tensor([0, 1, 2, 1, 0])
        assert batch_last.fits(critic, real) == (change is not by_torch)

        def loss(critic: Any = critic, real: Tensor = real, fake: Tensor = fake, y: Tensor = y) -> Tensor:
            torch.manual_seed(2)
            value, logits = critic.judge(fake)
            return critic_loss(critic, real, fake, 10.0) + F.cross_entropy(logits, y) + value.square().sum()

        found.append([*outcome(loss, [*critic.parameters()]), *(b.double() for b in critic.buffers())])
        found[-1].append(critic.eval()(real).detach())
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


@needs_kernels
@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 9, 12)])
@pytest.mark.parametrize("kind", ["dcgan", "weight", "unit", "pre_norm"])
def test_a_generator_s_images_and_gradients_stay(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int, int], kind: str
) -> None:
    found = []
    for change in (lambda _: None, by_torch):
        change(monkeypatch)
        torch.manual_seed(1)
        y = torch.tensor([0, 2, 1, 2])
        if kind == "dcgan":
            generator: nn.Module = DCGAN(shape, 3, 3, 8).double()
            z: tuple[Tensor, ...] = (torch.randn(4, 8, dtype=torch.float64), y)
        else:
            mask, position = ("unit", "pre_norm") if kind == "pre_norm" else (kind, "activation")
            generator = DynamicGenerator(shape, 3, mask, 3, 8, mask_position=position)
            generator.begin_task([0, 1, 2])
            generator.double().set_scale(2.0)
            with torch.no_grad():
                for layer in generator.layers:
                    layer.embedding.normal_()
            z = (generator.latents(y).double(),)
        weights = torch.rand(4, *shape).double()
        found.append(outcome(lambda: (generator(*z) * weights).sum(), [*generator.parameters()]))  # noqa: B023
        found[-1].append(generator.eval()(*z).detach())
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


@needs_kernels
def test_who_watches_the_layers_sees_them() -> None:
    """Hooks are called, so that an importance pass finds every layer; autocast, torch.func, torch.compile likewise."""
    critic, x = Discriminator((1, 12, 12), 3, 4).eval(), torch.rand(4, 1, 12, 12)
    assert batch_last.fits(critic, x)
    want = critic(x)
    seen: list[str] = []
    handle = critic.trunk[0].register_forward_hook(lambda *_: seen.append("seen"))
    assert not batch_last.fits(critic, x)
    torch.testing.assert_close(critic(x), want)
    assert seen == ["seen"]
    handle.remove()
    for watch in (nn.modules.module.register_module_forward_hook, critic.trunk.register_full_backward_pre_hook):
        handle = watch(lambda *_: None)
        assert not batch_last.fits(critic, x)
        handle.remove()
    assert batch_last.fits(critic, x)
    with torch.autocast("cpu", torch.bfloat16):
        assert not batch_last.fits(critic, x)
    torch.testing.assert_close(torch.func.vmap(lambda x: critic(x[None])[0])(x), want, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.compile(critic, backend="eager", fullgraph=True)(x), want, rtol=1e-4, atol=1e-5)
    y = torch.tensor([0, 1, 2, 0])
    names = {name for name, p in critic.named_parameters() if "critic" not in name}
    fisher = fastcl.fisher_diagonal(critic, [(x, y)])
    for n in range(4):
        loss = F.cross_entropy(critic(x[n : n + 1]), y[n : n + 1])
        for name, g in zip(names, torch.autograd.grad(loss, [critic.get_parameter(k) for k in names]), strict=True):
            fisher[name] = fisher[name] - g.square() / 4
    for name in names:
        assert fisher[name].abs().max() < 1e-6
