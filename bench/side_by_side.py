"""fastcl beside Avalanche's own plugins and beside scikit-learn's mixture: python bench/side_by_side.py

    make side-by-side       # installs avalanche-lib apart (out/integrations) and writes bench/results/side_by_side.md

The same network, data, batches and seeds; only the import differs. Before anything is timed, the weights after two
experiences at strength 0 must be equal (LwF: close at its own strength), and the mixtures' parameters from the same
start close. Rounds are interleaved; figures are medians, ratios theirs over fastcl's. Peak memory
is the kernel's high-water mark of a process of its own during the consolidation, less what it held before. The exact
importances, which both are ranked against, are computed here in float64, one sample at a time (SI: its path again, in
float64).
"""

from __future__ import annotations

import argparse
import copy
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from bench.report import human, processor  # noqa: E402
from fastcl import streams  # noqa: E402

BATCH = 64
LIBRARIES = ("avalanche", "fastcl")
METHODS = ("EWC", "MAS", "SI", "LwF")
CLOCKS = {"wall": time.perf_counter, "processor": time.process_time}
CLOCK = [time.perf_counter]
Weights = dict[str, Tensor]


def networks(shape: tuple[int, ...]) -> dict[str, Callable[[], nn.Module]]:
    channels, height, width = shape
    size = channels * height * width

    def mlp() -> nn.Module:
        hidden = [nn.Linear(size, 400), nn.ReLU(), nn.Linear(400, 400), nn.ReLU()]
        return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(400, 10))

    def convolutions() -> nn.Module:
        layers: list[nn.Module] = []
        for a, b in ((channels, 32), (32, 32), (32, 64), (64, 64)):
            layers += [nn.Conv2d(a, b, 3, padding=1), nn.ReLU()]
            if a == b:
                layers.append(nn.MaxPool2d(2))
        return nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * (height // 4) * (width // 4), 10))

    return {"MLP 2 x 400": mlp, "4 convolutions": convolutions}


def plugin(library: str, method: str, strength: float) -> Any:
    if library == "avalanche":
        from avalanche.training import plugins as module
    else:
        from fastcl.integrations import avalanche as module
    return {
        "EWC": lambda: module.EWCPlugin(strength),
        "MAS": lambda: module.MASPlugin(strength),
        "SI": lambda: module.SynapticIntelligencePlugin(strength),
        "LwF": lambda: module.LwFPlugin(strength, 2.0),
    }[method]()


def found(library: str, method: str, made: Any, model: nn.Module) -> Weights:
    """A plugin's importances after one experience, of the parameters' shapes."""
    if library == "fastcl":
        return {n: f.double() for n, f in made.regulariser.importances.items()}
    kept = {"EWC": lambda: made.importances[0], "MAS": lambda: made.importance, "SI": lambda: made.ewc_data[1]}
    shapes = {n: p.shape for n, p in model.named_parameters()}
    return {n: f.data.double().view(shapes[n]) for n, f in kept[method]().items()}


class Case:
    """A network on the data's first two tasks; `train` runs Avalanche's loop."""

    def __init__(self, data: str, root: str | None, each: int) -> None:
        stream = streams.make(streams.load(data, root), "split", "class", 5)
        self.tasks = [tuple(t[:each] for t in task.train()) for task in stream.tasks[:2]]
        self.shape = tuple(self.tasks[0][0].shape[1:])

    def train(
        self, make: Callable[[], nn.Module], library: str, method: str | None, strength: float, tasks: int, **how: Any
    ) -> tuple[nn.Module, Any, dict[str, list[float]]]:
        """The model, the plugin, and seconds of each epoch and each consolidation."""
        from avalanche.benchmarks import tensors_benchmark
        from avalanche.training.plugins import EvaluationPlugin, SupervisedPlugin
        from avalanche.training.supervised import Naive

        seconds: dict[str, list[float]] = {"epoch": [], "consolidation": []}

        class Clock(SupervisedPlugin):
            def before_training_epoch(self, strategy: Any, **kwargs: Any) -> None:
                self.start = CLOCK[0]()

            def after_training_epoch(self, strategy: Any, **kwargs: Any) -> None:
                seconds["epoch"].append(CLOCK[0]() - self.start)

        torch.manual_seed(0)
        net, made = make(), None if method is None else plugin(library, method, strength)
        if made is not None:
            consolidate, around = made.after_training_exp, how.pop("around", lambda f: f())

            def timed(strategy: Any, **kwargs: Any) -> None:
                start = CLOCK[0]()
                around(lambda: consolidate(strategy, **kwargs))
                seconds["consolidation"].append(CLOCK[0]() - start)

            made.after_training_exp = timed
        extra = how.pop("plugins", [])
        strategy = Naive(
            net,
            torch.optim.SGD(net.parameters(), 0.05),
            nn.CrossEntropyLoss(),
            train_mb_size=BATCH,
            train_epochs=how.pop("epochs", 1),
            plugins=[Clock(), *extra, *([made] if made is not None else [])],
            evaluator=EvaluationPlugin(),
        )
        dtype = next(net.parameters()).dtype
        data = [(x.to(dtype), y) for x, y in self.tasks]
        benchmark = tensors_benchmark(train_tensors=data, test_tensors=data, task_labels=[0, 0])
        torch.manual_seed(1)
        for experience in list(benchmark.train_stream)[:tasks]:
            strategy.train(experience, shuffle=False)
        return net, made, seconds

    # ---- exact importances, in float64 ----

    def exact(self, method: str, net: nn.Module, make: Callable[[], nn.Module], samples: int) -> Weights:
        if method == "SI":
            return self.path(make)
        net = copy.deepcopy(net).double().eval()
        total = {n: torch.zeros_like(p) for n, p in net.named_parameters()}
        x, y = (t[:samples] for t in self.tasks[0])
        for one, label in zip(x.double().split(1), y.split(1), strict=True):
            net.zero_grad()
            out = net(one)
            (nn.functional.cross_entropy(out, label) if method == "EWC" else out.square().sum()).backward()
            for n, p in net.named_parameters():
                total[n] += p.grad.square() if method == "EWC" else p.grad.abs()
        return {n: t / len(x) for n, t in total.items()}

    def path(self, make: Callable[[], nn.Module]) -> Weights:
        """max(-sum g dtheta, 0) / (total dtheta^2 + 1e-7), by Avalanche's loop in float64."""
        from avalanche.training.plugins import SupervisedPlugin

        omega: Weights = {}
        start: Weights = {}

        class Oracle(SupervisedPlugin):
            def before_update(self, strategy: Any, **kwargs: Any) -> None:
                self.before = {n: (p.detach().clone(), p.grad.clone()) for n, p in strategy.model.named_parameters()}
                for n, (p, _) in self.before.items():
                    start.setdefault(n, p)

            def after_update(self, strategy: Any, **kwargs: Any) -> None:
                for n, p in strategy.model.named_parameters():
                    before, g = self.before[n]
                    omega[n] = omega.get(n, 0) - g * (p.detach() - before)

        net, _, _ = self.train(lambda: make().double(), "fastcl", None, 0.0, 1, plugins=[Oracle()])
        return {n: omega[n].clamp(min=0) / ((p.detach() - start[n]).square() + 1e-7) for n, p in net.named_parameters()}


def rank_correlation(a: Weights, b: Weights) -> str:
    from scipy.stats import spearmanr

    assert set(a) == set(b)
    one, other = (torch.cat([w[n].flatten() for n in a]).numpy() for w in (a, b))
    assert np.ptp(other) > 0
    return f"{spearmanr(one, other).statistic:.4f}" if np.ptp(one) > 0 else f"all equal: {one[0]:g}"


def compared(case: Case, make: Callable[[], nn.Module], method: str) -> None:
    """Raises unless both train the same where they must."""
    strength = 2.0 if method == "LwF" else 0.0
    theirs, mine = (case.train(make, library, method, strength, 2)[0] for library in LIBRARIES)
    for (name, a), b in zip(theirs.named_parameters(), mine.parameters(), strict=True):
        if method == "LwF":
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
        elif not torch.equal(a, b):
            raise AssertionError(f"{method}: {name} differs at strength 0")


def status(field: str) -> float:
    """Megabytes of this process, from the kernel."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return float(line.split()[1]) / 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def consolidation_memory(options: argparse.Namespace, name: str, library: str, method: str) -> None:
    """In a process of its own: no epoch, so that nothing was held and let go before."""
    case = Case(options.data, options.data_root, options.samples)

    def around(consolidate: Callable[[], None]) -> None:
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark is what is held now
        before = status("VmRSS")
        consolidate()
        print(f"peak {status('VmHWM') - before:.1f}")

    case.train(networks(case.shape)[name], library, method, 1.0, 1, epochs=0, around=around)


def plugins_table(options: argparse.Namespace) -> list[str]:
    case = Case(options.data, options.data_root, options.samples)
    first, second = (len(x) for x, _ in case.tasks)
    lines = [
        "## Avalanche's plugins\n",
        f"{options.data}, split, {first} and {second} samples, batches of {BATCH}; the epoch is the second "
        "experience's. `plain` is the epoch without a plugin. rho: Spearman's rank correlation of all importances "
        f"after the first experience with the exact ones (EWC, MAS: of the same {first} samples); `all equal`: there "
        "is none, the importances are one number.\n",
        "| network | method | epoch: plain | Avalanche | fastcl | ratio | consolidation: Avalanche | fastcl | ratio "
        "| peak MB: Avalanche | fastcl | rho: Avalanche | fastcl |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, make in networks(case.shape).items():
        for method in options.methods:
            compared(case, make, method)
            strength = 1e-6  # the price of the penalty, not its effect: descent must stay stable for both
            epochs: dict[str, list[float]] = {"plain": [], **{library: [] for library in LIBRARIES}}
            ends: dict[str, list[float]] = {library: [] for library in LIBRARIES}
            for _ in range(options.rounds):
                epochs["plain"].append(case.train(make, "fastcl", None, 0.0, 2)[2]["epoch"][1])
                for library in LIBRARIES:
                    seconds = case.train(make, library, method, strength, 2)[2]
                    epochs[library].append(seconds["epoch"][1])
                    ends[library].append(seconds["consolidation"][1])
            epoch = {k: statistics.median(v) for k, v in epochs.items()}
            end = {k: statistics.median(v) for k, v in ends.items()}
            cells = [name, method, human(epoch["plain"])]
            cells += [human(epoch["avalanche"]), human(epoch["fastcl"])]
            cells.append(f"**{epoch['avalanche'] / epoch['fastcl']:.2f}**")
            cells += [human(end["avalanche"]), human(end["fastcl"]), f"**{end['avalanche'] / end['fastcl']:.2f}**"]
            for library in LIBRARIES:
                cells.append(f"{memory(options, name, library, method):.0f}")
            if method == "LwF":
                cells += ["", ""]
            else:
                for library in LIBRARIES:
                    net, made, _ = case.train(make, library, method, strength, 1)
                    truth = case.exact(method, net, make, options.samples)
                    cells.append(rank_correlation(found(library, method, made, net), truth))
            lines.append("| " + " | ".join(cells) + " |")
            print(lines[-1], flush=True)
    return lines


def memory(options: argparse.Namespace, name: str, library: str, method: str) -> float:
    command = [sys.executable, __file__, "--memory", name, library, method, "--samples", str(options.samples)]
    command += ["--data", options.data] + (["--data-root", options.data_root] if options.data_root else [])
    done = subprocess.run(command, capture_output=True, text=True)
    said = [line for line in done.stdout.splitlines() if line.startswith("peak ")]
    if done.returncode or len(said) != 1:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
    return float(said[0].split()[1])


def mixtures_table(options: argparse.Namespace) -> list[str]:
    from sklearn.mixture import GaussianMixture as Theirs

    from fastcl.integrations.sklearn import GaussianMixture

    n, k, d, iterations = options.mixture_samples, 10, 32, 20
    lines = [
        "\n## scikit-learn's mixture of Gaussians\n",
        f"`fit` of {n} samples, D = {d}, K = {k}: {iterations} iterations of EM from the same weights, means and "
        "precisions, with all that `fit` does around them; `sample` of as many.\n",
        "| covariance | dtype | fit: scikit-learn | fastcl | ratio | sample: scikit-learn | fastcl | ratio |",
        "|---|---|---|---|---|---|---|---|",
    ]
    rng = np.random.RandomState(0)
    centers = 3 * rng.randn(k, d)
    whole = rng.randn(n, d) + centers[np.arange(n) % k]
    for covariance_type in ("full", "tied", "diag", "spherical"):
        for dtype in (np.float32, np.float64):
            x = whole.astype(dtype)
            shape = {"full": np.stack([np.eye(d)] * k), "tied": np.eye(d), "diag": np.ones((k, d))}
            options_ = dict(
                covariance_type=covariance_type,
                weights_init=np.full(k, 1 / k, dtype),
                means_init=x[:k] + dtype(0.5),
                precisions_init=shape.get(covariance_type, np.ones(k)).astype(dtype),
                max_iter=iterations,
                tol=0.0,
                random_state=0,
            )
            makers = {"scikit-learn": Theirs, "fastcl": GaussianMixture}
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that it has not converged
                mixtures = {name: cls(k, **options_).fit(x) for name, cls in makers.items()}
                tolerance = 1e-3 if dtype == np.float32 else 1e-7
                for name in ("weights_", "means_", "covariances_"):
                    a, b = (getattr(m, name) for m in mixtures.values())
                    np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * np.abs(b).max(), err_msg=name)
                fits: dict[str, list[float]] = {name: [] for name in makers}
                samples: dict[str, list[float]] = {name: [] for name in makers}
                for _ in range(options.rounds):
                    for name, cls in makers.items():
                        made, start = cls(k, **options_), CLOCK[0]()
                        made.fit(x)
                        middle = CLOCK[0]()
                        made.sample(n)
                        fits[name].append(middle - start)
                        samples[name].append(CLOCK[0]() - middle)
            cells = [covariance_type, np.dtype(dtype).name]
            for times in (fits, samples):
                a, b = (statistics.median(times[name]) for name in makers)
                cells += [human(a), human(b), f"**{a / b:.2f}**"]
            lines.append("| " + " | ".join(cells) + " |")
            print(lines[-1], flush=True)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="digits", help="digits or mnist")
    parser.add_argument("--data-root", help="where MNIST's IDX files are")
    parser.add_argument("--samples", type=int, default=256, help="of each task")
    parser.add_argument("--mixture-samples", type=int, default=20_000)
    parser.add_argument("--methods", nargs="*", choices=METHODS, default=METHODS)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="processor: other work does not change it")
    parser.add_argument("--out", type=Path, help="a Markdown file; default: only printed")
    parser.add_argument("--memory", nargs=3, metavar=("NETWORK", "LIBRARY", "METHOD"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    CLOCK[0] = CLOCKS[options.clock]
    try:
        import avalanche
    except ImportError:
        parser.error("avalanche-lib is not installed: make side-by-side, or PYTHONPATH=out/integrations")
    import sklearn

    warnings.filterwarnings("ignore", module="avalanche")
    if options.memory:
        consolidation_memory(options, *options.memory)
        return
    arguments = [a for a in sys.argv[1:] if not a.startswith("--out") and not a.endswith(".md")]
    head = [
        "# Side by side\n",
        f"`{' '.join(['python bench/side_by_side.py', *arguments])}`: medians of {options.rounds} interleaved rounds, "
        f"{options.clock} time; ratios above 1 where fastcl is faster. What is compared first is in the script's "
        "docstring.\n",
        f"torch {torch.__version__}, avalanche-lib {avalanche.__version__}, scikit-learn {sklearn.__version__}, "
        f"{processor()}, {torch.get_num_threads()} threads, Python {sys.version.split()[0]}.\n",
    ]
    lines = head + plugins_table(options) + mixtures_table(options)
    if options.out:
        options.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
