"""scikit-learn's own tests of its mixture and of estimators, with the class replaced; then what they do not ask."""

from __future__ import annotations

import importlib.util
import os
import warnings
from types import ModuleType
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import sklearn.mixture
import torch
from sklearn.utils.estimator_checks import parametrize_with_checks

from fastcl import ops
from fastcl.integrations.sklearn import GaussianMixture, _tensor

pytestmark = pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
Theirs = sklearn.mixture.GaussianMixture
DISPATCH = {"SCIPY_ARRAY_API": "1"}  # scikit-learn dispatches only with it; its mixture asks nothing of scipy

NOT_OURS = {
    # patches a helper of scikit-learn's M-step and counts its calls: below with ours, gmm_statistics
    "test_gaussian_mixture_all_init_does_not_estimate_gaussian_parameters",
}


def theirs(name: str) -> dict[str, Any]:
    """The tests of a new copy of scikit-learn's module, which imports our class where it imports its own."""
    spec = importlib.util.find_spec(f"sklearn.mixture.tests.{name}")
    assert spec is not None
    assert spec.loader is not None
    module: ModuleType = importlib.util.module_from_spec(spec)
    with patch.object(sklearn.mixture, "GaussianMixture", GaussianMixture), patch.dict(os.environ, DISPATCH):
        spec.loader.exec_module(module)
    assert module.GaussianMixture is GaussianMixture
    found = {key: value for key, value in vars(module).items() if key.startswith("test_") and key not in NOT_OURS}
    return {key: in_lists(test) for key, test in found.items()}


def in_lists(test: Any) -> Any:
    """A test with its parameters in lists: pytest 9 warns of generators."""
    test.pytestmark = [listed(mark) for mark in getattr(test, "pytestmark", [])]
    return test


def listed(mark: pytest.Mark) -> pytest.Mark:
    """Of array libraries and devices only those that are here."""
    if mark.name != "parametrize":
        return mark
    values = list(mark.args[1])
    if "array_namespace" in mark.args[0]:
        values = [v for v in values if v[0] == "numpy" or (v[0] == "torch" and v[1] in (None, "cpu"))]
    return pytest.mark.parametrize(mark.args[0], values, **mark.kwargs).mark


THEIRS = theirs("test_gaussian_mixture") | theirs("test_mixture")
globals().update(THEIRS)


@pytest.fixture(params=[np.float32, np.float64])
def global_dtype(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.fixture
def global_random_seed() -> int:
    return 42


@pytest.fixture(autouse=True)
def array_api(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "array_api" in request.node.name and request.node.originalname in THEIRS:
        for name, value in DISPATCH.items():
            monkeypatch.setenv(name, value)


@in_lists
@parametrize_with_checks([GaussianMixture()])
def test_estimator_checks(estimator: Any, check: Any) -> None:
    check(estimator)


def test_their_tests_are_all_here() -> None:
    assert len(THEIRS) >= 30


TYPES = ["full", "tied", "diag", "spherical"]


def blobs(dtype: Any = np.float64, n: int = 400, d: int = 5, k: int = 3, apart: float = 6.0) -> np.ndarray:
    rng = np.random.RandomState(3)
    mix = rng.randn(k, d, d) * 0.4 + np.eye(d)
    y = np.arange(n) % k
    return (np.einsum("nd,nde->ne", rng.randn(n, d), mix[y]) + apart * np.eye(k, d)[y]).astype(dtype)


def fitted(cls: Any, x: np.ndarray, **options: Any) -> Any:
    return cls(3, random_state=0, **options).fit(x)


@pytest.mark.parametrize("init", ["kmeans", "k-means++", "random", "random_from_data"])
@pytest.mark.parametrize("covariance_type", TYPES)
def test_the_same_random_state_gives_the_same_fit(covariance_type: str, init: str) -> None:
    """Step for step: parameters, bounds, iterations, and what is said of new data."""
    x, new = blobs(apart=2.0), blobs(n=50)
    for max_iter in (1, 4, 200):
        options = dict(covariance_type=covariance_type, init_params=init, max_iter=max_iter, tol=1e-5)
        a, b = fitted(GaussianMixture, x, **options), fitted(Theirs, x, **options)
        assert (a.n_iter_, a.converged_) == (b.n_iter_, b.converged_)
        for name in ("weights_", "means_", "covariances_", "precisions_", "precisions_cholesky_", "lower_bound_"):
            one, other = getattr(a, name), getattr(b, name)
            np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-7 * np.abs(other).max(), err_msg=name)
        assert np.dtype(a.means_.dtype) == a.score_samples(x).dtype == np.float64
        np.testing.assert_allclose(a.score_samples(new), b.score_samples(new), rtol=1e-6)
        np.testing.assert_allclose(a.predict_proba(new), b.predict_proba(new), atol=1e-6)
        np.testing.assert_array_equal(a.predict(new), b.predict(new))
        assert a.bic(x) == pytest.approx(b.bic(x), rel=1e-8)


@pytest.mark.parametrize("covariance_type", TYPES)
def test_the_kernels_run(covariance_type: str) -> None:
    """With a start of one's own, nothing is estimated but in the iterations: one pass each."""
    x = blobs()
    identity = {"full": np.stack([np.eye(5)] * 3), "tied": np.eye(5), "diag": np.ones((3, 5)), "spherical": np.ones(3)}
    mixture = GaussianMixture(
        3,
        covariance_type=covariance_type,
        weights_init=np.full(3, 1 / 3),
        means_init=x[:3],
        precisions_init=identity[covariance_type],
    )
    with (
        patch.object(ops, "gmm_statistics", wraps=ops.gmm_statistics) as moments,
        patch.object(ops, "gmm_log_prob", wraps=ops.gmm_log_prob) as density,
        patch.object(ops, "gmm_sample", wraps=ops.gmm_sample) as latents,
    ):
        mixture.fit(x).sample(7)
    assert moments.call_count == mixture.n_iter_ > 0
    assert density.call_count == mixture.n_iter_ + 1  # fit_predict asks once more for the labels
    assert latents.call_count == 1


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("covariance_type", TYPES)
def test_digits_survive_far_from_the_origin_and_far_apart(covariance_type: str, dtype: Any) -> None:
    """Clusters a thousand and more deviations apart, off the origin: the covariances of each one, in float64, apart."""
    apart = 1e3 if dtype == np.float32 else 1e6
    rng = np.random.RandomState(0)
    y = np.arange(600) % 3
    x = (rng.randn(600, 4) + apart * (1 + np.eye(3, 4)[y])).astype(dtype)
    mixture = fitted(GaussianMixture, x, covariance_type=covariance_type, reg_covar=0.0, means_init=x[:3])
    each = np.stack([np.cov(x[y == k].astype(np.float64).T, bias=True) for k in range(3)])
    expected = {
        "full": each,
        "tied": each.mean(0),
        "diag": each.diagonal(axis1=1, axis2=2),
        "spherical": each.diagonal(axis1=1, axis2=2).mean(1),
    }[covariance_type]
    assert mixture.covariances_.dtype == dtype
    np.testing.assert_allclose(mixture.covariances_, expected, rtol=2e-5, atol=2e-5)


def test_float32_is_nearer_to_float64_than_scikit_learns() -> None:
    x = blobs(np.float32, n=5000, apart=300.0) + np.float32(1000)
    truth = fitted(Theirs, x.astype(np.float64), covariance_type="diag", max_iter=20, tol=0)
    found = [fitted(c, x, covariance_type="diag", max_iter=20, tol=0).covariances_ for c in (GaussianMixture, Theirs)]
    mine, others = (np.abs(f - truth.covariances_).max() for f in found)
    assert mine < 1e-3 < others


def test_memory_of_any_kind() -> None:
    """Read-only, reversed, column by column, integers: the values count."""
    x = blobs()
    expected = fitted(GaussianMixture, x).score_samples(x)
    locked = x.copy()
    locked.flags.writeable = False
    for given in (locked, x[::-1].copy()[::-1], np.asfortranarray(x), np.concatenate([x, x], 1)[:, :5]):
        before = given.copy()
        np.testing.assert_allclose(fitted(GaussianMixture, given).score_samples(given), expected, rtol=1e-9)
        np.testing.assert_array_equal(given, before)
    whole = np.round(10 * x).astype(np.int64)
    mixture = fitted(GaussianMixture, whole)
    np.testing.assert_array_equal(mixture.score_samples(whole), mixture.score_samples(whole.astype(np.float64)))
    with pytest.raises(TypeError, match="type list but must be a numpy array"):
        _tensor([1.0])


def test_samples() -> None:
    """As many of each component as its weight says, with its moments; the random state's, as everywhere."""
    x = blobs(n=900)
    for covariance_type in TYPES:
        mixture = fitted(GaussianMixture, x, covariance_type=covariance_type)
        drawn, component = mixture.sample(30_000)
        again, _ = mixture.sample(30_000)
        np.testing.assert_array_equal(drawn, again)
        assert drawn.dtype == np.float64
        np.testing.assert_array_equal(component, np.sort(component))
        np.testing.assert_allclose(np.bincount(component) / 30_000, mixture.weights_, atol=0.01)
        np.testing.assert_allclose(mixture.score(drawn), mixture.score(x), rtol=0.05)
    mixture.set_params(covariance_type="full")
    mixture.covariances_ = -np.stack([np.eye(5)] * 3)
    with pytest.raises(ValueError, match="covariances_ must be positive definite"):
        mixture.sample()
    with pytest.raises(ValueError, match="Invalid value for 'n_samples': 0"):
        mixture.sample(0)


def test_parameters_put_there_by_hand() -> None:
    """A lower or a full factor of the precision instead of the upper one gives the same densities."""
    x = blobs()
    for covariance_type in ("full", "tied"):
        mixture = fitted(GaussianMixture, x, covariance_type=covariance_type)
        expected = mixture.score_samples(x)
        mixture.precisions_cholesky_ = np.linalg.cholesky(mixture.precisions_)  # what many scripts do
        np.testing.assert_allclose(mixture.score_samples(x), expected, rtol=1e-8)
        turn = np.linalg.qr(np.random.RandomState(0).randn(5, 5))[0]
        mixture.precisions_cholesky_ = mixture.precisions_cholesky_ @ turn
        np.testing.assert_allclose(mixture.score_samples(x), expected, rtol=1e-8)


def test_no_iteration_still_gives_covariances() -> None:
    x, identity = blobs(), np.stack([2 * np.eye(5)] * 3)
    mixture = GaussianMixture(
        3, weights_init=np.full(3, 1 / 3), means_init=x[:3], precisions_init=identity, max_iter=0
    ).fit(x)
    np.testing.assert_allclose(mixture.covariances_, identity / 4)
    np.testing.assert_allclose(mixture.means_, x[:3])


def test_an_empty_component_keeps_its_mean() -> None:
    x = blobs()
    means = np.vstack([x[:2], np.full((1, 5), 1e3)])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        mixture = fitted(GaussianMixture, x, means_init=means, max_iter=1)
    np.testing.assert_allclose(mixture.means_[2], means[2])
    assert np.isfinite(mixture.precisions_cholesky_).all()


def test_torch_s_settings_are_left_alone() -> None:
    threads, dtype, seed = torch.get_num_threads(), torch.get_default_dtype(), torch.get_rng_state()
    fitted(GaussianMixture, blobs()).sample(3)
    assert (torch.get_num_threads(), torch.get_default_dtype()) == (threads, dtype)
    assert torch.equal(torch.get_rng_state(), seed)
