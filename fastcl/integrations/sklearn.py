"""scikit-learn's mixture of Gaussians on fastcl's kernels: its estimator, its tests, its results, in less time.

Changing the import is the whole change:

    from fastcl.integrations.sklearn import GaussianMixture      # instead of sklearn.mixture

The estimator is scikit-learn's own class: parameters, validation, starts, the loop of EM, warnings and criteria are
inherited. The densities, both steps of EM and the samples are :func:`fastcl.ops.gmm_log_prob`, ``gmm_statistics`` and
``gmm_sample``. :class:`fastcl.nn.GaussianMixture` is the module for training loops: it lives in `state_dict`, learns
from streams and labels, and never fails on collapsed components, where scikit-learn raises.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from sklearn import mixture
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted
from torch import Tensor

from .. import ops

Array = Any  # numpy array, or a tensor under scikit-learn's array_api_dispatch

# A variance is a difference of second moment and squared mean: what is lost where the mean moved by this many
# variances is 1e-5 (float32, whose products are rounded to it) or 1e-8 (float64) of it, else the pass is done again.
FAR = {torch.float32: 1e2, torch.float64: 1e8}


class GaussianMixture(mixture.GaussianMixture):
    """:class:`sklearn.mixture.GaussianMixture` with fastcl's kernels inside; its parameters and attributes.

    What differs: samples have another stream of random numbers (from the same `random_state`); float32 data are summed
    in float64, so that what they give has a few digits more; a component that has lost all its samples keeps its mean,
    where scikit-learn's goes to the origin; `precisions_init` gives `covariances_` also with ``max_iter=0``; a matrix
    that is not triangular may be put into `precisions_cholesky_`.

    Args:
        n_components, covariance_type, tol, reg_covar, max_iter, n_init, init_params, weights_init, means_init,
            precisions_init, random_state, warm_start, verbose, verbose_interval: scikit-learn's.

    Raises:
        ValueError, TypeError: what scikit-learn raises, in its words.

    Example:
        >>> x = torch.cat([torch.randn(50, 3), torch.randn(50, 3) + 9]).numpy()
        >>> GaussianMixture(2, random_state=0).fit(x).predict_proba(x).shape
        (100, 2)
    """

    def _initialize(self, X: Array, resp: Array | None, **kwargs: Any) -> None:
        x, given = _tensor(X), {}
        for name in ("weights", "means", "precisions"):
            value = getattr(self, f"{name}_init")
            if value is not None:
                given[name] = torch.as_tensor(np.array(value) if isinstance(value, np.ndarray) else value).to(x)
        found: dict[str, Tensor] = {}
        if resp is not None:
            r = _tensor(resp).to(x)
            nk, means, covariances = self._estimate(x, r, x.mean(0).expand(r.shape[1], -1))
            found = {"weights": nk / len(x), "means": means}
            if "precisions" not in given:
                found |= {"covariances": covariances, "precisions_cholesky": self._factors(covariances, x.dtype)}
        if "precisions" in given:
            precisions = given.pop("precisions").double()
            if precisions.dim() > 1 and self.covariance_type in ("full", "tied"):
                upper = torch.linalg.cholesky(precisions.flip(-1, -2)).flip(-1, -2)  # U U^T, as scikit-learn has it
                scale = _inverse(upper.mT)
                found |= {"covariances": scale @ scale.mT, "precisions_cholesky": upper}
            else:
                found |= {"covariances": 1 / precisions, "precisions_cholesky": precisions.sqrt()}
        for name, value in (found | given).items():
            setattr(self, f"{name}_", _like(X, value.to(x.dtype)))

    def _m_step(self, X: Array, log_resp: Array, **kwargs: Any) -> None:
        x = _tensor(X)
        # e^-60 for what is less: subnormal numbers, of which a good separation is full, cost ten times a normal one
        resp = _tensor(log_resp).clamp(min=-60.0 if x.dtype == torch.float32 else -600.0).exp_().to(x.dtype)
        nk, means, covariances = self._estimate(x, resp, _tensor(self.means_).to(x))
        self.precisions_cholesky_ = _like(X, self._factors(covariances, x.dtype))
        self.weights_ = _like(X, (nk / nk.sum()).to(x.dtype))
        self.means_ = _like(X, means.to(x.dtype))
        self.covariances_ = _like(X, covariances.to(x.dtype))

    def _estimate(self, x: Tensor, resp: Tensor, centers: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """N_k, means and covariances (with reg_covar) in float64, from moments about the centers."""
        if self.covariance_type == "tied":
            return self._estimate_tied(x, resp)
        full = self.covariance_type == "full"
        for _ in range(2):
            s0, s1, s2 = ops.gmm_statistics(x, resp, centers, full=full)
            nk = s0 + 10 * torch.finfo(x.dtype).eps
            shift = s1 / nk.unsqueeze(1)
            about = shift.unsqueeze(2) * shift.unsqueeze(1) if full else shift.square()
            shape = (-1, *[1] * (s2.dim() - 1))
            covariances = (s2 - (2 * nk - s0).view(shape) * about) / nk.view(shape)
            means = centers.double() + shift
            if not _far(shift.square(), _variances(covariances) + self.reg_covar, x.dtype):
                break
            centers = means.to(x.dtype)
        if self.covariance_type == "spherical":
            return nk, means, covariances.mean(1) + self.reg_covar
        if full:
            covariances.diagonal(dim1=1, dim2=2).add_(self.reg_covar)
            return nk, means, covariances
        return nk, means, covariances + self.reg_covar

    def _estimate_tied(self, x: Tensor, resp: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """All the data's scatter less that of the means: N D^2 instead of N K D^2, as in scikit-learn."""
        middle = x.mean(0, keepdim=True)
        s0, s1, _ = ops.gmm_statistics(x, resp, middle.expand(resp.shape[1], -1), full=False)
        nk = s0 + 10 * torch.finfo(x.dtype).eps
        shift = s1 / nk.unsqueeze(1)
        everywhere = torch.zeros(len(x), dtype=torch.int64, device=x.device)
        _, t1, t2 = ops.gmm_class_statistics(x, everywhere, middle)
        means = middle.double() + shift
        scatter = t2[0] - ((2 * nk - s0).unsqueeze(1) * shift).mT @ shift
        if abs(len(x) - s0.sum()) > 1e-3 * len(x):
            # a start from single samples: scikit-learn takes the scatter of all data about the origin here
            m, apart = middle[0].double(), t1[0] - s1.sum(0)
            scatter += torch.outer(apart, m) + torch.outer(m, apart) + (len(x) - nk.sum()) * torch.outer(m, m)
        elif _far(shift.square(), scatter.diagonal() / nk.sum() + self.reg_covar, x.dtype):
            centers = means.to(x.dtype)
            s0, s1, s2 = ops.gmm_statistics(x, resp, centers)
            shift = s1 / nk.unsqueeze(1)
            means = centers.double() + shift
            scatter = s2.sum(0) - ((2 * nk - s0).unsqueeze(1) * shift).mT @ shift
        covariance = scatter / nk.sum()
        covariance.diagonal().add_(self.reg_covar)
        return nk, means, covariance

    def _factors(self, covariances: Tensor, dtype: torch.dtype) -> Tensor:
        """The upper U of U U^T = precision; square roots of precisions."""
        if self.covariance_type in ("full", "tied"):
            lower, failed = torch.linalg.cholesky_ex(covariances)
            good = not failed.any() and bool((lower.diagonal(dim1=-1, dim2=-2) > 0).all())
            found = _inverse(lower).mT.contiguous().to(dtype) if good else lower
        else:
            found = covariances.rsqrt().to(dtype)
            good = bool((covariances > 0).all())
        if not (good and found.isfinite().all()):
            raise ValueError(
                "Fitting the mixture model failed because some components have ill-defined empirical covariance (for "
                "instance caused by singleton or collapsed samples). Try to decrease the number of components, "
                "increase reg_covar, or scale the input data."
                + " The numerical accuracy can also be improved by passing float64 data instead of float32."
                * (dtype == torch.float32)
            )
        return found

    def _estimate_log_prob(self, X: Array, **kwargs: Any) -> Array:
        return _like(X, self._log_prob(X))

    def _log_prob(self, X: Array) -> Tensor:
        x, means, scale, constant = self._components(X)
        return ops.gmm_log_prob(x, means, scale).add_(constant)

    def _components(self, X: Array) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Samples, means and scales for the kernels, and what they leave out of every log density."""
        x, means, factors = _tensor(X), _tensor(self.means_), _tensor(self.precisions_cholesky_)
        dtype = torch.promote_types(x.dtype, means.dtype)
        x, means, factors = x.to(means.device, dtype), means.to(dtype), factors.double()
        zero = means.new_zeros(())
        if self.covariance_type in ("diag", "spherical"):
            return x, means, factors.reciprocal().to(dtype), zero
        if factors.tril(-1).any():  # put there by hand: any factor of the precision
            upper = torch.linalg.cholesky((factors @ factors.mT).flip(-1, -2)).flip(-1, -2)
        else:
            upper = factors
        if self.covariance_type == "full":
            return x, means, _inverse(upper.mT).to(dtype), zero
        # one covariance: white data and unit variances, N D^2 + N K D instead of N K D^2
        middle, white = means.mean(0), upper.to(dtype)
        determinant = upper.diagonal().log().sum().to(dtype)
        return (x - middle) @ white, (means - middle) @ white, means.new_ones(len(means)), determinant

    def _estimate_log_prob_resp(self, X: Array, **kwargs: Any) -> tuple[Array, Array]:
        x, means, scale, constant = self._components(X)
        weights = _tensor(self.weights_).to(means)
        _, norm = ops.gmm_responsibilities(x, weights, means, scale)  # a tenth of torch.logsumexp's time
        shares = ops.gmm_log_prob(x, means, scale).add_(weights.log()).sub_(norm.unsqueeze(1))
        return _like(X, norm.add_(constant)), _like(X, shares)

    def sample(self, n_samples: int = 1) -> tuple[Array, Array]:
        """(X [n, D] in float64, components [n]): their numbers are scikit-learn's, their latents are Philox's.

        Raises:
            ValueError: n_samples below 1, or covariances_ that are not positive definite.
        """
        check_is_fitted(self)
        if n_samples < 1:
            raise ValueError(f"Invalid value for 'n_samples': {n_samples} . The sampling requires at least one sample.")
        weights, means, covariances = (_tensor(t).double() for t in (self.weights_, self.means_, self.covariances_))
        rng = check_random_state(self.random_state)
        counts = torch.from_numpy(rng.multinomial(n_samples, weights.cpu().numpy())).to(means.device)
        generator = torch.Generator().manual_seed(int(rng.randint(2**31 - 1)))
        if self.covariance_type in ("full", "tied"):
            scale, failed = torch.linalg.cholesky_ex(covariances.expand(len(means), *covariances.shape[-2:]))
            if failed.any():
                raise ValueError("covariances_ must be positive definite to sample from them")
        else:
            scale = covariances.sqrt()
        component = torch.arange(len(means), device=means.device).repeat_interleave(counts)
        return _like(self.means_, ops.gmm_sample(component, means, scale, generator)), _like(self.means_, component)


def _tensor(x: Array) -> Tensor:
    """The same memory wherever torch can have it: neither read-only nor reversed."""
    if isinstance(x, Tensor):
        return x.detach()
    if not isinstance(x, np.ndarray):
        raise TypeError(f"the data are of type {type(x).__name__} but must be a numpy array or a torch tensor")
    t = torch.from_numpy(np.require(x, requirements=["C", "W"]))
    return t if t.is_floating_point() else t.double()


def _like(x: Array, found: Tensor) -> Array:
    return found if isinstance(x, Tensor) else found.cpu().numpy()


def _inverse(lower: Tensor) -> Tensor:
    eye = torch.eye(lower.shape[-1], dtype=lower.dtype, device=lower.device)
    return torch.linalg.solve_triangular(lower, eye, upper=False)


def _variances(covariances: Tensor) -> Tensor:
    return covariances.diagonal(dim1=1, dim2=2) if covariances.dim() == 3 else covariances


def _far(squares: Tensor, variances: Tensor, dtype: torch.dtype) -> bool:
    return bool((squares > FAR[dtype] * variances).any())
