"""The mixture module: scikit-learn as the oracle of EM, classes, streams, degenerate data, an estimator's behaviour."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.mixture import GaussianMixture as Theirs
from torch import Tensor

import fastcl
from fastcl.nn import ConvergenceWarning, GaussianMixture

COVARIANCES = ["full", "tied", "diag", "spherical"]


def digits(d: int = 12) -> np.ndarray:
    """scikit-learn's digits on their first principal axes."""
    x = load_digits().data - load_digits().data.mean(0)
    return x @ np.linalg.svd(x, full_matrices=False)[2][:d].T


def blobs(k: int = 3, n: int = 200, d: int = 4, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    y = torch.arange(n * k) % k
    return 8 * torch.eye(k, d, dtype=dtype)[y] + torch.randn(n * k, d, dtype=dtype), y


@pytest.mark.parametrize("covariance", COVARIANCES)
def test_em_is_scikit_learns(covariance: str) -> None:
    """From the same start, to the same solution, step by step."""
    x, k = digits(), 6
    start = {
        "weights_init": np.full(k, 1 / k),
        "means_init": x[:k],
        "precisions_init": {
            "full": np.stack([np.eye(12) / 20] * k),
            "tied": np.eye(12) / 20,
            "diag": np.full((k, 12), 0.05),
            "spherical": np.full(k, 0.05),
        }[covariance],
    }
    for iterations in (1, 5, 60):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            theirs = Theirs(k, covariance_type=covariance, tol=1e-6, max_iter=iterations, **start).fit(x)
            mine = GaussianMixture(k, covariance=covariance, tol=1e-6, max_iter=iterations, **start).fit(x)
        np.testing.assert_allclose(mine.weights.numpy(), theirs.weights_, rtol=1e-6, atol=1e-9)
        np.testing.assert_allclose(mine.means.numpy(), theirs.means_, rtol=1e-6, atol=1e-6)
        covariances = mine.covariances[0] if covariance == "tied" else mine.covariances
        np.testing.assert_allclose(covariances.numpy(), theirs.covariances_, rtol=1e-5, atol=1e-5)
        assert mine.lower_bound_ == pytest.approx(theirs.lower_bound_, rel=1e-9)
        assert (mine.n_iter_, mine.converged_) == (theirs.n_iter_, theirs.converged_)
        np.testing.assert_allclose(mine.score_samples(x), theirs.score_samples(x), rtol=1e-6)
        np.testing.assert_allclose(mine.predict_proba(x), theirs.predict_proba(x), atol=1e-6)
        np.testing.assert_array_equal(mine.predict(x), theirs.predict(x))
        for criterion in ("bic", "aic", "score"):
            assert getattr(mine, criterion)(x) == pytest.approx(getattr(theirs, criterion)(x), rel=1e-8)


@pytest.mark.parametrize("init_params", ["kmeans", "random"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_finds_blobs(init_params: str, dtype: torch.dtype) -> None:
    x, y = blobs(dtype=dtype)
    gmm = GaussianMixture(3, init_params=init_params, n_init=5, tol=1e-5, max_iter=300, random_state=0).fit(x)
    assert gmm.converged_
    assert gmm.means.dtype == dtype
    gmm.assign_labels(x, y)
    assert sorted(gmm.labels.tolist()) == [0, 1, 2]
    assert (gmm.predict_class(x) == y).float().mean() > 0.99


def test_as_good_as_scikit_learns_start() -> None:
    x = digits()
    theirs = Theirs(10, n_init=3, random_state=0).fit(x).lower_bound_
    assert GaussianMixture(10, n_init=3, random_state=0).fit(x).lower_bound_ > theirs - 0.3


def test_numpy_in_numpy_out() -> None:
    x, _ = blobs()
    gmm = GaussianMixture(3, random_state=1).fit(x.numpy())
    for name in ("predict", "predict_proba", "score_samples"):
        assert isinstance(getattr(gmm, name)(x.numpy()), np.ndarray)
        assert isinstance(getattr(gmm, name)(x), Tensor)


def test_samples_have_the_mixtures_moments() -> None:
    x, _ = blobs(n=2000)
    gmm = GaussianMixture(3, random_state=1).fit(x)
    z, component = gmm.sample(6000)
    assert (component[1:] >= component[:-1]).all()
    torch.testing.assert_close(z.mean(0), x.mean(0), atol=0.3, rtol=0)
    assert (gmm.predict(z) == component).float().mean() > 0.99
    again, _ = gmm.sample(6000)
    assert torch.equal(z, again)  # random_state is an int
    assert not torch.equal(gmm.sample(6000, generator=torch.Generator().manual_seed(2))[0], z)
    mine = gmm.sample_of(torch.full((500,), 1))
    assert (gmm.predict(mine) == 1).all()


@pytest.mark.parametrize("covariance", COVARIANCES)
def test_classes_in_one_pass_and_in_a_stream(covariance: str) -> None:
    x, y = blobs(k=3, n=150)
    y = 10 * y + 5  # labels need not be 0 ... K
    whole = GaussianMixture(3, covariance=covariance, reg_covar=0.0).fit_classes(x, y)
    assert whole.labels.tolist() == [5, 15, 25]
    for k, label in enumerate(whole.labels.tolist()):
        mine = x[y == label]
        torch.testing.assert_close(whole.means[k], mine.mean(0))
        if covariance == "full":
            torch.testing.assert_close(whole.covariances[k], torch.cov(mine.T, correction=0))
    stream = GaussianMixture(3, covariance=covariance, reg_covar=0.0)
    stream.labels = whole.labels.clone()
    for part in torch.randperm(len(x)).split(37):
        stream.partial_fit(x[part], y[part])
    for name in ("weights", "means", "scale_trils"):
        torch.testing.assert_close(getattr(stream, name), getattr(whole, name))


def test_a_class_may_come_late() -> None:
    x, y = blobs(k=3, n=50)
    gmm = GaussianMixture(3).partial_fit(x[y < 2], y[y < 2])
    assert all(t.isfinite().all() for t in (gmm.weights, gmm.means, gmm.scale_trils))
    gmm.partial_fit(x[y == 2], y[y == 2])
    torch.testing.assert_close(gmm.means[2], x[y == 2].mean(0))
    with pytest.raises(ValueError, match="y has the label 3 but must be one of"):
        gmm.partial_fit(x, torch.full((len(x),), 3))


def test_stepwise_em_follows_a_stream() -> None:
    x, y = blobs(k=3, n=600)
    order = torch.randperm(len(x))
    gmm = GaussianMixture(3, random_state=0)
    for part in order.split(100):
        gmm.partial_fit(x[part])
    gmm.assign_labels(x, y)
    assert (gmm.predict_class(x) == y).float().mean() > 0.99
    assert gmm.weights.sum().item() == pytest.approx(1)


def test_warm_start_goes_on() -> None:
    x = digits()
    with pytest.warns(ConvergenceWarning, match="did not converge in 2 iterations"):
        gmm = GaussianMixture(5, max_iter=2, warm_start=True, random_state=0).fit(x)
    first = gmm.lower_bound_
    with pytest.warns(ConvergenceWarning):
        gmm.fit(x)
    assert gmm.lower_bound_ > first


DEGENERATE = {
    "one point": lambda: torch.ones(30, 3),
    "two points": lambda: torch.tensor([[0.0, 0, 0], [1, 1, 1]]).repeat(15, 1),
    "a constant feature": lambda: torch.cat([torch.randn(40, 2), torch.ones(40, 1)], 1),
    "copies of a feature": lambda: torch.randn(40, 1).repeat(1, 3),
    "huge": lambda: 1e15 * torch.randn(40, 3),
    "tiny": lambda: 1e-15 * torch.randn(40, 3),
    "an outlier": lambda: torch.cat([torch.randn(40, 3), torch.full((1, 3), 1e6)]),
    "as many components as samples": lambda: torch.randn(4, 3),
}


@pytest.mark.parametrize("covariance", COVARIANCES)
@pytest.mark.parametrize("case", DEGENERATE)
@pytest.mark.filterwarnings("ignore::fastcl.nn.ConvergenceWarning")
def test_degenerate_data_never_gives_nan(case: str, covariance: str) -> None:
    x = DEGENERATE[case]()
    gmm = GaussianMixture(4, covariance=covariance, random_state=0).fit(x)
    for t in (gmm.weights, gmm.means, gmm.scale_trils, gmm.score_samples(x), gmm.predict_proba(x), gmm.sample(9)[0]):
        assert t.isfinite().all()
    assert gmm.weights.sum().item() == pytest.approx(1, abs=1e-5)
    assert (gmm.weights >= 0).all()


def test_state_is_kept() -> None:
    x, y = blobs()
    gmm = GaussianMixture(3).fit_classes(x, y)
    other = GaussianMixture(3)
    other.load_state_dict(gmm.state_dict())
    assert torch.equal(other.predict_class(x), gmm.predict_class(x))
    given = GaussianMixture(3, 4).double()
    given.load_state_dict(gmm.state_dict())
    assert torch.equal(given.score_samples(x), gmm.score_samples(x))


def test_density_has_a_gradient() -> None:
    gmm = GaussianMixture(3, random_state=0).fit(blobs()[0])
    x = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(gmm, (x,))


def test_an_unfitted_one_with_features_is_a_standard_normal() -> None:
    z, _ = GaussianMixture(2, 3).sample(5000, generator=torch.Generator().manual_seed(0))
    assert z.mean().abs() < 0.05
    assert abs(z.std() - 1) < 0.05


X = torch.randn(20, 3)
BAD = {
    "n_components": (lambda: GaussianMixture(0), "n_components is 0"),
    "covariance": (lambda: GaussianMixture(2, covariance="round"), "covariance is 'round'"),
    "init_params": (lambda: GaussianMixture(2, init_params="x"), "init_params is 'x'"),
    "tol": (lambda: GaussianMixture(2, tol=-1.0), "tol is -1.0"),
    "not fitted": (lambda: GaussianMixture(2).predict(X), "not fitted"),
    "not fitted, sampled": (lambda: GaussianMixture(2).sample(3), "not fitted"),
    "too few samples": (lambda: GaussianMixture(30).fit(X), "20 samples but must have at least 30"),
    "one dimension": (lambda: GaussianMixture(2).fit(X[0]), r"x has shape \[3\]"),
    "NaN": (lambda: GaussianMixture(2).fit(X / 0 * 0), "NaN or infinite"),
    "other features": (lambda: GaussianMixture(2, 3).fit(X[:, :2]), "2 features but must have 3"),
    "means_init": (lambda: GaussianMixture(2, means_init=X[:3]).fit(X), "means_init has shape"),
    "weights_init": (lambda: GaussianMixture(2, weights_init=[1.0, 1.0]).fit(X), "add up to 1"),
    "precisions_init": (lambda: GaussianMixture(2, precisions_init=-torch.ones(2, 3, 3)).fit(X), "positive definite"),
    "n_samples": (lambda: GaussianMixture(2, 3).sample(0), "n_samples is 0"),
    "labels": (lambda: GaussianMixture(2).fit_classes(X, torch.zeros(19, dtype=torch.int64)), "y has shape"),
    "classes": (lambda: GaussianMixture(2).fit_classes(X, torch.arange(20) % 3), "y has 3 classes but must have 2"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str) -> None:
    make, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        make()


def test_it_is_public() -> None:
    assert fastcl.nn.GaussianMixture is GaussianMixture
