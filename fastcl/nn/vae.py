"""Variational autoencoders: with a standard normal prior, and with one Gaussian for each class."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import ops
from .grow import grow
from .mixture import GaussianMixture
from .mlp import mlp


class VAE(nn.Module):
    r"""The literature's VAE of perceptrons (Kingma & Welling 2014; Shin et al. 2017): ReLU, z standard normal.

    Args:
        input_shape: of an image in [0, 1]; p(x|z) is Bernoulli.
        hidden: widths of the encoder; the decoder has them in reverse.
        latent: D.
        beta: weight of the KL: below 1 for images of few pixels, whose variety 1 loses (8 x 8 digits).

    Raises:
        ValueError: a beta that is negative or not finite.

    Example:
        >>> fastcl.nn.VAE((1, 28, 28)).sample(3).shape
        torch.Size([3, 1, 28, 28])
    """

    def __init__(
        self, input_shape: Sequence[int], hidden: Sequence[int] = (400, 400), latent: int = 100, beta: float = 1.0
    ) -> None:
        super().__init__()
        if not 0 <= beta < math.inf:
            raise ValueError(f"beta is {beta} but must be finite and not negative")
        self.input_shape, self.beta = tuple(input_shape), beta
        encoder = mlp(input_shape, hidden[:-1], hidden[-1])
        self.encoder = nn.Sequential(encoder, nn.ReLU())
        self.mean, self.log_var = nn.Linear(hidden[-1], latent), nn.Linear(hidden[-1], latent)
        self.decoder = mlp((latent,), tuple(reversed(hidden)), math.prod(input_shape))

    def loss(self, x: Tensor) -> Tensor:
        """Mean over the batch of reconstruction and beta KL, in nats."""
        return self._elbo(x, self.encoder(x), x.new_empty(len(x), 0))

    def _elbo(self, x: Tensor, h: Tensor, told: Tensor) -> Tensor:
        """From the encoder's features h; `told` is what the decoder gets beside z."""
        mean, log_var = self.mean(h).to(x.dtype), self.log_var(h).to(x.dtype)
        z = mean + torch.randn_like(mean) * (0.5 * log_var).exp()
        logits = self.decoder(torch.cat([z, told], 1)).to(x.dtype)
        reconstruction = F.binary_cross_entropy_with_logits(logits, x.flatten(1), reduction="sum")
        divergence = -0.5 * (1 + log_var - mean.square() - log_var.exp()).sum()
        return (reconstruction + self.beta * divergence) / len(x)

    @torch.no_grad()
    def sample(self, n: int) -> Tensor:
        """n images in [0, 1]."""
        z = torch.randn(n, self.mean.out_features, device=self.mean.weight.device)
        return self.decoder(z).sigmoid().view(n, *self.input_shape)


class ConditionalVAE(VAE):
    r"""A :class:`VAE` that is told the class: one-hot beside the encoder's features and beside z (Sohn et al. 2015).

    Args:
        input_shape, hidden, latent, beta: as for :class:`VAE`.
        n_classes: K.

    Example:
        >>> fastcl.nn.ConditionalVAE((1, 28, 28), 10).sample(torch.tensor([3, 7])).shape
        torch.Size([2, 1, 28, 28])
    """

    def __init__(
        self,
        input_shape: Sequence[int],
        n_classes: int,
        hidden: Sequence[int] = (400, 400),
        latent: int = 100,
        beta: float = 1.0,
    ) -> None:
        super().__init__(input_shape, hidden, latent, beta)
        self.n_classes = n_classes
        self.mean, self.log_var = (nn.Linear(hidden[-1] + n_classes, latent) for _ in range(2))
        self.decoder = mlp((latent + n_classes,), tuple(reversed(hidden)), math.prod(input_shape))

    def loss(self, x: Tensor, y: Tensor) -> Tensor:  # type: ignore[override]
        """As :meth:`VAE.loss`; y are the classes [N]."""
        told = F.one_hot(y, self.n_classes).to(x.dtype)
        return self._elbo(x, torch.cat([self.encoder(x), told], 1), told)

    @torch.no_grad()
    def sample(self, y: Tensor) -> Tensor:  # type: ignore[override]
        """An image in [0, 1] of each class y [N]."""
        z = torch.randn(len(y), self.mean.out_features, device=self.mean.weight.device)
        told = F.one_hot(y.to(z.device), self.n_classes).to(z.dtype)
        return self.decoder(torch.cat([z, told], 1)).sigmoid().view(len(y), *self.input_shape)


class GaussianVAE(nn.Module):
    r"""A class-conditional VAE with a Gaussian mixture (CLN; Kingma & Welling 2014).

    BatchNorm in the encoder only, LeakyReLU. The loss of x of class y is

    .. math:: -\log p(x|z) + \beta\,KL(q(z|x)\,\Vert\,N(m_y, S_y)),\quad z \sim q(z|x) = N(\mu(x), \sigma^2(x))

    with the class's own mean and full covariance, which :meth:`cluster` takes from the latents again and again while the
    VAE trains. Images are in [0, 1]; p(x|z) is Bernoulli.

    Args:
        encoder: maps images to features [N, F], a trunk with BatchNorm; it is copied.
        features: F.
        latent: D.
        n_classes: Gaussians; standard normals until :meth:`cluster`.
        input_shape: of an image, height and width multiples of 4.
        width: channels of the decoder's first map.

    Raises:
        ValueError: height or width that is no multiple of 4.

    Example:
        >>> net = fastcl.nn.SimpleNet((1, 28, 28), 2, width=4)
        >>> vae = fastcl.nn.GaussianVAE(net.trunk(), net.head.in_features, 6, 2, (1, 28, 28))
        >>> vae.sample(torch.tensor([0, 1, 1])).shape
        torch.Size([3, 1, 28, 28])
    """  # noqa: E501

    def __init__(
        self,
        encoder: nn.Module,
        features: int,
        latent: int,
        n_classes: int,
        input_shape: Sequence[int],
        width: int = 32,
    ) -> None:
        super().__init__()
        channels, height, size = input_shape
        if height % 4 or size % 4:
            raise ValueError(f"input_shape is {tuple(input_shape)} but height and width must be multiples of 4")
        self.encoder = copy.deepcopy(encoder)
        self.mean, self.log_var = nn.Linear(features, latent), nn.Linear(features, latent)
        self.decoder = nn.Sequential(
            nn.Linear(latent, width * (height // 4) * (size // 4)),
            nn.LeakyReLU(0.1),
            nn.Unflatten(1, (width, height // 4, size // 4)),
            nn.ConvTranspose2d(width, width, 4, 2, 1),
            nn.LeakyReLU(0.1),
            nn.ConvTranspose2d(width, channels, 4, 2, 1),
        )
        self.classes = GaussianMixture(n_classes, latent, reg_covar=1e-3)

    @property
    def latent(self) -> int:
        return self.mean.out_features

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log variance of q(z|x), [N, D] each."""
        h = self.encoder(x)
        return self.mean(h).to(x.dtype), self.log_var(h).to(x.dtype).clamp(-10, 10)

    def decode(self, z: Tensor) -> Tensor:
        """Images in [0, 1]."""
        return self.decoder(z).to(z.dtype).sigmoid()

    def loss(self, x: Tensor, y: Tensor, beta: float = 1.0) -> Tensor:
        """Mean over the batch of reconstruction and KL in nats; y are the Gaussians' indices."""
        mean, log_var = self.encode(x)
        z = mean + torch.randn_like(mean) * (0.5 * log_var).exp()
        reconstruction = F.binary_cross_entropy_with_logits(self.decoder(z).to(x.dtype), x, reduction="sum") / len(x)
        return reconstruction + beta * self.divergence(mean, log_var, y).mean()

    def divergence(self, mean: Tensor, log_var: Tensor, y: Tensor) -> Tensor:
        """KL(N(mean, exp(log_var)) || N(m_y, S_y)), [N]: -E log p = -log p(mean) + tr(S^-1 diag(var)) / 2."""
        scale = self.classes.scale_trils
        log_p = ops.gmm_log_prob(mean, self.classes.means, scale).gather(1, y.unsqueeze(1)).squeeze(1)
        inverse = torch.linalg.solve_triangular(
            scale, torch.eye(self.latent, dtype=scale.dtype, device=scale.device).expand_as(scale), upper=False
        )
        precision = inverse.square().sum(1)  # the diagonal of S^-1
        entropy = 0.5 * (log_var + 1 + math.log(2 * math.pi)).sum(1)
        return 0.5 * (precision[y] * log_var.exp()).sum(1) - log_p - entropy

    @torch.no_grad()
    def cluster(self, x: Tensor, y: Tensor) -> None:
        """Each class's Gaussian from its latents: mean and covariance of z ~ q(z|x), in one pass over the data."""
        training = self.training
        self.eval()
        try:
            parts = [self.encode(part) for part in x.split(1024)]
        finally:
            self.train(training)
        mean, log_var = (torch.cat(p) for p in zip(*parts, strict=True))
        self.classes.fit_classes(mean + torch.randn_like(mean) * (0.5 * log_var).exp(), y)

    @torch.no_grad()
    def sample(self, classes: Tensor, generator: torch.Generator | None = None, spread: float = 1.0) -> Tensor:
        """An image of each of the given classes [N], its latents `spread` times as far from the class's mean."""
        mean = self.classes.means[classes]
        z = mean + spread * (self.classes.sample_of(classes, generator=generator) - mean)
        return torch.cat([self.decode(part) for part in z.split(1024)])

    def grow_latent(self, n: int) -> None:
        """n more latent dimensions: what is decoded stays; the classes' Gaussians are standard there."""
        grow(self, {"mean": n, "log_var": n}, plan={"mean": ("decoder.0",), "log_var": ()})
        self._widen(self.classes.n_components, self.latent)

    def grow_classes(self, n_classes: int) -> None:
        """Gaussians for more classes: standard normals until :meth:`cluster`."""
        self._widen(n_classes, self.latent)

    def _widen(self, n_classes: int, latent: int) -> None:
        old = self.classes
        new = GaussianMixture(n_classes, latent, reg_covar=old.reg_covar).to(old.means.device)
        k, d = old.means.shape
        new.means[:k, :d] = old.means
        new.scale_trils[:k, :d, :d] = old.scale_trils
        self.classes = new
