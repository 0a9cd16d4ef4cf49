"""Mixtures: sampling, density, EM, against eager torch, torch.distributions, scikit-learn and pomegranate."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from fastcl.bench import mixtures
from fastcl.nn import GaussianMixture

SIZES = [(10, 32), (100, 32), (10, 128), (100, 128)]
COMPONENTS = pytest.mark.parametrize(("k", "d"), SIZES, ids=[f"K={k}-D={d}" for k, d in SIZES])


@COMPONENTS
@pytest.mark.parametrize("covariance", ["full", "diagonal"])
def test_sampling(play: Callable, device: torch.device, k: int, d: int, covariance: str) -> None:
    """100,000 latents of given components."""
    play(mixtures.sampling(device, k, d, 100_000, covariance == "full"))


@COMPONENTS
@pytest.mark.parametrize("covariance", ["full", "diagonal"])
def test_log_prob(play: Callable, compiled: Callable, device: torch.device, k: int, d: int, covariance: str) -> None:
    play(mixtures.log_prob(device, compiled, k, d, 20_000, covariance == "full"))


@COMPONENTS
@pytest.mark.parametrize("covariance", ["full", "diagonal"])
def test_em_iteration(play: Callable, device: torch.device, k: int, d: int, covariance: str) -> None:
    """One E-step and one M-step on 20,000 samples."""
    play(mixtures.em_iteration(device, k, d, 20_000, covariance == "full"))


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
