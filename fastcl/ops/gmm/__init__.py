"""Mixtures of Gaussians: sampling, density, moments (CLN, VAE replay)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..._ops import call, define, differentiable, not_differentiable
from . import reference

_gmm_sample = define(
    "gmm_sample(Tensor labels, Tensor means, Tensor scale_trils, Tensor key) -> Tensor", reference.gmm_sample
)
_gmm_log_prob = define("gmm_log_prob(Tensor x, Tensor means, Tensor scale_trils) -> Tensor", reference.gmm_log_prob)
_gmm_responsibilities = define(
    "gmm_responsibilities(Tensor x, Tensor weights, Tensor means, Tensor scale_trils) -> (Tensor, Tensor)",
    reference.gmm_responsibilities,
)
_gmm_statistics = define(
    "gmm_statistics(Tensor x, Tensor responsibilities, Tensor centers, bool full) -> (Tensor, Tensor, Tensor)",
    reference.gmm_statistics,
)
_gmm_class_statistics = define(
    "gmm_class_statistics(Tensor x, Tensor labels, Tensor centers, bool full) -> (Tensor, Tensor, Tensor)",
    reference.gmm_class_statistics,
)


def gmm_sample(labels: Tensor, means: Tensor, scale_trils: Tensor, generator: torch.Generator | None = None) -> Tensor:
    r"""Latents of given components, :math:`z_n = \mu_{y_n} + L_{y_n}\epsilon_n`; differentiable in means and factors.

    The replay of CLN and of class-conditional VAEs. :math:`\epsilon` is Philox4x32-10 (Salmon et al. 2011) and
    Box-Muller: a function of a key, the sample's number n and the feature. The key is drawn from `generator`; the bits
    of z depend neither on the number of threads nor on the order or number of the other labels.

    Args:
        labels: y [N], int64 in [0, K).
        means: mu [K, D], float32, float64, bfloat16 or float16 (arithmetic in float32 or float64).
        scale_trils: lower triangular L [K, D, D] (what stands above the diagonal is not read), standard deviations
            [K, D], or one a component, [K]; the dtype of means.
        generator: torch's default one if None, so that ``torch.manual_seed`` governs it.

    Returns:
        z [N, D] in the dtype of means.

    Raises:
        ValueError: a label outside [0, K); shapes, dtypes or devices that do not fit.

    Cost: N D^2 FLOPs (2 N D for a diagonal) and N D normals; memory: the result, and the factors once more.

    Example:
        >>> fastcl.ops.gmm_sample(torch.tensor([0, 1]), torch.tensor([[0.0], [9.0]]), torch.zeros(2, 1))
        tensor([[0.],
                [9.]])
    """
    device = "cpu" if generator is None else generator.device
    key = torch.randint(-(2**63), 2**63 - 1, (1,), generator=generator, device=device, dtype=torch.int64)
    return call(_gmm_sample, labels, means, scale_trils, key)


def gmm_log_prob(x: Tensor, means: Tensor, scale_trils: Tensor) -> Tensor:
    r"""Log densities of every component, :math:`\log N(x_n\,|\,\mu_k, L_kL_k^\top)`; differentiable in all three.

    Args:
        x: [N, D]; float32, float64, bfloat16 or float16.
        means: mu [K, D], the dtype of x.
        scale_trils: lower triangular L [K, D, D] (what stands above the diagonal is not read), standard deviations
            [K, D], or one a component, [K]; the dtype of x.

    Returns:
        [N, K] in the dtype of x. A NaN in x gives NaN for its sample. The mixture's density is the logsumexp of these
        and the log weights.

    Raises:
        ValueError: a factor whose diagonal is not positive and finite; shapes, dtypes or devices that do not fit.

    Cost: N K D^2 FLOPs (2 or 3 N K D operations for a diagonal), K D^3 / 3 for the inverse factors; no [N, K, D].

    Example:
        >>> fastcl.ops.gmm_log_prob(torch.zeros(1, 1), torch.zeros(1, 1), torch.ones(1, 1))
        tensor([[-0.9189]])
    """
    return call(_gmm_log_prob, x, means, scale_trils)


def gmm_responsibilities(x: Tensor, weights: Tensor, means: Tensor, scale_trils: Tensor) -> tuple[Tensor, Tensor]:
    r"""The components' shares of a mixture's density, and its logarithm: the E-step of EM, in one pass.

    :math:`r_{nk} = w_k N(x_n\,|\,\mu_k, L_kL_k^\top) / p(x_n)` and :math:`\log p(x_n)` with
    :math:`p(x_n) = \sum_k w_k N(x_n\,|\,\mu_k, L_kL_k^\top)`. What is below e^-60 (float64: e^-600) of a sample's
    largest share is 0.

    Args:
        x: [N, D]; float32, float64, bfloat16 or float16.
        weights: w [K], not negative, the dtype of x; they need not add up to 1.
        means, scale_trils: as for :func:`gmm_log_prob`.

    Returns:
        r [N, K] and log p [N] in the dtype of x. A sample that is not finite gets NaN.

    Raises:
        ValueError: a negative or infinite weight, or all 0; a factor whose diagonal is not positive and finite; shapes,
            dtypes or devices that do not fit.

    Cost: :func:`gmm_log_prob`'s and an exponential for each of N K; memory: the results.

    Example:
        >>> one = torch.ones(2, 1)
        >>> r, log_density = fastcl.ops.gmm_responsibilities(one, one[:, 0], torch.tensor([[1.0], [1.0]]), one)
        >>> r
        tensor([[0.5000, 0.5000],
                [0.5000, 0.5000]])
    """
    return call(_gmm_responsibilities, x, weights, means, scale_trils)


def gmm_statistics(
    x: Tensor, responsibilities: Tensor, centers: Tensor, *, full: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    r"""Weighted moments about a centre for each component: the M-step of EM, in one pass over the samples.

    :math:`s^0_k = \sum_n r_{nk}`, :math:`s^1_k = \sum_n r_{nk} d`, :math:`s^2_k = \sum_n r_{nk} d d^\top` with
    :math:`d = x_n - c_k`. Centres near the means keep the covariance's digits.

    Args:
        x: [N, D]; float32, float64, bfloat16 or float16.
        responsibilities: r [N, K], the dtype of x; any sign.
        centers: c [K, D], the dtype of x.
        full: whole second moments, or their diagonals.

    Returns:
        s0 [K], s1 [K, D], s2 [K, D, D] (or [K, D]), all float64, summed in a fixed order.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit.

    Cost: N K D^2 FLOPs (half of the square, since s2 is symmetric); no [N, K, D] and no [N, D, D].

    Example:
        >>> x, r = torch.tensor([[1.0], [3.0]]), torch.ones(2, 1)
        >>> [t.tolist() for t in fastcl.ops.gmm_statistics(x, r, torch.tensor([[2.0]]))]
        [[2.0], [[0.0]], [[[2.0]]]]
    """
    return call(_gmm_statistics, x, responsibilities, centers, full)


def gmm_class_statistics(
    x: Tensor, labels: Tensor, centers: Tensor, *, full: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    r"""Moments of each class's samples about a centre: class-conditional Gaussians in one pass over labelled latents.

    :func:`gmm_statistics` with r = 1 for a sample's own class, at 1 / K of the cost. Classes without samples get zeros.

    Args:
        x: [N, D]; float32, float64, bfloat16 or float16.
        labels: y [N], int64 in [0, K).
        centers: c [K, D], the dtype of x.
        full: whole second moments, or their diagonals.

    Returns:
        counts [K], s1 [K, D], s2 [K, D, D] (or [K, D]), all float64.

    Raises:
        ValueError: a label outside [0, K); shapes, dtypes or devices that do not fit.

    Cost: N D^2 FLOPs.

    Example:
        >>> x, y = torch.tensor([[1.0], [3.0]]), torch.tensor([0, 0])
        >>> [t.tolist() for t in fastcl.ops.gmm_class_statistics(x, y, torch.zeros(1, 1))]
        [[2.0], [[4.0]], [[[10.0]]]]
    """
    return call(_gmm_class_statistics, x, labels, centers, full)


def _setup_sample(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    labels, means, scale_trils, key = inputs
    ctx.save_for_backward(labels, means, scale_trils, key)


def _backward_sample(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    labels, means, scale_trils, key = ctx.saved_tensors
    grad_means = grad_scale = None
    if ctx.needs_input_grad[1]:
        grad_means = torch.zeros_like(means).index_add(0, labels, grad)
    if ctx.needs_input_grad[2]:
        # the same normals again: what a standard component gives for the same key
        zero = torch.zeros_like(labels)
        eps = call(_gmm_sample, zero, torch.zeros_like(means[:1]), torch.ones_like(means[:1]), key)
        if scale_trils.dim() == 3:
            grad_scale = torch.zeros_like(scale_trils)
            for k in labels.unique().tolist():
                rows = labels == k
                grad_scale[k] = (grad[rows].T @ eps[rows]).tril()
        else:
            product = grad * eps
            product = product if scale_trils.dim() == 2 else product.sum(1)
            grad_scale = torch.zeros_like(scale_trils).index_add(0, labels, product)
    return None, grad_means, grad_scale, None


def _setup_log_prob(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward_log_prob(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    # with P = (L L^T)^-1 and d = x - mu: dx = -sum_k g P d, dmu = P sum_n g d, dL = tril(L^-T (L^-1 S L^-T - s0 I))
    x, means, scale = ctx.saved_tensors
    s0, s1, s2 = call(_gmm_statistics, x, grad, means, scale.dim() == 3)
    wide = scale.double()
    if scale.dim() == 3:
        lower = wide.tril()
        eye = torch.eye(lower.shape[1], dtype=wide.dtype, device=wide.device).expand_as(lower)
        inverse = torch.linalg.solve_triangular(lower, eye, upper=False)
        precision = inverse.mT @ inverse
        whitened = inverse @ s2 @ inverse.mT - s0[:, None, None] * eye
        grad_scale = (inverse.mT @ whitened).tril()
        grad_means = (precision @ s1.unsqueeze(2)).squeeze(2)
    else:
        deviation = wide if scale.dim() == 2 else wide.unsqueeze(1)
        precision = (1 / deviation.square()).expand(means.shape)
        grad_scale = (s2 * precision - s0.unsqueeze(1)) / deviation
        grad_scale = grad_scale if scale.dim() == 2 else grad_scale.sum(1)
        grad_means = precision * s1
    grad_x = None
    if ctx.needs_input_grad[0]:
        precision = precision.to(x.dtype)
        grad_x = torch.zeros_like(x)
        for k in range(len(means)):  # one [N, D] at a time
            apart = x - means[k]
            grad_x -= grad[:, k : k + 1] * (apart @ precision[k] if scale.dim() == 3 else apart * precision[k])
    return grad_x, grad_means.to(means.dtype), grad_scale.to(scale.dtype)


differentiable("gmm_sample", _backward_sample, _setup_sample)
differentiable("gmm_log_prob", _backward_log_prob, _setup_log_prob)
not_differentiable("gmm_responsibilities", "EM's E-step is not trained through: gmm_log_prob is differentiable")
not_differentiable("gmm_statistics", "EM's M-step is not trained through")
not_differentiable("gmm_class_statistics", "EM's M-step is not trained through")
