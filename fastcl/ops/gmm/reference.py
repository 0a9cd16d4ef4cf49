"""Plain torch form of csrc/gmm."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import _check
from .._check import Checked

LOG_2PI = math.log(2 * math.pi)


@_check.reference
def gmm_sample(labels: Tensor, means: Tensor, scale_trils: Tensor, key: Tensor) -> Checked[Tensor]:
    op = "gmm_sample"
    _covariance(op, means, scale_trils)
    if key.dtype != torch.int64 or key.numel() != 1 or key.device not in (torch.device("cpu"), means.device):
        raise ValueError(f"{op}: key must be one int64 number on the CPU")
    _check_labels(op, labels, means)
    yield
    features = means.shape[1]
    if not _check.has_values(means):
        return means.new_empty(labels.shape[0], features)
    wide = torch.promote_types(means.dtype, torch.float32)
    eps = normals(torch.arange(len(labels), device=means.device), features, int(key.item()), wide)
    out = means.to(wide)[labels]
    scale = scale_trils.to(wide)
    if scale.dim() == 3:
        for k in labels.unique().tolist():
            rows = labels == k
            out[rows] += eps[rows] @ scale[k].tril().T
    else:
        out += eps * (scale[labels] if scale.dim() == 2 else scale[labels].unsqueeze(1))
    return out.to(means.dtype)


def normals(samples: Tensor, features: int, key: int, dtype: torch.dtype) -> Tensor:
    """Standard normals [samples, features]: a function of the key, the sample's number and the feature alone."""
    quads = (features + 3) // 4
    low, high = samples & _WORD, samples >> 32
    quad = torch.arange(quads, device=samples.device)
    counter = [quad.expand(len(samples), quads), low.unsqueeze(1), torch.zeros_like(quad), high.unsqueeze(1)]
    words = philox([c.expand(len(samples), quads) for c in counter], key & _WORD, key >> 32 & _WORD)
    first, second = box_muller(words[0], words[1], dtype), box_muller(words[2], words[3], dtype)
    return torch.stack([*first, *second], 2).reshape(len(samples), 4 * quads)[:, :features]


_WORD = 0xFFFFFFFF


def philox(counter: list[Tensor], key0: int, key1: int) -> list[Tensor]:
    """Philox4x32-10 (Salmon et al. 2011) on int64 tensors of 32-bit words."""
    c0, c1, c2, c3 = counter
    for _ in range(10):
        high0, low0 = _product(0xD2511F53, c0)
        high1, low1 = _product(0xCD9E8D57, c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ key0, low1, high0 ^ c3 ^ key1, low0
        key0, key1 = key0 + 0x9E3779B9 & _WORD, key1 + 0xBB67AE85 & _WORD
    return [c0, c1, c2, c3]


def _product(factor: int, word: Tensor) -> tuple[Tensor, Tensor]:
    """The high and low word of a 64-bit product, by halves: int64 cannot hold all 64 bits unsigned."""
    low = (factor & 0xFFFF) * word
    middle = (factor >> 16) * word + (low >> 16)
    return middle >> 16, (middle << 16 | low & 0xFFFF) & _WORD


def box_muller(a: Tensor, b: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Two words to two normals; the radius' uniform number is defined as rounded to float32, in every dtype."""
    u = a.to(torch.float32) * 2.0**-32 + 2.0**-33
    radius = torch.sqrt(-2 * torch.log(u.to(dtype)))
    angle = b.double() * (2 * math.pi * 2.0**-32)
    return (radius * torch.cos(angle)).to(dtype), (radius * torch.sin(angle)).to(dtype)


@_check.reference
def gmm_log_prob(x: Tensor, means: Tensor, scale_trils: Tensor) -> Checked[Tensor]:
    op = "gmm_log_prob"
    kind = _covariance(op, means, scale_trils)
    _check_matrix(op, "x", x, None, "N", means.shape[1], "D", means, "means")
    _check_deviations(op, _deviations(scale_trils, kind))
    yield
    if not _check.has_values(x):
        return x.new_empty(x.shape[0], means.shape[0])
    return _log_prob(x, means, scale_trils, kind).to(x.dtype)


@_check.reference
def gmm_responsibilities(
    x: Tensor, weights: Tensor, means: Tensor, scale_trils: Tensor
) -> Checked[tuple[Tensor, Tensor]]:
    op = "gmm_responsibilities"
    kind = _covariance(op, means, scale_trils)
    _check_matrix(op, "x", x, None, "N", means.shape[1], "D", means, "means")
    _check.device(op, "weights", weights, "means", means)
    if weights.dtype != means.dtype:
        raise ValueError(f"{op}: weights must have the dtype of means")
    if weights.shape != means.shape[:1]:
        raise ValueError(f"{op}: weights must be [K] with the K of means, {means.shape[0]}")
    if _check.has_values(weights):
        for k, w in enumerate(weights.tolist()):
            if not 0 <= w < math.inf:
                raise ValueError(f"{op}: weights of component {k} is {w:g} but must be finite and not negative")
        if not weights.any():
            raise ValueError(f"{op}: weights are all 0")
    _check_deviations(op, _deviations(scale_trils, kind))
    yield
    if not _check.has_values(x):
        return x.new_empty(x.shape[0], means.shape[0]), x.new_empty(x.shape[0])
    return shares(_log_prob(x, means, scale_trils, kind), weights, x.dtype)


def shares(log_prob: Tensor, weights: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Responsibilities and the mixture's log density from the components' log densities [N, K]."""
    joint = log_prob + weights.to(log_prob.dtype).log()
    below = joint - joint.amax(1, keepdim=True)
    small = below < (-600 if joint.dtype == torch.float64 else -60)
    responsibilities = torch.softmax(torch.where(small, -math.inf, below), 1)
    finite = torch.where(responsibilities.isnan().any(1), math.nan, joint.logsumexp(1))
    return responsibilities.to(dtype), finite.to(dtype)


def _deviations(scale_trils: Tensor, kind: int) -> Tensor:
    deviations = scale_trils.diagonal(dim1=1, dim2=2) if kind == 3 else scale_trils
    return deviations.unsqueeze(1) if kind == 1 else deviations


def _check_deviations(op: str, deviations: Tensor) -> None:
    if _check.has_values(deviations):
        good = ((deviations > 0) & torch.isfinite(deviations)).all(1)
        if not good.all():
            k = int((~good).nonzero()[0])
            raise ValueError(f"{op}: scale_trils of component {k} must have a positive, finite diagonal")


def _log_prob(x: Tensor, means: Tensor, scale_trils: Tensor, kind: int) -> Tensor:
    """In the arithmetic type."""
    deviations = _deviations(scale_trils, kind)
    wide = torch.promote_types(x.dtype, torch.float32)
    points, mu, scale, deviations = x.to(wide), means.to(wide), scale_trils.to(wide), deviations.to(wide)
    columns = []
    for k in range(len(mu)):  # one [N, D] at a time
        apart = points - mu[k]
        if kind == 3:
            y = torch.linalg.solve_triangular(scale[k].tril(), apart.T, upper=False).T
        else:
            y = apart / deviations[k]
        logs = deviations[k].double().log().sum() * (1 if deviations.shape[1] > 1 else mu.shape[1])
        columns.append(-0.5 * y.square().sum(1) - (logs + 0.5 * mu.shape[1] * LOG_2PI).to(wide))
    return torch.stack(columns, 1)


@_check.reference
def gmm_statistics(
    x: Tensor, responsibilities: Tensor, centers: Tensor, full: bool
) -> Checked[tuple[Tensor, Tensor, Tensor]]:
    op = "gmm_statistics"
    _check_centers(op, x, centers)
    _check_matrix(op, "responsibilities", responsibilities, x.shape[0], "N", centers.shape[0], "K", x, "x and centers")
    yield
    return _statistics(x, centers, full, lambda k: (x, responsibilities[:, k]))


@_check.reference
def gmm_class_statistics(
    x: Tensor, labels: Tensor, centers: Tensor, full: bool
) -> Checked[tuple[Tensor, Tensor, Tensor]]:
    op = "gmm_class_statistics"
    _check_centers(op, x, centers)
    if labels.dim() != 1 or labels.shape[0] != x.shape[0]:
        raise ValueError(f"{op}: labels must have one label for each of the {x.shape[0]} samples of x")
    _check_labels(op, labels, centers)
    yield

    def members(k: int) -> tuple[Tensor, Tensor]:
        rows = x[labels == k]
        return rows, torch.ones_like(rows[:, 0])

    return _statistics(x, centers, full, members)


def _statistics(x: Tensor, centers: Tensor, full: bool, members) -> tuple[Tensor, Tensor, Tensor]:
    components, features = centers.shape
    s0 = x.new_zeros(components, dtype=torch.float64)
    s1 = x.new_zeros(components, features, dtype=torch.float64)
    s2 = x.new_zeros(components, features, features, dtype=torch.float64) if full else torch.zeros_like(s1)
    if not _check.has_values(x):
        return s0, s1, s2
    for k in range(components):
        rows, w = members(k)
        apart, w = rows.double() - centers[k].double(), w.double()
        s0[k], s1[k] = w.sum(), w @ apart
        s2[k] = (w.unsqueeze(1) * apart).T @ apart if full else w @ apart.square()
    return s0, s1, s2


def _covariance(op: str, means: Tensor, scale_trils: Tensor) -> int:
    """How many dimensions scale_trils has: 3 full, 2 diagonal, 1 spherical."""
    _check_means(op, "means", means)
    _check.device(op, "scale_trils", scale_trils, "means", means)
    if scale_trils.dtype != means.dtype:
        raise ValueError(f"{op}: scale_trils must have the dtype of means")
    k, d = means.shape
    if scale_trils.shape not in ((k, d, d), (k, d), (k,)):
        raise ValueError(f"{op}: scale_trils must be [K, D, D], [K, D] or [K] with the K, D of means, {k} and {d}")
    return scale_trils.dim()


def _check_means(op: str, name: str, means: Tensor) -> None:
    _check.floating(op, name, means)
    if means.dim() != 2 or 0 in means.shape:
        raise ValueError(f"{op}: {name} must be [K, D] with at least one component and one feature")


def _check_centers(op: str, x: Tensor, centers: Tensor) -> None:
    _check_means(op, "centers", centers)
    _check.floating(op, "x", x)
    _check_matrix(op, "x", x, None, "N", centers.shape[1], "D", centers, "centers")


def _check_matrix(
    op: str,
    name: str,
    t: Tensor,
    rows: int | None,
    rows_of: str,
    columns: int,
    columns_of: str,
    other: Tensor,
    other_name: str,
) -> None:
    _check.device(op, name, t, other_name, other)
    if t.dtype != other.dtype:
        raise ValueError(f"{op}: {name} must have the dtype of {other_name}")
    if t.dim() != 2 or (rows is not None and t.shape[0] != rows) or t.shape[1] != columns:
        raise ValueError(f"{op}: {name} must be [{rows_of}, {columns_of}] with the sizes of {other_name}")


def _check_labels(op: str, labels: Tensor, means: Tensor) -> None:
    _check.device(op, "labels", labels, "means", means)
    if labels.dtype != torch.int64 or labels.dim() != 1:
        raise ValueError(f"{op}: labels must be an int64 {means.device.type.upper()} tensor [N]")
    if _check.has_values(labels):
        wrong = labels[(labels < 0) | (labels >= means.shape[0])]
        if len(wrong):
            raise ValueError(f"{op}: labels has {wrong[0].item()} but must lie between 0 and {means.shape[0] - 1}")
