"""Mixtures: sampling, density, EM, against eager torch, torch.distributions, scikit-learn and pomegranate."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import fastcl
from fastcl.nn import GaussianMixture, em

SIZES = [(10, 32), (100, 32), (10, 128), (100, 128)]
COMPONENTS = pytest.mark.parametrize(("k", "d"), SIZES, ids=[f"K={k}-D={d}" for k, d in SIZES])


def mixture(k: int, d: int, device: torch.device, full: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    means = torch.randn(k, d)
    if not full:
        return means.to(device), (torch.rand(k, d) + 0.5).to(device)
    a = 0.3 * torch.randn(k, d, d)
    return means.to(device), torch.linalg.cholesky(a @ a.mT + torch.eye(d)).to(device)


def bucketed(labels: torch.Tensor, means: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The best eager form: samples sorted by component, one GEMM each."""
    eps = torch.randn(len(labels), means.shape[1], device=means.device)
    out, order, at = torch.empty_like(eps), labels.argsort(), 0
    for k, n in enumerate(labels.bincount(minlength=len(means)).tolist()):
        rows = order[at : at + n]
        out[rows] = torch.addmm(means[k], eps[rows], scale[k].T)
        at += n
    return out


def moments_agree(contenders: dict[str, Any], labels: torch.Tensor) -> None:
    """Two random number generators agree in distribution only: means and deviations of the first component."""
    found = {name: torch.as_tensor(call()).to(labels.device)[labels == 0].double() for name, call in contenders.items()}
    want = found["fastcl"]
    for z in found.values():
        n, deviation = len(z), want.std(0)
        assert ((z.mean(0) - want.mean(0)).abs() < 8 * deviation / n**0.5).all()
        assert ((z.std(0) / deviation - 1).abs() < 8 / n**0.5).all()


@COMPONENTS
@pytest.mark.parametrize("covariance", ["full", "diagonal"])
def test_sampling(contest: Callable, device: torch.device, k: int, d: int, covariance: str) -> None:
    """100,000 latents of given components."""
    n, full = 100_000, covariance == "full"
    means, scale = mixture(k, d, device, full)
    labels = torch.randint(0, k, (n,), device=device)
    contenders: dict[str, Any] = {"fastcl": lambda: fastcl.ops.gmm_sample(labels, means, scale)}
    if full:
        contenders["eager, bucketed GEMMs"] = lambda: bucketed(labels, means, scale)
    else:
        contenders["eager, mu[y] + sd[y] * randn"] = lambda: (
            means[labels] + scale[labels] * torch.randn(n, d, device=device)
        )
    if full and d <= 32:  # [N, D, D]: 0.4 GB at D = 32, 7 GB at D = 128
        normal = torch.distributions.MultivariateNormal
        contenders["torch.distributions"] = lambda: normal(means[labels], scale_tril=scale[labels]).sample()
    if device.type == "cpu" and full:
        order = np.sort(labels.numpy())
        counts, mu = np.bincount(order, minlength=k), means.double().numpy()
        covariances = (scale.double() @ scale.double().mT).numpy()

        def sklearn() -> np.ndarray:  # the body of GaussianMixture.sample; its samples come in the components' order
            rng = np.random.default_rng(0)
            z = np.vstack([rng.multivariate_normal(m, c, n) for m, c, n in zip(mu, covariances, counts, strict=True)])
            result = np.empty_like(z)
            result[np.argsort(labels.numpy(), kind="stable")] = z
            return result

        contenders["scikit-learn's sampling"] = sklearn
    contest(contenders, lambda c: moments_agree(c, labels))


@COMPONENTS
@pytest.mark.parametrize("covariance", ["full", "diagonal"])
def test_log_prob(contest: Callable, compiled: Callable, device: torch.device, k: int, d: int, covariance: str) -> None:
    """Log densities of 20,000 samples under every component."""
    full = covariance == "full"
    means, scale = mixture(k, d, device, full)
    x = torch.randn(20_000, d, device=device)

    def eager() -> torch.Tensor:
        inverse = torch.linalg.solve_triangular(scale, torch.eye(d, device=device).expand_as(scale), upper=False)
        log_det = scale.diagonal(dim1=1, dim2=2).log().sum(1)
        columns = [((x - means[i]) @ inverse[i].T).square().sum(1) for i in range(k)]
        return -0.5 * torch.stack(columns, 1) - log_det - 0.5 * d * em_log_2pi

    def eager_diagonal() -> torch.Tensor:
        precision = scale.square().reciprocal()
        squares = x.square() @ precision.T - 2 * x @ (means * precision).T + (means.square() * precision).sum(1)
        return -0.5 * squares - scale.log().sum(1) - 0.5 * d * em_log_2pi

    em_log_2pi = float(np.log(2 * np.pi))
    form = eager if full else eager_diagonal
    contenders: dict[str, Any] = {
        "fastcl": lambda: fastcl.ops.gmm_log_prob(x, means, scale),
        "eager GEMMs": form,
        **compiled(form),
    }
    if k * d <= 1280:
        factors = scale if full else torch.diag_embed(scale)
        normal = torch.distributions.MultivariateNormal(means, scale_tril=factors)
        contenders["MultivariateNormal.log_prob"] = lambda: normal.log_prob(x.unsqueeze(1))

    def check(contenders: dict[str, Any]) -> None:
        want = contenders["fastcl"]()
        for call in contenders.values():
            torch.testing.assert_close(call(), want, rtol=1e-3, atol=1e-2)

    contest(contenders, check)


@COMPONENTS
@pytest.mark.parametrize("covariance", ["full", "diagonal"])
def test_em_iteration(contest: Callable, device: torch.device, k: int, d: int, covariance: str) -> None:
    """One E-step and one M-step on 20,000 samples; scikit-learn's in float64, which is all it has, and in float32."""
    if device.type != "cpu":
        pytest.skip("scikit-learn runs on the CPU")
    from sklearn.mixture import GaussianMixture as Theirs

    kind = "full" if covariance == "full" else "diag"
    torch.manual_seed(0)
    x = torch.randn(20_000, d) + 3 * torch.randn(k, d)[torch.randint(0, k, (20_000,))]
    gmm = GaussianMixture(k, covariance=kind, max_iter=2, tol=0.0, random_state=0)
    gmm.fit(x)
    start = gmm._mixture()
    theirs = Theirs(k, covariance_type=kind)
    theirs._initialize_parameters = lambda *a, **b: None
    wide = x.double().numpy()

    def reset() -> None:
        theirs.weights_, theirs.means_ = (t.double().numpy() for t in (start.weights, start.means))
        factors = start.scale_trils.double()
        theirs.precisions_cholesky_ = (torch.linalg.inv(factors).mT if kind == "full" else 1 / factors).numpy()

    def sklearn() -> Any:
        reset()
        _, log_resp = theirs._e_step(wide)
        theirs._m_step(wide, log_resp)
        return theirs.means_

    contenders: dict[str, Any] = {
        "fastcl": lambda: gmm._step(x, em.Mixture(*(t.clone() for t in vars(start).values())))[0].means,
        "scikit-learn": sklearn,
    }
    # pomegranate does not regularise: with 100 components of 128 dimensions its covariances become singular
    if importlib.util.find_spec("pomegranate") is not None and kind == "full" and k * d <= 3200:
        from pomegranate.distributions import Normal
        from pomegranate.gmm import GeneralMixtureModel

        model = GeneralMixtureModel([Normal(m, c) for m, c in zip(start.means, gmm.covariances, strict=True)])

        def pomegranate() -> None:
            model.summarize(x)
            model.from_summaries()

        contenders["pomegranate"] = pomegranate

    def check(contenders: dict[str, Any]) -> None:
        torch.testing.assert_close(contenders["fastcl"]().double(), torch.as_tensor(sklearn()), rtol=1e-3, atol=1e-3)

    contest(contenders, check)


@COMPONENTS
def test_class_gaussians(contest: Callable, device: torch.device, k: int, d: int) -> None:
    """Count, mean, covariance and Cholesky factor of every class of 100,000 labelled latents."""
    x, y = torch.randn(100_000, d, device=device), torch.randint(0, k, (100_000,), device=device)

    def eager() -> list[torch.Tensor]:
        found = []
        for c in range(k):
            mine = x[y == c]
            found.append(torch.linalg.cholesky(torch.cov(mine.T, correction=0)))
        return found

    def fused() -> torch.Tensor:
        return GaussianMixture(k, reg_covar=0.0).fit_classes(x, y).scale_trils

    def check(contenders: dict[str, Any]) -> None:
        torch.testing.assert_close(fused(), torch.stack(eager()), rtol=1e-3, atol=1e-4)

    contest({"fastcl": fused, "eager, class by class": eager}, check)
