"""Mixture kernels: distributions, one stream for every batch and thread count, densities, moments, gradients."""

from __future__ import annotations

import itertools
import math
import multiprocessing
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

import fastcl
from fastcl.ops import gmm
from fastcl.ops.gmm import reference

WIDTHS = [1, 3, 4, 5, 8, 15, 17, 33, 50]


def mixture(k: int, d: int, kind: str, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    means = 3 * torch.randn(k, d, dtype=dtype)
    if kind == "full":
        a = 0.3 * torch.randn(k, d, d, dtype=dtype)
        return means, torch.linalg.cholesky(a @ a.mT + torch.eye(d, dtype=dtype))
    return means, torch.rand((k, d) if kind == "diagonal" else (k,), dtype=dtype) + 0.5


KINDS = ["full", "diagonal", "spherical"]


def whole(scale: Tensor, d: int) -> Tensor:
    """Factors [K, D, D] of any kind."""
    if scale.dim() == 3:
        return scale
    return torch.diag_embed(scale if scale.dim() == 2 else scale.unsqueeze(1).expand(-1, d))


# ---- sampling ----


def test_philox_is_the_published_one() -> None:
    """Known answers of Random123 (Salmon et al. 2011)."""
    ones = 0xFFFFFFFF
    for counter, key, want in (
        ([0] * 4, (0, 0), [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([ones] * 4, (ones, ones), [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            (0xA4093822, 0x299F31D0),
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ):
        assert [int(w) for w in reference.philox([torch.tensor(c) for c in counter], *key)] == want


@pytest.mark.parametrize("kind", KINDS)
def test_moments_of_samples(kind: str) -> None:
    means, scale = mixture(3, 5, kind, torch.float32)
    labels = torch.arange(60000) % 3
    z = fastcl.ops.gmm_sample(labels, means, scale)
    factors = whole(scale, 5)
    for k in range(3):
        mine = z[labels == k].double()
        covariance = (factors[k] @ factors[k].T).double()
        deviation = covariance.diagonal().sqrt()
        assert ((mine.mean(0) - means[k]).abs() < 5 * deviation / math.sqrt(len(mine))).all()
        found = torch.cov(mine.T)
        torch.testing.assert_close(found, covariance, rtol=0, atol=6 * float(deviation.max()) ** 2 / math.sqrt(20000))


def test_normals_pass_kolmogorov_and_smirnov() -> None:
    n, d = 100000, 8
    z = fastcl.ops.gmm_sample(torch.zeros(n, dtype=torch.int64), torch.zeros(1, d), torch.ones(1, d)).double()
    steps = torch.arange(1, n + 1, dtype=torch.float64) / n
    for j in range(d):
        cdf = torch.special.ndtr(z[:, j].sort().values)
        distance = torch.maximum((steps - cdf).abs(), (steps - 1 / n - cdf).abs()).max()
        assert distance * math.sqrt(n) < 2.0  # p = 0.0007 for one; the seed is fixed
    assert z.abs().max() > 4
    correlation = torch.corrcoef(z.T) - torch.eye(d, dtype=torch.float64)
    assert correlation.abs().max() < 5 / math.sqrt(n)


@pytest.mark.skipif(fastcl.build_info()["pure_python"], reason="the products are torch's own")
@pytest.mark.parametrize("kind", KINDS)
def test_a_sample_depends_on_nothing_but_its_number(kind: str) -> None:
    """Same key: any other labels, any order, any number of samples and threads leave its bits alone."""
    means, scale = mixture(4, 37, kind, torch.float32)
    key = torch.tensor([-5])
    labels = torch.randint(0, 4, (1000,))
    z = gmm._gmm_sample(labels, means, scale, key)
    assert torch.equal(gmm._gmm_sample(labels[:123], means, scale, key), z[:123])
    other = labels.clone()
    other[::2] = (other[::2] + 1) % 4
    assert torch.equal(gmm._gmm_sample(other, means, scale, key)[1::2], z[1::2])
    for threads in range(1, 9):
        torch.set_num_threads(threads)
        assert torch.equal(gmm._gmm_sample(labels, means, scale, key), z)
    assert not torch.equal(gmm._gmm_sample(labels, means, scale, key + 1), z)


@pytest.mark.parametrize("k", [5, 100])  # the factors of 100 do not stay in the cache: components one after the other
@pytest.mark.parametrize("kind", KINDS)
def test_many_samples_of_unlike_components(kind: str, k: int) -> None:
    """Labels are grouped in chunks of 16384, and components take turns: some have few samples, and two have none."""
    n, d = 40_001, 40
    means, scale = mixture(k, d, kind)
    labels = (torch.rand(n) ** 3 * (k - 2)).long()
    labels[20_000:30_000] = k - 3
    eps = reference.normals(torch.arange(n), d, 77, torch.float64)
    factors = whole(scale, d)
    z = gmm._gmm_sample(labels, means, scale, torch.tensor([77]))
    for c in range(k):
        mine = labels == c
        torch.testing.assert_close(z[mine], means[c] + eps[mine] @ factors[c].T, rtol=0, atol=1e-11)
    counts = fastcl.ops.gmm_class_statistics(z, labels, means)[0]
    assert torch.equal(counts, labels.bincount(minlength=k).double())
    labels[[20_000, 39_000]] = torch.tensor([-3, k])
    with pytest.raises(ValueError, match="labels has -3 but must lie between"):
        fastcl.ops.gmm_sample(labels, means, scale)


def drawn(seed: int, queue: multiprocessing.Queue | None = None) -> list[float]:
    torch.manual_seed(seed)
    z = fastcl.ops.gmm_sample(torch.arange(40) % 2, torch.zeros(2, 3), torch.ones(2, 3)).flatten().tolist()
    if queue is not None:
        queue.put(z)
    return z


def test_seeds_and_generators() -> None:
    assert drawn(3) == drawn(3)
    assert drawn(3) != drawn(4)
    labels, means, scale = torch.zeros(9, dtype=torch.int64), torch.zeros(1, 2), torch.ones(1, 2)
    first, second = (fastcl.ops.gmm_sample(labels, means, scale, torch.Generator().manual_seed(7)) for _ in range(2))
    assert torch.equal(first, second)
    generator = torch.Generator().manual_seed(7)
    before = torch.get_rng_state()
    draws = [fastcl.ops.gmm_sample(labels, means, scale, generator) for _ in range(2)]
    assert torch.equal(draws[0], first)
    assert not torch.equal(draws[1], first)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_same_in_another_process() -> None:
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=drawn, args=(11, queue))
    process.start()
    assert queue.get(timeout=120) == drawn(11)
    process.join()


def test_half_precision_follows_the_same_stream() -> None:
    means, scale = mixture(3, 6, "full", torch.float32)
    labels, key = torch.arange(30) % 3, torch.tensor([1])
    for dtype in (torch.bfloat16, torch.float16):
        exact = gmm._gmm_sample(labels, means.to(dtype).float(), scale.to(dtype).float(), key)
        assert torch.equal(gmm._gmm_sample(labels, means.to(dtype), scale.to(dtype), key), exact.to(dtype))
    wide = gmm._gmm_sample(labels, means.double(), scale.double(), key)
    torch.testing.assert_close(gmm._gmm_sample(labels, means, scale, key).double(), wide, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_reparametrised_gradient(kind: str) -> None:
    means, scale = (t.requires_grad_() for t in mixture(2, 3, kind))
    labels, key = torch.tensor([0, 1, 1, 0, 1]), torch.tensor([9])

    def sample(m: Tensor, s: Tensor) -> Tensor:
        return gmm._gmm_sample(labels, m, s.tril() if kind == "full" else s, key)

    assert torch.autograd.gradcheck(sample, (means, scale))


# ---- densities ----


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("d", WIDTHS)
def test_log_prob_is_torchs(kind: str, d: int) -> None:
    means, scale = mixture(4, d, kind)
    x = 2 * torch.randn(101, d, dtype=torch.float64)
    want = torch.distributions.MultivariateNormal(means, scale_tril=whole(scale, d)).log_prob(x.unsqueeze(1))
    torch.testing.assert_close(fastcl.ops.gmm_log_prob(x, means, scale), want, rtol=1e-11, atol=1e-10)
    narrow = fastcl.ops.gmm_log_prob(x.float(), means.float(), scale.float())
    torch.testing.assert_close(narrow.double(), want, rtol=2e-5, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_log_prob_gradients(kind: str) -> None:
    x = torch.randn(7, 3, dtype=torch.float64, requires_grad=True)
    means, scale = (t.requires_grad_() for t in mixture(2, 3, kind))

    def density(a: Tensor, m: Tensor, s: Tensor) -> Tensor:
        return fastcl.ops.gmm_log_prob(a, m, s.tril() if kind == "full" else s)

    assert torch.autograd.gradcheck(density, (x, means, scale))


@pytest.mark.parametrize("far", [(), (0,), (1,), (40, 70), (4, 8, 73), range(1, 74), range(74)], ids=str)
@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_components_near_and_far_from_the_middle(far: Sequence[int], offset: float) -> None:
    """float32 without a factor takes them by different formulas, by registers and by what is left over of them."""
    means, deviation = mixture(74, 37, "diagonal")
    means = 0.1 * means + offset
    for k in far:
        means[k] += (100 if k > 0 else 3e5) * deviation[k]  # 100: the others stay near; 3e5: the middle is far from all
    means, deviation = means.float(), deviation.float()
    labels = torch.arange(200) % 74
    x = means[labels] + deviation[labels] * torch.randn(200, 37)
    found = fastcl.ops.gmm_log_prob(x, means, deviation).double()
    want = reference.gmm_log_prob(x.double(), means.double(), deviation.double())
    torch.testing.assert_close(found, want, rtol=3e-6, atol=1e-4)
    alone = torch.stack([fastcl.ops.gmm_log_prob(x[i : i + 1], means, deviation)[0] for i in range(0, 200, 67)])
    assert torch.equal(alone.double(), found[::67])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("k", [1, 4, 5, 13, 16, 20, 31, 33, 48, 66])
def test_any_number_of_components_features_and_samples(k: int, dtype: torch.dtype) -> None:
    """Registers of components that are full or not, in pairs and alone, and what is left over; tiles of samples."""
    for d, offset in itertools.product((1, 7, 16, 37, 48), (0.0, 50.0)):
        means, deviation = mixture(k, d, "diagonal")
        means, deviation = (means + offset).to(dtype), deviation.to(dtype)
        labels = torch.arange(109) % k
        x = (means[labels].double() + deviation[labels].double() * torch.randn(109, d)).to(dtype)
        weights = torch.rand(k).to(dtype)
        exact = [t.double() for t in (x, weights, means, deviation)]
        want, shared = reference.gmm_log_prob(exact[0], *exact[2:]), reference.gmm_responsibilities(*exact)
        eps = torch.finfo(dtype).eps
        for n in (1, 3, 12, 13, 95, 97, 109):
            found = fastcl.ops.gmm_log_prob(x[:n], means, deviation)
            torch.testing.assert_close(found.double(), want[:n], rtol=10 * eps, atol=1e3 * min(eps, 1e-7))
            whole_x = fastcl.ops.gmm_log_prob(x, means, deviation)
            assert torch.equal(found, whole_x[:n])
            for got, right in zip(
                fastcl.ops.gmm_responsibilities(x[:n], weights, means, deviation), shared, strict=True
            ):
                torch.testing.assert_close(
                    got.double(), right[:n], rtol=max(1e4 * min(eps, 1e-7), eps), atol=max(1e3 * min(eps, 1e-7), eps)
                )


def test_ill_conditioned_factors() -> None:
    """Within the digits that float32 has for such a factor."""
    deviation = torch.logspace(-4, 3, 8).double()
    rotation = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64)).Q
    scale = torch.linalg.cholesky((rotation * deviation.square()) @ rotation.T).unsqueeze(0)
    x = torch.randn(50, 8, dtype=torch.float64) @ scale[0].T
    means = torch.zeros(1, 8, dtype=torch.float64)
    want = torch.distributions.MultivariateNormal(means, scale_tril=scale).log_prob(x.unsqueeze(1))
    torch.testing.assert_close(fastcl.ops.gmm_log_prob(x, means, scale), want, rtol=1e-6, atol=1e-6)


def test_nan_stays_with_its_sample() -> None:
    means, scale = mixture(2, 3, "full")
    x = torch.zeros(60, 3, dtype=torch.float64)
    x[17, 1] = math.nan
    found = fastcl.ops.gmm_log_prob(x, means, scale)
    assert found[17].isnan().all()
    assert found.isfinite().sum() == 118


# ---- moments ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("d", WIDTHS)
def test_responsibilities_are_bayes_rule(kind: str, d: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    k, n = 5, 101
    means, scale = mixture(k, d, kind, dtype)
    x, weights = 2 * torch.randn(n, d, dtype=dtype), torch.rand(k, dtype=dtype)
    wide = torch.distributions.MultivariateNormal(means.double(), scale_tril=whole(scale, d).double())
    joint = wide.log_prob(x.double().unsqueeze(1)) + weights.double().log()
    shares, density = fastcl.ops.gmm_responsibilities(x, weights, means, scale)
    precision = {"rtol": 1e-10, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(density.double(), joint.logsumexp(1), **precision)
    torch.testing.assert_close(shares.double(), joint.softmax(1), **precision)


def test_far_components_have_no_share() -> None:
    """Zero, not a subnormal number: by a weight of 0, and where less than e^-60 is left."""
    means, ones = torch.tensor([[0.0], [5.0], [10.0], [14.0]]), torch.ones(4, 1)
    shares, density = fastcl.ops.gmm_responsibilities(
        torch.zeros(1, 1), torch.tensor([1.0, 0.0, 1.0, 1.0]), means, ones
    )
    assert shares[0, 0] == 1
    assert shares[0, 1] == shares[0, 3] == 0
    assert shares[0, 2].item() == pytest.approx(math.exp(-50), rel=1e-5)
    assert density.item() == pytest.approx(-0.5 * math.log(2 * math.pi))


@pytest.mark.parametrize("at", [0, 47, 48, 100])
@pytest.mark.parametrize("kind", KINDS)
def test_responsibilities_of_a_nan_sample_are_nan(kind: str, at: int) -> None:
    means, scale = mixture(3, 4, kind)
    x = torch.randn(101, 4, dtype=torch.float64)
    whole_x = fastcl.ops.gmm_responsibilities(x, torch.ones(3).double(), means, scale)
    for value in (math.nan, math.inf):
        x[at, 2] = value
        for found, before in zip(
            fastcl.ops.gmm_responsibilities(x, torch.ones(3).double(), means, scale), whole_x, strict=True
        ):
            assert found[at].isnan().all()
            keep = torch.arange(101) != at
            assert torch.equal(found[keep], before[keep])


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        ([1.0, -0.5], "weights of component 1 is -0.5 but must be finite and not negative"),
        ([math.inf, 1.0], "weights of component 0 is inf but must be finite and not negative"),
        ([1.0, math.nan], "weights of component 1 is nan but must be finite and not negative"),
        ([0.0, 0.0], "weights are all 0"),
        ([1.0], r"weights must be \[K\] with the K of means, 2"),
    ],
)
def test_wrong_weights_are_refused(weights: list[float], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        fastcl.ops.gmm_responsibilities(torch.zeros(3, 1), torch.tensor(weights), torch.zeros(2, 1), torch.ones(2, 1))


@pytest.mark.parametrize("full", [True, False])
@pytest.mark.parametrize("d", WIDTHS)
def test_statistics_are_their_definition(full: bool, d: int) -> None:
    n, k = 1931, 3
    x, r, c = (torch.randn(*s, dtype=torch.float64) for s in ((n, d), (n, k), (k, d)))
    apart = x.unsqueeze(1) - c
    s2 = torch.einsum("nk,nki,nkj->kij", r, apart, apart)
    want = (r.sum(0), torch.einsum("nk,nki->ki", r, apart), s2 if full else s2.diagonal(dim1=1, dim2=2))
    torch.testing.assert_close(fastcl.ops.gmm_statistics(x, r, c, full=full), want, rtol=1e-9, atol=1e-9)
    narrow = fastcl.ops.gmm_statistics(x.float(), r.float(), c.float(), full=full)
    torch.testing.assert_close(narrow, want, rtol=1e-4, atol=1e-3)
    labels = torch.randint(0, k, (n,))
    one_hot = torch.nn.functional.one_hot(labels, k).double()
    torch.testing.assert_close(
        fastcl.ops.gmm_class_statistics(x, labels, c, full=full),
        fastcl.ops.gmm_statistics(x, one_hot, c, full=full),
        rtol=1e-10,
        atol=1e-10,
    )


def test_second_moments_are_symmetric_to_the_last_bit() -> None:
    x = torch.randn(500, 61)
    s2 = fastcl.ops.gmm_class_statistics(x, torch.zeros(500, dtype=torch.int64), torch.zeros(1, 61))[2]
    assert torch.equal(s2, s2.mT)


# ---- bad input ----

BAD = {
    "negative label": (lambda y, m, s: (torch.tensor([0, -1]), m, s), "labels has -1 but must lie between 0 and 1"),
    "unknown label": (lambda y, m, s: (torch.tensor([0, 2]), m, s), "labels has 2 but must lie between 0 and 1"),
    "float labels": (lambda y, m, s: (y.float(), m, s), "labels must be an int64"),
    "no component": (lambda y, m, s: (y[:0], m[:0], s[:0]), "at least one component"),
    "other features": (lambda y, m, s: (y, m, s[:, :2, :2]), "scale_trils must be"),
    "other components": (lambda y, m, s: (y, m, s[:1]), "scale_trils must be"),
    "other dtype": (lambda y, m, s: (y, m, s.double()), "scale_trils must have the dtype of means"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_mixtures_are_refused(case: str) -> None:
    make, message = BAD[case]
    means, scale = mixture(2, 3, "full", torch.float32)
    with pytest.raises(ValueError, match=message):
        fastcl.ops.gmm_sample(*make(torch.tensor([0, 1]), means, scale))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
def test_degenerate_factors_are_refused(kind: str, value: float) -> None:
    means, scale = mixture(2, 3, kind)
    (scale.diagonal(dim1=1, dim2=2) if kind == "full" else scale)[1] = value
    with pytest.raises(ValueError, match="component 1 must have a positive, finite diagonal"):
        fastcl.ops.gmm_log_prob(torch.zeros(1, 3, dtype=torch.float64), means, scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("covariance", ["full", "diagonal", "spherical"])
def test_blocks_of_samples_do_not_show(dtype: torch.dtype, covariance: str) -> None:
    """Whichever thread takes a block, and where it ends: 300 samples at once are what 50 at a time are."""
    k, d = 3, 5
    x, means, weights = torch.randn(300, d).to(dtype), torch.randn(k, d).to(dtype), torch.ones(k).to(dtype) / k
    deviations = torch.rand(k, d) + 0.5
    scales = {"full": torch.diag_embed(deviations), "diagonal": deviations, "spherical": deviations[:, 0]}[covariance]
    scales = scales.to(dtype)
    parts = x.split(50)
    assert torch.equal(
        fastcl.ops.gmm_log_prob(x, means, scales), torch.cat([fastcl.ops.gmm_log_prob(p, means, scales) for p in parts])
    )
    whole = fastcl.ops.gmm_responsibilities(x, weights, means, scales)
    pieces = zip(*(fastcl.ops.gmm_responsibilities(p, weights, means, scales) for p in parts), strict=True)
    for a, b in zip(whole, pieces, strict=True):
        assert torch.equal(a, torch.cat(b))
