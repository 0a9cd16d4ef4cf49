"""Expectation maximisation on gmm kernels: start, step, and the parameters between them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import ops

COVARIANCES = ("full", "tied", "diag", "spherical")
# a component with less than this much of the data has no covariance worth the name
EMPTY = 10 * torch.finfo(torch.float64).eps


@dataclass
class Mixture:
    """weights [K], means [K, D], scale_trils [K, D, D], [K, D] or [K]: what the kernels take."""

    weights: Tensor
    means: Tensor
    scale_trils: Tensor

    def log_joint(self, x: Tensor) -> Tensor:
        """log w_k + log N(x | k), [N, K]."""
        return ops.gmm_log_prob(x, self.means, self.scale_trils) + self.weights.log()


@dataclass
class Moments:
    """s0 [K], s1 [K, D], s2 [K, D, D] or [K, D] about `centers`, in float64: they add up over batches."""

    s0: Tensor
    s1: Tensor
    s2: Tensor
    centers: Tensor

    def moved(self, centers: Tensor) -> Moments:
        """The same moments about other centres."""
        by = self.centers - centers
        s1 = self.s1 + self.s0.unsqueeze(1) * by
        if self.s2.dim() == 3:
            cross = self.s1.unsqueeze(2) * by.unsqueeze(1)
            s2 = self.s2 + cross + cross.mT + self.s0[:, None, None] * by.unsqueeze(2) * by.unsqueeze(1)
        else:
            s2 = self.s2 + 2 * self.s1 * by + self.s0.unsqueeze(1) * by.square()
        return Moments(self.s0, s1, s2, centers)

    def blended(self, other: Moments, share: float, mine: float) -> Moments:
        """`mine` of these and `share` of the others', about these centres."""
        other = other.moved(self.centers)
        pairs = ((self.s0, other.s0), (self.s1, other.s1), (self.s2, other.s2))
        return Moments(*(mine * a + share * b for a, b in pairs), self.centers)


def moments(x: Tensor, responsibilities: Tensor, centers: Tensor, covariance: str) -> Moments:
    full = covariance in ("full", "tied")
    return Moments(*ops.gmm_statistics(x, responsibilities, centers, full=full), centers.double())


def class_moments(x: Tensor, labels: Tensor, centers: Tensor, covariance: str) -> Moments:
    full = covariance in ("full", "tied")
    return Moments(*ops.gmm_class_statistics(x, labels, centers, full=full), centers.double())


def maximised(m: Moments, covariance: str, reg_covar: float, dtype: torch.dtype) -> Mixture:
    """The M-step. A component without data keeps its centre and takes the covariance of all the data."""
    total = m.s0.sum()
    empty = m.s0 <= EMPTY * total
    count = torch.where(empty, 1.0, m.s0)
    shift = torch.where(empty.unsqueeze(1), 0.0, m.s1 / count.unsqueeze(1))
    if m.s2.dim() == 3:
        spread = m.s2 - count[:, None, None] * shift.unsqueeze(2) * shift.unsqueeze(1)
        pooled = torch.where(empty[:, None, None], 0.0, spread).sum(0) / total
        cov = torch.where(empty[:, None, None], pooled, spread / count[:, None, None])
        if covariance == "tied":
            cov = pooled.expand_as(cov)
        scale = cholesky(cov, reg_covar)
    else:
        spread = m.s2 - count.unsqueeze(1) * shift.square()
        pooled = torch.where(empty.unsqueeze(1), 0.0, spread).sum(0) / total
        variance = torch.where(empty.unsqueeze(1), pooled, spread / count.unsqueeze(1)).clamp(min=0)
        if covariance == "spherical":
            variance = variance.mean(1)
        scale = (variance + reg_covar).sqrt().clamp(min=torch.finfo(dtype).tiny ** 0.5)
    weights = (m.s0 + EMPTY * total) / (total * (1 + len(m.s0) * EMPTY))
    return Mixture(weights.to(dtype), (m.centers + shift).to(dtype), scale.to(dtype))


def cholesky(covariances: Tensor, reg_covar: float) -> Tensor:
    """Factors of covariances + reg_covar I; what rounding has made indefinite gets ten times more until it is not."""
    diagonal = covariances.diagonal(dim1=1, dim2=2)
    scale = diagonal.mean(1).clamp(min=torch.finfo(covariances.dtype).tiny)
    jitter = torch.full_like(scale, reg_covar)
    eye = torch.eye(covariances.shape[1], dtype=covariances.dtype, device=covariances.device)
    for _ in range(20):
        factors, failed = torch.linalg.cholesky_ex(covariances + jitter[:, None, None] * eye)
        bad = (failed > 0) | ~(factors.diagonal(dim1=1, dim2=2) > 0).all(1)
        if not bad.any():
            return factors
        jitter = torch.where(bad, torch.maximum(10 * jitter, 1e-15 * scale), jitter)
    raise ValueError("x: a covariance is NaN or infinite")


def refilled(mixture: Mixture, m: Moments, x: Tensor, log_density: Tensor) -> Mixture:
    """Components that have lost all their samples start again at the samples that the mixture explains worst."""
    empty = (m.s0 <= EMPTY * m.s0.sum()).nonzero().flatten()
    if len(empty):
        worst = log_density.argsort()[: len(empty)]
        mixture.means[empty[: len(worst)]] = x[worst].to(mixture.means.dtype)
        mixture.weights[empty] = 1 / len(x)
        mixture.weights /= mixture.weights.sum()
    return mixture


def kmeans(x: Tensor, k: int, generator: torch.Generator | None, steps: int = 30) -> Tensor:
    """Labels [N] of k-means++ seeding (Arthur & Vassilvitskii 2007) and Lloyd's iterations."""
    n = len(x)
    first = int(torch.randint(n, (1,), generator=generator).item())
    centers = x[first : first + 1]
    nearest = (x - centers[0]).square().sum(1)
    for _ in range(1, k):
        # some library's greedy form: of a few candidates, the one that lowers the total distance most
        share = nearest.double().clamp(min=0)
        if not share.sum() > 0:
            share = torch.ones_like(share)  # all samples are centres already
        tries = 2 + int(math.log(k))
        cumulative = share.cumsum(0)
        drawn = torch.rand(tries, generator=generator, dtype=torch.float64).to(x.device) * cumulative[-1]
        found = torch.searchsorted(cumulative, drawn).clamp(max=n - 1)
        distances = torch.minimum(_squares(x, x[found]), nearest.unsqueeze(1))
        best = int(distances.sum(0, dtype=torch.float64).argmin())
        centers, nearest = torch.cat([centers, x[found[best] : found[best] + 1]]), distances[:, best]
    labels = _squares(x, centers).argmin(1)
    for _ in range(steps):
        s0, s1, _ = ops.gmm_class_statistics(x, labels, centers, full=False)
        moved = centers + (s1 / s0.clamp(min=1).unsqueeze(1)).to(x.dtype)
        following = _squares(x, moved).argmin(1)
        if torch.equal(following, labels):
            break
        centers, labels = moved, following
    return labels


def _squares(x: Tensor, centers: Tensor) -> Tensor:
    """Squared distances [N, K]."""
    return torch.cdist(x, centers).square()


def usable(name: str, t: Tensor | None) -> bool:
    """Whether a saved buffer can be a mixture's: finite, scales above 0, weights not below."""
    if t is None or not t.is_floating_point():
        return True
    scales = t.diagonal(dim1=1, dim2=2) if t.dim() == 3 else t
    low = {"scale_trils": bool((scales > 0).all()), "weights": bool((t >= 0).all())}
    return bool(t.isfinite().all()) and low.get(name, True)
