"""Contests of the mixtures, as in workloads.py."""

from __future__ import annotations

import importlib.util
import math
import warnings
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import ops
from ..nn import ConvergenceWarning, GaussianMixture, em
from .race import Call, Compiled, Contest

close = torch.testing.assert_close


def mixture(k: int, d: int, device: torch.device, full: bool = True) -> tuple[Tensor, Tensor]:
    """Means and scale_trils of k components."""
    torch.manual_seed(0)
    means = torch.randn(k, d)
    if not full:
        return means.to(device), (torch.rand(k, d) + 0.5).to(device)
    a = 0.3 * torch.randn(k, d, d)
    return means.to(device), torch.linalg.cholesky(a @ a.mT + torch.eye(d)).to(device)


def _moments_agree(contenders: dict[str, Call], labels: Tensor) -> None:
    """Two random number generators agree in distribution only: means and deviations of the first component."""
    found = {}
    for name, call in contenders.items():
        z, of = call() if name == "scikit-learn" else (call(), labels)  # it draws the labels too
        found[name] = torch.as_tensor(z).to(labels.device)[torch.as_tensor(of).to(labels.device) == 0].double()
    want = found["fastcl"]
    n, deviation = len(want), want.std(0)
    for z in found.values():
        close((z.mean(0) - want.mean(0)) / deviation, torch.zeros_like(deviation), rtol=0, atol=8 / n**0.5)
        close(z.std(0) / deviation, torch.ones_like(deviation), rtol=0, atol=8 / n**0.5)


def sampling(device: torch.device, k: int, d: int, n: int, full: bool = True) -> Contest:
    """Latents of given components."""
    means, scale = mixture(k, d, device, full)
    labels = torch.randint(0, k, (n,), device=device)

    def bucketed() -> Tensor:  # the best eager form: samples sorted by component, one GEMM each
        eps = torch.randn(n, d, device=device)
        out, order, at = torch.empty_like(eps), labels.argsort(), 0
        for c, count in enumerate(labels.bincount(minlength=k).tolist()):
            rows = order[at : at + count]
            out[rows] = torch.addmm(means[c], eps[rows], scale[c].T)
            at += count
        return out

    contenders: dict[str, Call] = {"fastcl": lambda: ops.gmm_sample(labels, means, scale)}
    if full:
        contenders["eager, bucketed GEMMs"] = bucketed
    else:
        contenders["eager, mu[y] + sd[y] * randn"] = lambda: (
            means[labels] + scale[labels] * torch.randn(n, d, device=device)
        )
    if full and d <= 32:  # [N, D, D]: 0.4 GB at D = 32, 7 GB at D = 128
        normal = torch.distributions.MultivariateNormal
        contenders["torch.distributions"] = lambda: normal(means[labels], scale_tril=scale[labels]).sample()
    if full and device.type == "cpu":
        contenders["numpy, component by component"] = _numpy_sampling(labels, means, scale)
        if importlib.util.find_spec("sklearn") is not None:
            contenders["scikit-learn"] = _sklearn_sampling(means, scale, n)
    return Contest(contenders, lambda c: _moments_agree(c, labels))


def _numpy_sampling(labels: Tensor, means: Tensor, scale: Tensor) -> Call:
    """The body of scikit-learn's GaussianMixture.sample on numpy's newer generator, for given labels."""
    order = np.argsort(labels.numpy(), kind="stable")
    counts, mu = np.bincount(labels.numpy(), minlength=len(means)), means.double().numpy()
    covariances = (scale.double() @ scale.double().mT).numpy()

    def sample() -> np.ndarray:
        rng = np.random.default_rng(0)
        z = np.vstack([rng.multivariate_normal(m, c, n) for m, c, n in zip(mu, covariances, counts, strict=True)])
        result = np.empty_like(z)
        result[order] = z
        return result

    return sample


def _sklearn_sampling(means: Tensor, scale: Tensor, n: int) -> Call:
    """Its samples come in the components' order, with their labels."""
    from sklearn.mixture import GaussianMixture as Theirs

    theirs = Theirs(len(means), random_state=0)
    theirs.weights_, theirs.means_ = np.full(len(means), 1 / len(means)), means.double().numpy()
    theirs.covariances_ = (scale.double() @ scale.double().mT).numpy()
    return lambda: theirs.sample(n)


def _log_prob(x: Tensor, means: Tensor, scale: Tensor) -> Tensor:
    d = x.shape[1]
    inverse = torch.linalg.solve_triangular(scale, torch.eye(d, device=x.device).expand_as(scale), upper=False)
    log_det = scale.diagonal(dim1=1, dim2=2).log().sum(1)
    columns = [((x - m) @ factor.T).square().sum(1) for m, factor in zip(means, inverse, strict=True)]
    return -0.5 * torch.stack(columns, 1) - log_det - 0.5 * d * math.log(2 * math.pi)


def _log_prob_diagonal(x: Tensor, means: Tensor, scale: Tensor) -> Tensor:
    precision = scale.square().reciprocal()
    squares = x.square() @ precision.T - 2 * x @ (means * precision).T + (means.square() * precision).sum(1)
    return -0.5 * squares - scale.log().sum(1) - 0.5 * x.shape[1] * math.log(2 * math.pi)


def log_prob(device: torch.device, compiled: Compiled, k: int, d: int, n: int, full: bool = True) -> Contest:
    """Log densities of samples under every component."""
    means, scale = mixture(k, d, device, full)
    x = torch.randn(n, d, device=device)

    def form() -> Tensor:
        return (_log_prob if full else _log_prob_diagonal)(x, means, scale)

    contenders: dict[str, Call] = {
        "fastcl": lambda: ops.gmm_log_prob(x, means, scale),
        "eager GEMMs": form,
        **compiled(form),
    }
    if k * d <= 1280:
        factors = scale if full else torch.diag_embed(scale)
        normal = torch.distributions.MultivariateNormal(means, scale_tril=factors)
        contenders["MultivariateNormal.log_prob"] = lambda: normal.log_prob(x.unsqueeze(1))

    def check(contenders: dict[str, Call]) -> None:
        want = contenders["fastcl"]()
        for call in contenders.values():
            close(call(), want, rtol=1e-3, atol=1e-2)

    return Contest(contenders, check)


def em_iteration(device: torch.device, k: int, d: int, n: int, full: bool = True) -> Contest:
    """One E-step and one M-step, against the same in torch and in scikit-learn (in float64, which is all it has)."""
    kind = "full" if full else "diag"
    torch.manual_seed(0)
    x = (torch.randn(n, d) + 3 * torch.randn(k, d)[torch.randint(0, k, (n,))]).to(device)
    gmm = GaussianMixture(k, covariance=kind, max_iter=2, tol=0.0, random_state=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # two iterations are a start, not a fit
        gmm.fit(x)
    start = gmm._mixture()

    def fused() -> Tensor:
        return gmm._step(x, em.Mixture(*(t.clone() for t in vars(start).values())))[0].means

    def eager() -> Tensor:
        density = (_log_prob if full else _log_prob_diagonal)(x, start.means, start.scale_trils)
        shares = torch.softmax(density + start.weights.log(), 1)
        s0 = shares.sum(0)
        means = shares.T @ x / s0[:, None]
        if not full:
            variances = shares.T @ x.square() / s0[:, None] - means.square() + gmm.reg_covar
            return em.Mixture(s0 / n, means, variances.sqrt()).means
        centred = [x - m for m in means]
        covariances = torch.stack([(c * r[:, None]).T @ c for c, r in zip(centred, shares.T, strict=True)])
        covariances = covariances / s0[:, None, None] + gmm.reg_covar * torch.eye(d, device=device)
        return em.Mixture(s0 / n, means, torch.linalg.cholesky(covariances)).means

    contenders: dict[str, Call] = {"fastcl": fused, "eager torch": eager}
    if device.type == "cpu" and importlib.util.find_spec("sklearn") is not None:
        contenders["scikit-learn"] = _sklearn_step(x, start, kind)
    # it does not regularise: with 100 components of 128 dimensions its covariances become singular
    if device.type == "cpu" and full and k * d <= 3200 and importlib.util.find_spec("pomegranate") is not None:
        contenders["pomegranate"] = _pomegranate_step(x, start.means, gmm.covariances)

    def check(contenders: dict[str, Call]) -> None:
        want = contenders["fastcl"]().double()
        for name, call in contenders.items():
            if name == "pomegranate":
                continue  # its steps go on from one another
            close(torch.as_tensor(call()).to(device).double(), want, rtol=1e-3, atol=1e-3)

    return Contest(contenders, check)


def _sklearn_step(x: Tensor, start: em.Mixture, kind: str) -> Call:
    from sklearn.mixture import GaussianMixture as Theirs

    theirs = Theirs(len(start.means), covariance_type=kind)
    wide = x.double().numpy()

    def step() -> Any:
        theirs.weights_, theirs.means_ = (t.double().numpy() for t in (start.weights, start.means))
        factors = start.scale_trils.double()
        theirs.precisions_cholesky_ = (torch.linalg.inv(factors).mT if kind == "full" else 1 / factors).numpy()
        _, log_resp = theirs._e_step(wide)
        theirs._m_step(wide, log_resp)
        return theirs.means_

    return step


def _pomegranate_step(x: Tensor, means: Tensor, covariances: Tensor) -> Call:
    from pomegranate.distributions import Normal
    from pomegranate.gmm import GeneralMixtureModel

    model = GeneralMixtureModel([Normal(m, c) for m, c in zip(means, covariances, strict=True)])

    def step() -> None:
        model.summarize(x)
        model.from_summaries()

    return step
