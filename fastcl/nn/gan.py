"""Generators and discriminators of convolutions, and the Wasserstein loss with gradient penalty."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import batch_last


def upsamplings(input_shape: Sequence[int]) -> int:
    """How often 4 x 4 is doubled until the image fits: 3 for 28 x 28 and 32 x 32.

    Raises:
        ValueError: not (channels, height, width), or an image smaller than 5 x 5.
    """
    if len(input_shape) != 3 or min(input_shape) < 1 or max(input_shape[1:]) < 5:
        raise ValueError(f"input_shape is {tuple(input_shape)} but must be (channels, height, width) from 5 x 5 on")
    return math.ceil(math.log2(max(input_shape[1:]) / 4))


def crop(x: Tensor, input_shape: Sequence[int]) -> Tensor:
    """The middle of images that a generator made in a power of two.

    Args:
        x: [N, C, H, W], at least as high and wide.
        input_shape: (channels, height, width) wanted.

    Example:
        >>> crop(torch.zeros(2, 1, 32, 32), (1, 28, 28)).shape
        torch.Size([2, 1, 28, 28])
    """
    top, left = ((a - b) // 2 for a, b in zip(x.shape[2:], input_shape[1:], strict=True))
    return x[:, :, top : top + input_shape[1], left : left + input_shape[2]]


class ConditionalBatchNorm2d(nn.Module):
    r"""BatchNorm whose scale and shift are the class's own (de Vries et al. 2017; MeRGAN's generator).

    Args:
        features: C. n_classes: K; 1 is the ordinary BatchNorm.

    Example:
        >>> fastcl.nn.ConditionalBatchNorm2d(8, 10)(torch.randn(2, 8, 4, 4), torch.tensor([3, 7])).shape
        torch.Size([2, 8, 4, 4])
    """

    def __init__(self, features: int, n_classes: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(features, affine=False)
        self.scale, self.shift = nn.Embedding(n_classes, features), nn.Embedding(n_classes, features)
        # drawn, not 1 and 0: the classes differ from the first step on
        nn.init.normal_(self.scale.weight, 1.0, 0.3)
        nn.init.normal_(self.shift.weight, 0.0, 0.5)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """x [N, C, H, W] of the classes y [N]."""
        scale, shift = (table(y)[:, :, None, None] for table in (self.scale, self.shift))
        return torch.addcmul(shift, scale, self.norm(x))

    def chwn(self, x: Tensor, y: Tensor) -> Tensor:
        """The same of x [C, H, W, N]."""
        scale, shift = (table(y).t()[:, None, None, :] for table in (self.scale, self.shift))
        return torch.addcmul(shift, scale, batch_last.norm(self.norm, x))


class DCGAN(nn.Module):
    r"""The DCGAN generator (Radford et al. 2016), conditional by its BatchNorms (MeRGAN, Wu et al. 2018).

    z [N, D] as D x 1 x 1, transposed convolutions to 4 x 4, 8 x 8, ..., each followed by BatchNorm and ReLU, and a last
    one with tanh; no biases. Images in [0, 1].

    Args:
        input_shape: of an image; what is no power of two is cut from the middle of one.
        n_classes: 1 for a generator that knows no classes.
        width: w: the maps have 4w, 2w, w channels (fewer of them for images below 32 x 32).
        latent: D.

    Example:
        >>> fastcl.nn.DCGAN((1, 28, 28), 10).sample(torch.tensor([0, 9])).shape
        torch.Size([2, 1, 28, 28])
    """

    def __init__(self, input_shape: Sequence[int], n_classes: int = 1, width: int = 16, latent: int = 64) -> None:
        super().__init__()
        self.input_shape, self.latent, self.n_classes = tuple(input_shape), latent, n_classes
        channels = [4 * width // 2**i for i in range(upsamplings(input_shape))]
        before = [latent, *channels]
        self.layers = nn.ModuleList(
            nn.ConvTranspose2d(a, b, 4, 1 if i == 0 else 2, 0 if i == 0 else 1, bias=False)
            for i, (a, b) in enumerate(zip(before, channels, strict=False))
        )
        self.norms = nn.ModuleList(ConditionalBatchNorm2d(c, n_classes) for c in channels)
        self.output = nn.ConvTranspose2d(channels[-1], input_shape[0], 4, 2, 1, bias=False)

    def forward(self, z: Tensor, y: Tensor) -> Tensor:
        """Images [N, *input_shape] of the classes y [N]."""
        if batch_last.fits(self, z):
            return self._chwn(z, y)
        x = z[:, :, None, None]
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = norm(layer(x), y).relu()
        return crop((self.output(x).to(z.dtype).tanh() + 1) / 2, self.input_shape)

    def _chwn(self, z: Tensor, y: Tensor) -> Tensor:
        x = z.t()[:, None, None, :]
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = norm.chwn(batch_last.transposed(x, layer.weight, layer.stride[0], layer.padding[0]), y).relu()
        x = batch_last.to_images(batch_last.transposed(x, self.output.weight, 2, 1))
        return (crop(x, self.input_shape).tanh() + 1) / 2

    @torch.no_grad()
    def sample(self, y: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """An image of each of the classes y, in eval mode, 1024 at a time."""
        training = self.training
        self.eval()
        try:
            device = self.output.weight.device
            z = torch.randn(len(y), self.latent, generator=generator).to(device)
            return torch.cat([self(a, b) for a, b in zip(z.split(1024), y.to(device).split(1024), strict=True)])
        finally:
            self.train(training)


class Discriminator(nn.Module):
    """AC-GAN's discriminator (Odena et al. 2017) as DGM and MeRGAN have it: one trunk, a critic and a class head.

    Convolutions 5 x 5 to w, 2w, 4w channels with stride 2 down to 4 x 4, LeakyReLU .2, BatchNorm after the second and
    third.

    Args:
        input_shape: of an image in [0, 1].
        n_classes: of the class head; 0 for a critic alone.
        width: w, 32 in DGM.
        norm: False leaves the BatchNorms out.

    Example:
        >>> critic, logits = fastcl.nn.Discriminator((1, 28, 28), 10).judge(torch.zeros(2, 1, 28, 28))
        >>> critic.shape, logits.shape
        (torch.Size([2]), torch.Size([2, 10]))
    """

    def __init__(self, input_shape: Sequence[int], n_classes: int, width: int = 32, norm: bool = True) -> None:
        super().__init__()
        channels, height, size = input_shape
        layers: list[nn.Module] = []
        for i in range(3):
            after, stride = width * 2**i, 2 if max(height, size) > 4 else 1
            layers.append(nn.Conv2d(channels, after, 5, stride, 2))
            if norm and i:
                layers.append(nn.BatchNorm2d(after))
            layers.append(nn.LeakyReLU(0.2))
            channels, height, size = after, -(-height // stride), -(-size // stride)
        self.trunk = nn.Sequential(*layers, nn.Flatten())
        self.critic = nn.Linear(channels * height * size, 1)
        self.classes = nn.Linear(channels * height * size, n_classes) if n_classes else nn.Identity()

    def _features(self, x: Tensor) -> Tensor:
        x = 2 * x - 1
        return batch_last.run(self.trunk, x) if batch_last.fits(self, x) else self.trunk(x)

    def judge(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The critic's value [N] and the logits [N, classes]."""
        features = self._features(x)
        return self.critic(features).squeeze(1).to(x.dtype), self.classes(features).to(x.dtype)

    def value(self, x: Tensor) -> Tensor:
        """The critic's value [N]."""
        return self.critic(self._features(x)).squeeze(1).to(x.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """The logits [N, classes]."""
        return self.classes(self._features(x)).to(x.dtype)

    def reset_parameters(self) -> None:
        """All weights anew, in place (DGM begins every task so)."""
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear, nn.BatchNorm2d)):
                module.reset_parameters()


class FeatureGenerator(nn.Module):
    """Features instead of images: z and the one-hot class through Linear layers to ReLU features [N, F].

    Args:
        features: F. n_classes: K. hidden: width of the two layers between. latent: D.

    Example:
        >>> fastcl.nn.FeatureGenerator(400, 10).sample(torch.tensor([3, 7])).shape
        torch.Size([2, 400])
    """

    def __init__(self, features: int, n_classes: int, hidden: int = 256, latent: int = 64) -> None:
        super().__init__()
        self.latent, self.n_classes = latent, n_classes
        self.layers = nn.Sequential(
            nn.Linear(latent + n_classes, hidden),
            nn.LeakyReLU(0.2),
            nn.Linear(hidden, hidden),
            nn.LeakyReLU(0.2),
            nn.Linear(hidden, features),
            nn.ReLU(),
        )

    def forward(self, z: Tensor, y: Tensor) -> Tensor:
        """Features of the classes y [N] from z [N, D]."""
        return self.layers(torch.cat([z, F.one_hot(y, self.n_classes).to(z.dtype)], 1))

    def sample(self, y: Tensor) -> Tensor:
        """Features of each class y [N]; differentiable."""
        return self(torch.randn(len(y), self.latent).to(self.layers[0].weight.device), y)


class FeatureCritic(nn.Module):
    """:class:`Discriminator` for features [N, F]: Linear layers instead of convolutions.

    Example:
        >>> fastcl.nn.FeatureCritic(400, 10).value(torch.zeros(2, 400)).shape
        torch.Size([2])
    """

    def __init__(self, features: int, n_classes: int, hidden: int = 256) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            nn.Linear(features, hidden), nn.LeakyReLU(0.2), nn.Linear(hidden, hidden), nn.LeakyReLU(0.2)
        )
        self.critic, self.classes = nn.Linear(hidden, 1), nn.Linear(hidden, n_classes)

    def judge(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The critic's value [N] and the logits [N, classes]."""
        h = self.trunk(x)
        return self.critic(h).squeeze(1), self.classes(h)

    def value(self, x: Tensor) -> Tensor:
        """The critic's value [N]."""
        return self.critic(self.trunk(x)).squeeze(1)


def critic_loss(
    discriminator: Discriminator | FeatureCritic, real: Tensor, fake: Tensor, penalty: float, unit: float = 0.5
) -> Tensor:
    r"""WGAN-GP's (Gulrajani et al. 2017): what a critic step descends.

    .. math:: E\,D(fake) - E\,D(real) + \lambda\,E(\lVert\nabla_{\hat x} D(\hat x)\rVert_2 - 1)^2

    with :math:`\hat x` between real and fake; the norm is over all pixels of an image.

    Args:
        real, fake: [N, ...], as many of each.
        penalty: lambda; 1 in DGM, 10 in MeRGAN.
        unit: by which slopes are multiplied: 0.5 for images that are in [0, 1] here and in [-1, 1] in the papers.

    Raises:
        ValueError: different shapes, or a negative penalty.

    Example:
        >>> images = torch.rand(4, 1, 8, 8); critic = Discriminator((1, 8, 8), 2)
        >>> critic_loss(critic, images, images, penalty=10.0).item() >= 0
        True
    """
    if real.shape != fake.shape:
        raise ValueError(f"fake has shape {list(fake.shape)} but must have real's, {list(real.shape)}")
    if not penalty >= 0:
        raise ValueError(f"penalty is {penalty} but must not be negative")
    share = torch.rand(len(real), *[1] * (real.dim() - 1), dtype=real.dtype, device=real.device)
    between = torch.lerp(real, fake, share).requires_grad_()
    (slope,) = torch.autograd.grad(discriminator.value(between).sum(), between, create_graph=True)
    norm = (unit * slope.flatten(1)).norm(dim=1)
    return discriminator.value(fake).mean() - discriminator.value(real).mean() + penalty * (norm - 1).square().mean()


class WGAN(nn.Module):
    """A generator that knows no classes and its critic (WGAN-GP), as :class:`DGR` replays from it.

    Args:
        input_shape: of an image in [0, 1].
        width: of the generator. critic_width: of the critic. latent: D.
        penalty: of the gradient.

    Example:
        >>> fastcl.nn.WGAN((1, 28, 28)).sample(2).shape
        torch.Size([2, 1, 28, 28])
    """

    def __init__(
        self,
        input_shape: Sequence[int],
        width: int = 16,
        critic_width: int = 16,
        latent: int = 64,
        penalty: float = 10.0,
    ) -> None:
        super().__init__()
        self.input_shape, self.penalty = tuple(input_shape), penalty
        self.generator = DCGAN(input_shape, 1, width, latent)
        self.critic = Discriminator(input_shape, 0, critic_width, norm=False)

    def _made(self, n: int) -> Tensor:
        device = self.generator.output.weight.device
        return self.generator(
            torch.randn(n, self.generator.latent, device=device), torch.zeros(n, dtype=torch.int64, device=device)
        )

    def critic_loss(self, x: Tensor) -> Tensor:
        """What the critic descends on images x [N, ...].

        Example:
            >>> images = torch.rand(4, 1, 8, 8); critic = Discriminator((1, 8, 8), 2)
            >>> critic_loss(critic, images, images, penalty=10.0).item() >= 0
            True
        """
        with torch.no_grad():
            fake = self._made(len(x))
        return critic_loss(self.critic, x, fake, self.penalty)

    def generator_loss(self, n: int) -> Tensor:
        """What the generator descends, on n of its images."""
        with frozen(self.critic):
            return -self.critic.value(self._made(n)).mean()

    @torch.no_grad()
    def sample(self, n: int) -> Tensor:
        """n images in [0, 1]."""
        return self.generator.sample(torch.zeros(n, dtype=torch.int64))


@contextmanager
def fixed_statistics(module: nn.Module) -> Iterator[None]:
    """Training-mode BatchNorms of `module` leave their running statistics alone inside.

    For forward passes on images that the network will not be asked about: a critic's fakes and mixtures.

    Example:
        >>> norm = nn.BatchNorm2d(1)
        >>> with fixed_statistics(norm): y = norm(torch.ones(2, 1, 2, 2))
        >>> norm.running_mean
        tensor([0.])
    """
    norms = [m for m in module.modules() if isinstance(m, nn.BatchNorm2d)]
    saved = [(m.momentum, m.num_batches_tracked.clone()) for m in norms]
    try:
        for m in norms:
            m.momentum = 0.0
        yield
    finally:
        for m, (momentum, count) in zip(norms, saved, strict=True):
            m.momentum = momentum
            m.num_batches_tracked.copy_(count)


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """No gradients for `module`'s parameters inside: a generator's step needs the discriminator's inputs' only.

    Example:
        >>> with frozen(model): model[0].weight.requires_grad
        False
    """
    params = [p for p in module.parameters() if p.requires_grad]
    try:
        for p in params:
            p.requires_grad_(False)
        yield
    finally:
        for p in params:
            p.requires_grad_(True)


def class_loss(logits: Tensor, y: Tensor, classes: Sequence[int]) -> Tensor:
    """Cross-entropy over the columns `classes` alone.

    Args:
        logits: [N, C].
        y: labels [N], among `classes`.
        classes: the columns that compete.

    Example:
        >>> class_loss(torch.zeros(1, 10), torch.tensor([7]), [3, 7])
        tensor(0.6931)
    """
    columns = torch.tensor(sorted(classes), device=y.device)
    return F.cross_entropy(logits[:, columns], torch.searchsorted(columns, y))
