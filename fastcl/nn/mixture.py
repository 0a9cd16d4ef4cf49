"""A mixture of Gaussians: EM, class-conditional Gaussians, streams."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .. import ops
from ..ops._state import misfit
from . import em

Array = Any  # numpy array or tensor; results are of the kind that was given


class ConvergenceWarning(UserWarning):
    """EM stopped at max_iter before its lower bound did."""


class GaussianMixture(nn.Module):
    r"""A mixture of Gaussians :math:`p(x) = \sum_k w_k\,N(x\,|\,\mu_k, L_kL_k^\top)` with scikit-learn's behaviour.

    Fitting is EM (Dempster et al. 1977) on fused kernels: log densities and responsibilities, then the moments of all
    components in one pass; memory O(N K + K D^2). Samples are Philox latents (:func:`fastcl.ops.gmm_sample`).

    Args:
        n_components: K.
        n_features: D; may be left out and is then taken from the first data.
        covariance: ``"full"``, ``"tied"``, ``"diag"`` or ``"spherical"``.
        tol: EM stops when the mean log likelihood changes by less.
        reg_covar: added to the diagonal of every covariance.
        max_iter: of EM; :class:`ConvergenceWarning` when they run out.
        n_init: starts; the best is kept.
        init_params: ``"kmeans"`` (k-means++ and Lloyd) or ``"random"`` responsibilities.
        weights_init, means_init, precisions_init: a start of one's own, each may be given alone.
        warm_start: `fit` starts from the last solution.
        random_state: an int, a torch.Generator, or None for torch's default one.

    Attributes:
        weights [K], means [K, D], scale_trils [K, D, D] (or [K, D], [K]): buffers, in state_dict. labels [K]: each
        component's class, -1 where it has none. converged_, n_iter_, lower_bound_ as in scikit-learn.

    Raises:
        ValueError: numbers out of range, an unknown `covariance` or `init_params`; data that does not fit or is not
            finite.

    Example:
        >>> gmm = fastcl.nn.GaussianMixture(2).fit(torch.cat([torch.randn(50, 3), torch.randn(50, 3) + 9]))
        >>> gmm.sample(4)[0].shape
        torch.Size([4, 3])
    """

    def __init__(
        self,
        n_components: int = 1,
        n_features: int | None = None,
        covariance: str = "full",
        *,
        tol: float = 1e-3,
        reg_covar: float = 1e-6,
        max_iter: int = 100,
        n_init: int = 1,
        init_params: str = "kmeans",
        weights_init: Array | None = None,
        means_init: Array | None = None,
        precisions_init: Array | None = None,
        warm_start: bool = False,
        random_state: int | torch.Generator | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("n_components", n_components), ("max_iter", max_iter), ("n_init", n_init)):
            if not (isinstance(value, int) and value >= 1):
                raise ValueError(f"{name} is {value} but must be an integer, at least 1")
        for name, number in (("tol", tol), ("reg_covar", reg_covar)):
            if not 0 <= number < float("inf"):
                raise ValueError(f"{name} is {number} but must be finite and not negative")
        if covariance not in em.COVARIANCES:
            raise ValueError(f"covariance is {covariance!r} but must be one of {', '.join(em.COVARIANCES)}")
        if init_params not in ("kmeans", "random"):
            raise ValueError(f"init_params is {init_params!r} but must be kmeans or random")
        self.n_components, self.covariance = n_components, covariance
        self.tol, self.reg_covar, self.max_iter, self.n_init = tol, reg_covar, max_iter, n_init
        self.init_params, self.warm_start, self.random_state = init_params, warm_start, random_state
        self.weights_init, self.means_init, self.precisions_init = weights_init, means_init, precisions_init
        self.converged_, self.n_iter_, self.lower_bound_ = False, 0, float("-inf")
        self._moments: em.Moments | None = None  # of a stream
        self._batches = 0
        for name in ("weights", "means", "scale_trils", "labels"):
            self.register_buffer(name, None)
        if n_features is not None:
            self._standard(n_features, torch.get_default_dtype(), torch.device("cpu"))

    def _standard(self, d: int, dtype: torch.dtype, device: torch.device) -> None:
        """Equal standard normals: something to sample from and to load a state into."""
        if d < 1:
            raise ValueError(f"n_features is {d} but must be at least 1")
        k = self.n_components
        shape = {"diag": (k, d), "spherical": (k,)}.get(self.covariance, (k, d, d))
        ones = torch.ones(shape, dtype=dtype, device=device)
        self.weights = torch.full((k,), 1 / k, dtype=dtype, device=device)
        self.means = torch.zeros(k, d, dtype=dtype, device=device)
        self.scale_trils = ones * torch.eye(d, dtype=dtype, device=device) if ones.dim() == 3 else ones
        self.labels = torch.full((k,), -1, device=device)

    # ---- fitting ----

    @torch.no_grad()
    def fit(self, x: Array, y: Any = None) -> GaussianMixture:
        """EM on x [N, D], `n_init` times; `y` is ignored.

        Raises:
            ValueError: x is not [N, D] with N >= K finite samples.
        """
        x = self._data(x, at_least=self.n_components)
        generator = self._generator()
        best: tuple[float, em.Mixture, int, bool] | None = None
        starts = 1 if self.warm_start and self.converged_ else self.n_init
        for _ in range(starts):
            warm = self.warm_start and self.n_iter_ > 0
            mixture = self._mixture() if warm else self._start(x, generator)
            bound, converged, n_iter = float("-inf"), False, 0
            while n_iter < self.max_iter and not converged:
                before, n_iter = bound, n_iter + 1
                mixture, bound = self._step(x, mixture)
                converged = abs(bound - before) < self.tol
            if best is None or bound > best[0]:
                best = (bound, mixture, n_iter, converged)
        assert best is not None
        self.lower_bound_, mixture, self.n_iter_, self.converged_ = best
        self._take(mixture)
        if not self.converged_:
            warnings.warn(
                f"EM did not converge in {self.max_iter} iterations: raise max_iter or tol, or look at the data",
                ConvergenceWarning,
                stacklevel=2,
            )
        return self

    def _step(self, x: Tensor, mixture: em.Mixture) -> tuple[em.Mixture, float]:
        responsibilities, density = ops.gmm_responsibilities(x, mixture.weights, mixture.means, mixture.scale_trils)
        found = em.moments(x, responsibilities, mixture.means, self.covariance)
        following = em.maximised(found, self.covariance, self.reg_covar, x.dtype)
        return em.refilled(following, found, x, density), density.mean(dtype=torch.float64).item()

    def _start(self, x: Tensor, generator: torch.Generator | None) -> em.Mixture:
        k, d = self.n_components, x.shape[1]
        given: dict[str, Tensor] = {}
        if self.weights_init is not None:
            given["weights"] = self._initial("weights_init", self.weights_init, (k,), x)
        if self.means_init is not None:
            given["means"] = self._initial("means_init", self.means_init, (k, d), x)
        if self.precisions_init is not None:
            given["scale_trils"] = self._from_precisions(x)
        return em.Mixture(**{**({} if len(given) == 3 else vars(self._found_start(x, generator))), **given})

    def _found_start(self, x: Tensor, generator: torch.Generator | None) -> em.Mixture:
        k, middle = self.n_components, x.mean(0).expand(self.n_components, -1)
        if self.init_params == "kmeans":
            found = em.class_moments(x, em.kmeans(x, k, generator), middle, self.covariance)
        else:
            shares = torch.rand(len(x), k, generator=generator, dtype=x.dtype).to(x.device)
            found = em.moments(x, shares / shares.sum(1, keepdim=True), middle, self.covariance)
        return em.maximised(found, self.covariance, self.reg_covar, x.dtype)

    def _initial(self, name: str, value: Array, shape: tuple[int, ...], x: Tensor) -> Tensor:
        t = torch.as_tensor(value, dtype=x.dtype, device=x.device)
        if t.shape != shape or not t.isfinite().all():
            raise ValueError(f"{name} has shape {list(t.shape)} but must have {list(shape)} finite numbers")
        if name == "weights_init" and not ((t >= 0).all() and torch.isclose(t.sum(), t.new_ones(()), atol=1e-5)):
            raise ValueError(f"{name} must not be negative and add up to 1")
        return t

    def _from_precisions(self, x: Tensor) -> Tensor:
        k, d = self.n_components, x.shape[1]
        shape = {"full": (k, d, d), "tied": (d, d), "diag": (k, d), "spherical": (k,)}[self.covariance]
        given = torch.as_tensor(self.precisions_init, dtype=torch.float64, device=x.device)
        if given.shape != shape:
            raise ValueError(f"precisions_init has shape {list(given.shape)} but must have {list(shape)}")
        if self.covariance in ("diag", "spherical"):
            if not (given > 0).all():
                raise ValueError("precisions_init must be positive")
            return given.rsqrt().to(x.dtype)
        try:
            covariances = torch.cholesky_inverse(torch.linalg.cholesky(given))
        except RuntimeError:
            raise ValueError("precisions_init must be symmetric and positive definite") from None
        return torch.linalg.cholesky(covariances).expand(k, d, d).to(x.dtype)

    @torch.no_grad()
    def fit_classes(self, x: Array, y: Array) -> GaussianMixture:
        """One Gaussian for each class of labelled latents, in one pass: count, mean, covariance, Cholesky.

        Args:
            x: [N, D].
            y: [N] integers; the K classes that occur, in order, become the components, and `labels` names them.

        Raises:
            ValueError: another number of classes than components.
        """
        x = self._data(x)
        classes, component = torch.unique(self._classes_of(x, y), return_inverse=True)
        if len(classes) != self.n_components:
            raise ValueError(f"y has {len(classes)} classes but must have {self.n_components}, one a component")
        self._moments, self._batches, self.labels = None, 0, classes
        return self._add_classes(x, component)

    @torch.no_grad()
    def partial_fit(self, x: Array, y: Array | None = None) -> GaussianMixture:
        """Learns from one more batch of a stream.

        With labels: the classes' moments are added up, exactly as if all batches had come at once. Without: stepwise EM
        (Cappe & Moulines 2009), the batch's moments taking a share (t + 2)^-0.7 of the old ones.

        Raises:
            ValueError: a label that is no component's; a first batch without labels and with fewer than K samples.
        """
        x = self._data(x, at_least=1 if y is not None or self._moments is not None else self.n_components)
        if y is not None:
            labels = self._classes_of(x, y)
            if self.labels is None or (self.labels < 0).all():
                self.labels = torch.arange(self.n_components, device=x.device)
            component = torch.searchsorted(self.labels, labels).clamp(max=self.n_components - 1)
            if not torch.equal(self.labels[component], labels):
                unknown = labels[self.labels[component] != labels][0].item()
                raise ValueError(f"y has the label {unknown} but must be one of {self.labels.tolist()}")
            return self._add_classes(x, component)
        if self._moments is None:
            mixture = self._mixture() if self.n_iter_ > 0 else self._start(x, self._generator())
            joint = mixture.log_joint(x)
            self._moments = em.moments(x, joint.softmax(1), mixture.means, self.covariance)
        else:
            mixture = self._mixture()
            found = em.moments(x, mixture.log_joint(x).softmax(1), mixture.means, self.covariance)
            share, n = (self._batches + 2.0) ** -0.7, self._moments.s0.sum() / len(x)
            self._moments = self._moments.moved(found.centers).blended(found, share * n.item(), mine=1 - share)
        return self._maximise(x.dtype)

    def _add_classes(self, x: Tensor, component: Tensor) -> GaussianMixture:
        centers = x.mean(0).expand(self.n_components, -1) if self._moments is None else self._moments.centers
        found = em.class_moments(x, component, centers.to(x.dtype), self.covariance)
        self._moments = found if self._moments is None else self._moments.blended(found, 1.0, mine=1.0)
        return self._maximise(x.dtype)

    def _maximise(self, dtype: torch.dtype) -> GaussianMixture:
        assert self._moments is not None
        self._batches += 1
        self._take(em.maximised(self._moments, self.covariance, self.reg_covar, dtype))
        self.n_iter_ = max(self.n_iter_, 1)
        return self

    @torch.no_grad()
    def assign_labels(self, x: Array, y: Array) -> GaussianMixture:
        """Names every component by the class that has most of its responsibility; -1 where no sample has any."""
        x = self._fitted(x)
        labels = self._classes_of(x, y)
        classes, index = torch.unique(labels, return_inverse=True)
        shares = torch.zeros(len(classes), self.n_components, dtype=x.dtype, device=x.device)
        shares.index_add_(0, index, self._mixture().log_joint(x).softmax(1))
        self.labels = torch.where(shares.sum(0) > 0, classes[shares.argmax(0)], -1)
        return self

    # ---- what a fitted mixture says ----

    def component_log_prob(self, x: Tensor) -> Tensor:
        """log N(x | k) [N, K], differentiable in x; without the weights."""
        return ops.gmm_log_prob(x, self.means, self.scale_trils)

    def log_prob(self, x: Tensor) -> Tensor:
        """log p(x) [N], differentiable in x."""
        return self._mixture().log_joint(x).logsumexp(1)

    forward = log_prob

    @torch.no_grad()
    def score_samples(self, x: Array) -> Array:
        """log p(x) [N]."""
        return self._like(x, self.log_prob(self._fitted(x)))

    def score(self, x: Array, y: Any = None) -> float:
        """The mean of log p(x)."""
        return float(self.score_samples(x).mean())

    @torch.no_grad()
    def predict_proba(self, x: Array) -> Array:
        """Responsibilities [N, K]."""
        return self._like(x, self._mixture().log_joint(self._fitted(x)).softmax(1))

    @torch.no_grad()
    def predict(self, x: Array) -> Array:
        """The most responsible component, [N]."""
        return self._like(x, self._mixture().log_joint(self._fitted(x)).argmax(1))

    def predict_class(self, x: Array) -> Array:
        """The label of the most responsible component, [N]; -1 where it has none."""
        component = torch.as_tensor(self.predict(x))
        return self._like(x, self.labels[component.to(self.labels.device)])

    @torch.no_grad()
    def sample(self, n_samples: int = 1, *, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """(x [N, D], component [N]), components by their weights. `random_state` governs without a generator."""
        if n_samples < 1:
            raise ValueError(f"n_samples is {n_samples} but must be at least 1")
        if self.means is None:
            raise ValueError("this GaussianMixture is not fitted: call fit first")
        generator = generator or self._generator()
        weights = self.weights.double()
        drawn = torch.rand(n_samples, generator=generator, dtype=torch.float64).to(weights.device)
        component = torch.searchsorted(weights.cumsum(0) / weights.sum(), drawn).clamp(max=self.n_components - 1)
        component = component.sort().values  # as scikit-learn: in the components' order
        return self.sample_of(component, generator=generator), component

    @torch.no_grad()
    def sample_of(self, components: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """x [N, D] of the given components [N]: class-conditional latents."""
        return ops.gmm_sample(components, self.means, self.scale_trils, generator or self._generator())

    def bic(self, x: Array) -> float:
        """Bayesian information criterion on x; the lower, the better."""
        n = len(x)
        return -2 * self.score(x) * n + self._n_parameters() * float(np.log(n))

    def aic(self, x: Array) -> float:
        """Akaike information criterion on x; the lower, the better."""
        return -2 * self.score(x) * len(x) + 2 * self._n_parameters()

    @property
    def covariances(self) -> Tensor:
        """[K, D, D], [K, D] or [K]."""
        return self.scale_trils @ self.scale_trils.mT if self.scale_trils.dim() == 3 else self.scale_trils.square()

    # ---- inside ----

    def _n_parameters(self) -> int:
        k, d = self.means.shape
        covariances = {"full": k * d * (d + 1) // 2, "tied": d * (d + 1) // 2, "diag": k * d, "spherical": k}
        return covariances[self.covariance] + k * d + k - 1

    def _mixture(self) -> em.Mixture:
        return em.Mixture(self.weights, self.means, self.scale_trils)

    def _take(self, mixture: em.Mixture) -> None:
        self.weights, self.means, self.scale_trils = mixture.weights, mixture.means, mixture.scale_trils.contiguous()
        if self.labels is None:
            self.labels = torch.full((self.n_components,), -1, device=mixture.means.device)

    def _generator(self) -> torch.Generator | None:
        if self.random_state is None or isinstance(self.random_state, torch.Generator):
            return self.random_state
        return torch.Generator().manual_seed(self.random_state)

    def _classes_of(self, x: Tensor, y: Array) -> Tensor:
        labels = torch.as_tensor(y).to(x.device)
        if labels.shape != x.shape[:1] or labels.is_floating_point():
            raise ValueError(f"y has shape {list(labels.shape)} but must be integers, one for each of {len(x)} samples")
        return labels.long()

    def _data(self, x: Array, at_least: int = 1) -> Tensor:
        t = torch.as_tensor(x)
        if t.dim() != 2 or 0 in t.shape[1:]:
            raise ValueError(f"x has shape {list(t.shape)} but must be [N, D]")
        if len(t) < at_least:
            raise ValueError(f"x has {len(t)} samples but must have at least {at_least}, one a component")
        if t.dtype not in (torch.float32, torch.float64):
            t = t.float() if t.is_floating_point() else t.double()
        if not t.sum().isfinite() and not t.isfinite().all():  # the sum is 10 times as fast
            raise ValueError("x has NaN or infinite values but must be finite")
        if self.means is not None and t.shape[1] != self.means.shape[1]:
            raise ValueError(f"x has {t.shape[1]} features but must have {self.means.shape[1]}")
        return t.detach()

    def _fitted(self, x: Array) -> Tensor:
        if self.means is None:
            raise ValueError("this GaussianMixture is not fitted: call fit first")
        return self._data(x).to(self.means)

    def _like(self, x: Array, result: Tensor) -> Array:
        return result if isinstance(x, Tensor) else result.cpu().numpy()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        before, means = dict(self._buffers), state_dict.get(prefix + "means")
        if self.means is None and isinstance(means, Tensor) and means.dim() == 2 and len(means) == self.n_components:
            self._standard(means.shape[1], means.dtype, means.device)
        wrong = misfit(state_dict, self._buffers, prefix, strict=args[1])
        if not wrong and (bad := [n for n in self._buffers if not em.usable(n, state_dict.get(prefix + n))]):
            wrong = f"{prefix}{bad[0]} has values that no mixture has (NaN, infinite, a scale or weight below 0)"
        if wrong:
            self._buffers.update(before)
            args[-1].append(wrong)
            return
        super()._load_from_state_dict(state_dict, prefix, *args)
        self.n_iter_ = max(self.n_iter_, 1)
