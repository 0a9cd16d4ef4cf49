"""Accuracies on real MNIST: `python bench/experiments.py TABLE [--jobs 2]` runs what is missing and writes the table.

Every run is one line of bench/results/<TABLE>.jsonl, appended when it ends, and until then a checkpoint in
out/experiments: a command that was stopped goes on where it was (remove that folder after changes to what it trains).
The table is bench/results/<TABLE>.md. Each run has one thread, so that `--jobs` of them share a machine.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import re
import shutil
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import figures
from separate import separate

from fastcl.methods import METHODS

HERE = Path(__file__).parent
RESULTS = HERE / "results"
UNDER_WAY = HERE.parent / "out" / "experiments"
SEEDS = range(5)


@dataclass(frozen=True)
class Experiment:
    """One row's worth of runs: a label, and the arguments of fastcl.runner.Config without the seed."""

    label: str
    method: str
    setting: str = "task"
    scenario: str = "split"
    options: dict[str, Any] = field(default_factory=dict)
    rest: dict[str, Any] = field(default_factory=dict)  # epochs, tasks, lr
    seeds: int = len(SEEDS)

    def key(self, seed: int) -> str:
        return json.dumps({**asdict(self), "seeds": None, "seed": seed}, sort_keys=True)


# strengths chosen with `python bench/experiments.py strengths`, seed 100, which no table uses
STRENGTHS: dict[tuple[str, str], dict[str, float]] = {
    ("split", "task"): {"ewc": 1e5, "mas": 1.0, "si": 1e2, "rwalk": 1e2},
    ("split", "domain"): {"ewc": 1e5, "mas": 1e2, "si": 1e2, "rwalk": 1e3},
    ("split", "class"): {"ewc": 1e5, "mas": 1e1, "si": 1e2, "rwalk": 1e2},
    ("permuted", "domain"): {"ewc": 1e2, "mas": 1e-2, "si": 1e1, "rwalk": 1e-1},
}
# every weight to the pixels drifts: with the usual sigma all units split, and the network doubles with every task
PERMUTED_DEN = {"k": 80, "group": 0.2, "sigma": 0.42, "head_epochs": 1, "expand_epochs": 2, "split_epochs": 3}
PERMUTED = {"epochs": 1, "tasks": 10}  # the literature trains 10 to 20 times as long
WIDE = {"hidden": (1000, 1000)}


def importances() -> Iterator[Experiment]:
    """EWC, online EWC, SI, MAS, RWalk between fine-tuning and joint training, in every setting."""
    for scenario, setting in (("split", "task"), ("split", "domain"), ("split", "class"), ("permuted", "domain")):
        rest, wide = (PERMUTED, WIDE) if scenario == "permuted" else ({}, {})
        for label, method, options in (
            ("fine-tuning", "finetune", {}),
            ("EWC (separate anchors)", "ewc", {"form": "separate"}),
            ("online EWC", "ewc", {"form": "online"}),
            ("SI", "si", {}),
            ("MAS", "mas", {}),
            ("RWalk", "rwalk", {}),
            ("joint", "joint", {}),
        ):
            if (scenario, method) == ("permuted", "joint"):
                continue  # ten times the data in the last task: an hour a seed
            strength = STRENGTHS.get((scenario, setting), {}).get(method)
            chosen = {} if strength is None else {"strength": strength}
            yield Experiment(label, method, setting, scenario, {**options, **chosen, **wide}, rest)


def strengths() -> Iterator[Experiment]:
    """The search behind STRENGTHS: one seed."""
    grid = {
        "ewc": (1e1, 1e2, 1e3, 1e4, 1e5, 1e6),
        "mas": (1e-2, 1e-1, 1.0, 1e1, 1e2),
        "si": (1e-1, 1.0, 1e1, 1e2, 1e3),
        "rwalk": (1e-1, 1.0, 1e1, 1e2, 1e3),
    }
    for scenario, setting in (("split", "task"), ("split", "domain"), ("split", "class"), ("permuted", "domain")):
        rest, wide = ({"epochs": 1, "tasks": 5}, WIDE) if scenario == "permuted" else ({}, {})
        for method, values in grid.items():
            for strength in values:
                label = f"{method} {strength:g}"
                yield Experiment(label, method, setting, scenario, {"strength": strength, **wide}, rest, seeds=1)


def exactness() -> Iterator[Experiment]:
    """EWC with the exact, the empirical and the field's batched Fisher over lambda."""
    for scenario, setting in (("split", "task"), ("permuted", "domain")):
        rest, wide = ({"epochs": 1, "tasks": 5}, WIDE) if scenario == "permuted" else ({}, {})
        for kind in ("exact", "empirical", "batched"):
            for power in range(8) if scenario == "split" else range(-1, 6):
                options = {"kind": kind, "strength": 10.0**power, **wide}
                yield Experiment(kind, "ewc", setting, scenario, options, rest, seeds=3 if scenario == "split" else 1)


def masks() -> Iterator[Experiment]:
    """HAT with binary and with soft masks, beside fine-tuning and EWC under the same schedule."""
    for scenario in ("split", "permuted"):
        rest = {"epochs": 2, "tasks": 10} if scenario == "permuted" else {}
        for label, method, options in (
            ("fine-tuning", "finetune", {}),
            ("online EWC", "ewc", {"strength": 1e5 if scenario == "split" else 1e2}),
            ("HAT", "hat", {}),
            ("HAT, soft masks", "hat", {"binary": False}),
        ):
            yield Experiment(label, method, "task", scenario, options, rest)
    yield Experiment("HAT, task inferred by entropy", "hat", "class")


def growth() -> Iterator[Experiment]:
    """DEN beside separate networks (one a task), joint training and fine-tuning; more sizes for the figure."""
    full = {"hidden": (312, 128)}
    smaller = ({"hidden": (39, 16)}, {"hidden": (78, 32)}, {"hidden": (156, 64)})
    for scenario, rest, stages in (
        ("variation", {"epochs": 10, "tasks": 10}, {"split_epochs": 15}),
        ("permuted", {"epochs": 2, "tasks": 10}, PERMUTED_DEN),
    ):
        seeds = 3 if scenario == "variation" else 1
        yield Experiment("fine-tuning", "finetune", "task", scenario, full, rest, seeds)
        yield Experiment("DEN", "den", "task", scenario, {**full, **stages}, rest, seeds)
        yield Experiment("separate networks", "separate", "task", scenario, full, rest, seeds)
        yield Experiment("joint", "joint", "task", scenario, full, rest, seeds)
        if scenario == "variation":
            yield Experiment(
                "DEN-Finetune", "den", "task", scenario, {**full, **stages}, {**rest, "finetune": 10}, seeds
            )
            for size in smaller:
                yield Experiment("DEN", "den", "task", scenario, {**size, **stages}, rest, seeds)
                again = {**rest, "finetune": 10}
                yield Experiment("DEN-Finetune", "den", "task", scenario, {**size, **stages}, again, seeds)
                yield Experiment("separate networks", "separate", "task", scenario, size, rest, seeds)
                yield Experiment("joint", "joint", "task", scenario, size, rest, seeds)


def neurogenesis() -> Iterator[Experiment]:
    """CLN, two digits a task, beside fine-tuning, EWC and joint training of the same classifier's data."""
    yield Experiment("fine-tuning", "finetune", "class", seeds=3)
    yield Experiment("online EWC", "ewc", "class", options={"strength": 1e5}, seeds=3)
    yield Experiment("DGR (VAE)", "dgr", "class", seeds=3)
    yield Experiment("CLN", "cln", "class", options=CLN, rest={"epochs": 1}, seeds=3)
    yield Experiment("joint", "joint", "class", seeds=3)


def generative() -> Iterator[Experiment]:
    """One class a task: generative memories beside fine-tuning and joint training. Batches of 64, 8 epochs."""
    rest = {"tasks": 10, "batch_size": 64}
    for label, method, options, seeds in (
        ("DGMw", "dgm-w", {}, 3),
        ("DGMa", "dgm-a", {}, 3),
        ("MeRGAN, joint retraining", "mergan-joint", {}, 3),
        ("MeRGAN, replay alignment", "mergan-align", {}, 1),
        ("MeRGAN, replay alignment, lambda .1", "mergan-align", {"strength": 0.1}, 3),
        ("DGR (VAE)", "dgr", {}, 3),
        ("DGR (conditional VAE)", "dgr", {"generator": "cvae"}, 3),
        ("DGR (WGAN-GP)", "dgr", {"generator": "gan"}, 1),
        ("DGR, noise", "dgr", {"replay": "noise"}, 3),
        ("fine-tuning", "finetune", {}, 3),
        ("joint", "joint", {}, 1),
        ("joint, the GANs' classifier", "joint", {"network": "discriminator"}, 3),
    ):
        few = {"epochs": 1 if label == "joint" else 4} if method in ("joint", "finetune") or "replay" in options else {}
        yield Experiment(label, method, "class", "split", options, {**rest, **few}, seeds)


def mnist() -> Iterator[Experiment]:
    """Every method on split MNIST, 3 seeds: what it remembers and what that costs."""
    for setting in ("task", "class"):
        for label, method, options in (
            ("fine-tuning", "finetune", {}),
            ("EWC", "ewc", {"form": "separate"}),
            ("online EWC", "ewc", {}),
            ("MAS", "mas", {}),
            ("SI", "si", {}),
            ("RWalk", "rwalk", {}),
            ("LwF", "lwf", {}),
            ("EWC-S", "ewc", {"budget": 200}),
            ("SI-S", "si", {"budget": 200}),
            ("RWalk-S", "rwalk", {"budget": 200}),
            ("iCaRL", "icarl", {}),
            ("iCaRL, 200 exemplars", "icarl", {"budget": 200}),
            ("HAT", "hat", {}),
            ("DEN", "den", {"hidden": (312, 128)}),
            ("DGR (VAE)", "dgr", {}),
            ("DGR (conditional VAE)", "dgr", {"generator": "cvae"}),
            ("DGR, noise", "dgr", {"replay": "noise"}),
            ("latent generative memory", "latent-generative-memory", {}),
            ("latent generative memory, alignment", "latent-generative-memory", {"replay": "align"}),
            ("latent space alignment", "latent-space-alignment", {}),
            ("latent space alignment, parallel", "latent-space-alignment", {"parallel": True}),
            ("online generative memory, lookahead", "online-generative-memory", {"mode": "lookahead"}),
            ("online generative memory, distill", "online-generative-memory", {"mode": "distill"}),
            ("online generative memory, project", "online-generative-memory", {"mode": "project"}),
            ("MeRGAN, joint retraining", "mergan-joint", {}),
            ("MeRGAN, replay alignment", "mergan-align", {}),
            ("DGMw", "dgm-w", {}),
            ("DGMa", "dgm-a", {}),
            ("CLN", "cln", CLN),
            ("joint", "joint", {}),
        ):
            if setting not in METHODS[method].settings:
                continue
            strength = STRENGTHS["split", setting].get(method)
            chosen = {} if strength is None else {"strength": strength}
            # with its usual 16 epochs DGR takes ten minutes; in a task's own classes, or from noise, 4 show as much
            few = {"epochs": 4} if method == "dgr" and (setting == "task" or "replay" in options) else {}
            few = {"epochs": 1} if method == "cln" else few  # as in `neurogenesis`
            # the steps for a class of `generative`, which takes twice the tasks
            few = {"epochs": 4, "batch_size": 64} if method.startswith(("dgm", "mergan")) else few
            yield Experiment(label, method, setting, "split", {**chosen, **options}, few, seeds=3)


CLN = {"replay": 1000, "sample": 1000, "iterations": 4, "vae_epochs": 4, "beta": 0.3}

TABLES: dict[str, Callable[[], Iterator[Experiment]]] = {
    "importances": importances,
    "strengths": strengths,
    "exactness": exactness,
    "masks": masks,
    "growth": growth,
    "neurogenesis": neurogenesis,
    "generative": generative,
    "mnist": mnist,
}
# accuracy over the classes seen after so many tasks, a column each
AFTER = {"neurogenesis": (1, 2, 3, 4, 5), "generative": (5, 10)}
FULL = (None, (312, 128))  # other sizes are for the figure over capacity: no pictures of their own


def run(job: tuple[str, dict[str, Any], str, bool]) -> dict[str, Any]:
    key, arguments, data_root, draw = job
    import time

    import torch

    torch.set_num_threads(1)
    from fastcl.metrics import forgetting
    from fastcl.runner import Config, Run

    if arguments["method"] == "separate":
        return {
            "key": key,
            **separate(Config(data="mnist", data_root=data_root, **{**arguments, "method": "finetune"})),
        }
    finetune = arguments.pop("finetune", 0)
    folder = UNDER_WAY / hashlib.sha256(key.encode()).hexdigest()[:16]
    clock, resume = folder / "processor-seconds", (folder / "state.json").exists()
    before = float(clock.read_text()) if resume and clock.exists() else 0.0
    parent = os.getppid()

    def report(task: int, epoch: int, batch: int, batches: int, loss: float) -> None:
        if os.getppid() != parent:
            sys.exit("the command that started this run was killed")
        if (task or epoch) and batch in (0, batches - 1):  # beside a checkpoint: of the epoch or the task before
            clock.write_text(f"{before + time.process_time()}")

    learner = Run(Config(data="mnist", data_root=data_root, **arguments), folder, resume=resume)
    result = learner.train(report)
    if finetune:
        learner.learner.finetune(learner.stream.tasks, finetune)
        last = [learner._accuracy(task, restrict=True) for task in learner.stream.tasks]
        accuracy = [*result["accuracy"][:-1], last]
        result |= {"accuracy": accuracy, "average_accuracy": statistics.mean(last), "forgetting": forgetting(accuracy)}
    kept = ("average_accuracy", "forgetting", "accuracy", "acc_generated", "parameters", "memory", "seconds")
    kept += ("versions",)
    # of the processor, not of the wall: the same whatever else runs here
    line = {"key": key, **{name: result[name] for name in kept}, "seconds": before + time.process_time()}
    if hasattr(learner.learner, "parameters_used"):
        line["parameters"] = learner.learner.parameters_used()
    if hasattr(learner.learner, "sizes"):
        line["sizes"] = learner.learner.sizes
    for picture in ("plot_growth", "plot_generated", "plot_occupancy"):
        drawn = draw and arguments["method"] != "hat" and arguments["options"].get("hidden") in FULL
        if hasattr(learner.learner, picture) and drawn:
            label = re.sub(r"[^a-z]+", "-", json.loads(key)["label"].lower()).strip("-")
            name = f"{label}-{arguments['scenario']}-{picture.removeprefix('plot_')}.png"
            getattr(learner.learner, picture)(RESULTS / name)
    shutil.rmtree(folder)
    return line


def read(table: str) -> dict[str, dict[str, Any]]:
    """The lines of a table's runs by key, and those of other tables: one configuration is run once."""
    found: dict[str, dict[str, Any]] = {}
    for path in (*sorted(RESULTS.glob("*.jsonl")), RESULTS / f"{table}.jsonl"):
        if path.exists():
            lines = map(json.loads, path.read_text().splitlines())
            # the first tables' lines did not say what was kept
            found |= {line["key"]: line for line in lines if path.stem == table or "memory" in line}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("table", choices=TABLES)
    parser.add_argument("--data-root", default=os.environ.get("FASTCL_DATA", HERE.parent.parent / "shared/data/mnist"))
    parser.add_argument("--only", default="", help="regular expression of the scenario, setting or label")
    parser.add_argument("--jobs", type=int, default=max(1, (os.cpu_count() or 2) // 2))
    arguments = parser.parse_args()
    experiments = list(TABLES[arguments.table]())
    lines = RESULTS / f"{arguments.table}.jsonl"
    done = read(arguments.table)
    jobs = []
    for n in range(max(e.seeds for e in experiments)):  # one seed of everything before the next
        for e in experiments:
            seed = 100 + n if arguments.table == "strengths" else n
            chosen = any(re.search(arguments.only, text) for text in (e.scenario, e.setting, e.label))
            if chosen and n < e.seeds and e.key(seed) not in done:
                config = {"method": e.method, "setting": e.setting, "scenario": e.scenario, "options": e.options}
                draw = seed == 0 and arguments.table != "mnist"  # the other tables' pictures have the same names
                jobs.append((e.key(seed), {**config, **e.rest, "seed": seed}, str(arguments.data_root), draw))
    # spawned: torch's OpenMP threads do not survive a fork
    with multiprocessing.get_context("spawn").Pool(arguments.jobs, maxtasksperchild=1) as pool:
        for i, line in enumerate(pool.imap_unordered(run, jobs), 1):
            with lines.open("a") as file:
                file.write(json.dumps(line) + "\n")
            chosen = json.loads(line["key"])
            print(f"{i}/{len(jobs)} {chosen['scenario']} {chosen['setting']} {chosen['label']}", end=" ", flush=True)
            print(f"seed {chosen['seed']}: {100 * line['average_accuracy']:.2f}%, {line['seconds']:.0f} s", flush=True)
    (RESULTS / f"{arguments.table}.md").write_text(table(arguments.table, experiments, read(arguments.table)))
    import method_table  # beside this file; its page quotes these tables

    method_table.PAGE.write_text(method_table.filled(method_table.PAGE.read_text()))
    if arguments.table == "exactness":
        figures.over_lambda(experiments, read(arguments.table), RESULTS / "exactness.png")
    if arguments.table == "generative":
        figures.over_tasks(experiments, read(arguments.table), RESULTS / "dgm-growth.png")
    if arguments.table == "growth":
        figures.over_capacity(experiments, read(arguments.table), RESULTS / "den-variation-capacity.png")


def table(name: str, experiments: list[Experiment], done: dict[str, dict[str, Any]]) -> str:
    first = 100 if name == "strengths" else 0
    versions = {", ".join(f"{k} {v}" for k, v in line["versions"].items()) for line in done.values()}
    described = "; some: ".join(sorted(versions))
    text = [
        f"# {name}",
        "",
        f"`python bench/experiments.py {name}`: real MNIST, means over seeds (± standard deviation).",
    ]
    text += ["Average accuracy over all tasks after the last one, forgetting as in Chaudhry et al. 2018.", described]
    text.append("Seconds are of one thread, tests included; until 2026-11-21 of the wall, then of the processor.")
    if name == "growth":
        text.append("(Those of separate networks were of the wall until 2026-11-22.)")
    if name in AFTER:
        text.append("After t: accuracy on real test images of the classes seen so far; of generated: how often a")
        text.append("classifier trained on real data names 1000 generated images as meant. Pictures: seed 0's.")
    groups: dict[tuple[str, str], list[Experiment]] = {}
    for e in experiments:
        groups.setdefault((e.scenario, e.setting), []).append(e)
    for (scenario, setting), rows in groups.items():
        text += ["", f"## {scenario} MNIST, {setting} setting", ""]
        after = AFTER.get(name, ())
        more = [*(f"after {t}" for t in after), *(["of generated"] if after else [])]
        more += ["kept, kB"] if name == "mnist" else []
        more += ["seconds a task"] if name in ("neurogenesis", "growth") else []
        head = ["method", "options", *more, "accuracy", "forgetting", "parameters", "seconds", "seeds"]
        text += [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
        for e in rows:
            lines = [done[k] for k in (e.key(first + n) for n in range(e.seeds)) if k in done]
            if not lines:
                continue
            told = {**e.options, **{k: v for k, v in e.rest.items() if k in ("epochs", "batch_size")}}
            options = ", ".join(f"{k}={v:g}" if isinstance(v, float) else f"{k}={v}" for k, v in told.items())
            accuracy, forgetting = ([100 * x[c] for x in lines] for c in ("average_accuracy", "forgetting"))
            seconds, parameters = (statistics.mean(x[c] for x in lines) for c in ("seconds", "parameters"))
            cells = [e.label, options]
            cells += [spread([100 * statistics.mean(x["accuracy"][t - 1][:t]) for x in lines]) for t in after]
            if after:
                made = [100 * x["acc_generated"] for x in lines if x.get("acc_generated") is not None]
                cells.append(spread(made) if made else "")
            if name == "mnist":
                cells.append(f"{statistics.mean(x['memory'] for x in lines) / 1000:,.0f}")
            if name in ("neurogenesis", "growth"):
                cells.append(f"{statistics.mean(x['seconds'] / len(x['accuracy'][-1]) for x in lines):.0f}")
            cells += [spread(accuracy), spread(forgetting), f"{parameters:,.0f}", f"{seconds:.0f}", str(len(lines))]
            text.append(f"| {' | '.join(cells)} |")
    return "\n".join(text) + "\n"


def spread(values: list[float]) -> str:
    mean = statistics.mean(values)
    return f"{mean:.2f}" if len(values) < 2 else f"{mean:.2f} ± {statistics.stdev(values):.2f}"


if __name__ == "__main__":
    sys.exit(main())
