"""What `fastcl bench` runs: a contest a hot path, against eager torch and torch.compile, on the user's own machine."""

from __future__ import annotations

import platform
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from .mixtures import em_iteration, log_prob, sampling
from .race import Call, Compiled, Contest, copy_rate, human, processor, race
from .workloads import SHAPES, convnet, fisher, masked_grad, masked_step, masked_weight, mlp, penalty, soft_threshold

__all__ = [
    "SHAPES",
    "Call",
    "Compiled",
    "Contest",
    "contests",
    "copy_rate",
    "human",
    "processor",
    "race",
    "run",
    "table",
]


def contests(device: torch.device, compiled: Compiled, quick: bool = False) -> dict[str, Callable[[], Contest]]:
    """What is run, by name, each made when called: with the tensors of bench/results, small ones if `quick`."""
    big = SHAPES["MLP 0.5M" if quick else "DCGAN 9.9M"]
    n = "0.5M" if quick else "9.9M"
    weights, latents, samples = (100_000, 5_000, 2_000) if quick else (10_000_000, 100_000, 20_000)

    def images(make: Callable[[], torch.nn.Module], *shape: int) -> Contest:
        net = make().to(device).eval()
        x, y = torch.randn(shape, device=device), torch.randint(0, 10, shape[:1], device=device)
        return fisher(net, x, y, n_batches=1)

    batch = 16 if quick else 128
    found: dict[str, Callable[[], Contest]] = {
        f"masked_grad_, bool mask, {n}": partial(masked_grad, device, compiled, big),
        f"MaskedAdam step, bool mask, {n}": partial(masked_step, device, big),
        f"masked_weight, forward + backward, {weights:,}": partial(masked_weight, device, compiled, weights),
        f"EWC penalty with gradient, {n}": partial(penalty, device, compiled, big),
        f"exact Fisher of {batch}, MLP 0.5M": partial(images, mlp, batch, 1, 28, 28),
        f"exact Fisher of {batch}, 4-conv net": partial(images, convnet, batch, 3, 32, 32),
        f"gmm_sample, {latents:,}, K = 10, D = 32": partial(sampling, device, 10, 32, latents),
        f"gmm_log_prob, {samples:,}, K = 10, D = 32": partial(log_prob, device, compiled, 10, 32, samples),
        f"EM iteration, {samples:,}, K = 10, D = 32": partial(em_iteration, device, 10, 32, samples),
        f"soft_threshold_, {n}": partial(soft_threshold, device, compiled, big),
    }
    if not quick:
        tiny = SHAPES["200 tiny tensors"]
        found["masked_grad_, 200 tensors of 16"] = partial(masked_grad, device, compiled, tiny)
        found["MaskedAdam step, 200 tensors of 16"] = partial(masked_step, device, tiny)
    return found


def run(
    device: torch.device | str = "cpu",
    quick: bool = False,
    compile: bool = True,
    report: Callable[[str, int, int], None] = lambda name, done, total: None,
) -> dict[str, Any]:
    """Every contest, compared and then timed: the machine, the versions and median seconds by contender (JSON-able).

    `report(name, done, total)` is called before each. torch.compile takes part where it works here; where it does not,
    the result's ``notes`` say why.

    Raises:
        RuntimeError: a contender gives another result than the others (a bug: nothing of it is timed).

    Example:
        >>> fastcl.bench.run(quick=True, compile=False)["cases"][0]["medians"]  # doctest: +SKIP
        {'fastcl': 3.1e-05, 'loop (1 - m) * g': 0.00011, ...}
    """
    from .. import __version__, build_info

    device = torch.device(device)
    notes = ["torch.compile left out"] if not compile else _why_not_compiled(device)

    def compiled(f: Call) -> dict[str, Call]:
        if notes:
            return {}
        torch._dynamo.reset()
        return {"torch.compile": torch.compile(f, dynamic=False)}

    cases = []
    made = contests(device, compiled, quick)
    for i, (name, make) in enumerate(made.items()):
        report(name, i, len(made))
        torch.manual_seed(0)
        contest = make()
        try:
            medians = race(contest, device, *((3, 5e-4) if quick else ()))
        except AssertionError as error:
            raise RuntimeError(f"{name}: a contender gives another result than the others: {error}") from error
        if contest.n_bytes is not None:
            medians["floor"] = contest.n_bytes / copy_rate(device, contest.n_bytes)
        cases.append({"name": name, "medians": medians})
    return {
        "fastcl": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "processor": processor(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "threads": torch.get_num_threads(),
        "kernels": sorted(set(build_info()["kernels"].values())),
        "quick": quick,
        "notes": notes,
        "cases": cases,
    }


def _why_not_compiled(device: torch.device) -> list[str]:
    """Empty where torch.compile works; else one sentence."""
    try:
        torch._dynamo.reset()
        torch.compile(lambda x: x + 1)(torch.zeros(8, device=device))
    except Exception as error:  # no compiler, no triton, a Python it does not know: whatever it is, it is written down
        return [f"torch.compile does not work here: {type(error).__name__}: {str(error).strip().splitlines()[0]}"]
    return []


def table(result: dict[str, Any]) -> str:
    """The result as markdown."""
    lines = [
        "# fastcl bench" + (", quick" if result["quick"] else ""),
        "",
        "Medians of interleaved rounds, results compared first. Ratios are the contender's time over fastcl's: above 1 "
        "fastcl is faster. `floor`: the bytes that must move, at torch's copy rate here.",
        "",
        f"fastcl {result['fastcl']} ({' and '.join(result['kernels'])} kernels), torch {result['torch']}, Python "
        f"{result['python']}, {result['device']}, {result['processor']}, {result['threads']} threads.",
        *(f"{note}." for note in result["notes"]),
        *("", "| case | fastcl | others, as ratios |", "|---|---|---|"),
    ]
    for case in result["cases"]:
        mine = case["medians"]["fastcl"]
        others = ", ".join(f"{k} **{v / mine:.2f}**" for k, v in case["medians"].items() if k != "fastcl")
        lines.append(f"| {case['name']} | {human(mine)} | {others} |")
    return "\n".join(lines) + "\n"
