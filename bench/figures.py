"""The figures of experiments.py: accuracy over lambda and over parameters, a generator's size over tasks."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from fastcl.nn import plot_size


def over_lambda(experiments: Sequence[Any], done: dict[str, dict[str, Any]], path: Path) -> None:
    """The picture of `exactness`: accuracy over lambda, a line for every kind of Fisher, a panel for every stream."""
    streams = list(dict.fromkeys((e.scenario, e.setting) for e in experiments))
    figure, axes = plt.subplots(1, len(streams), figsize=(5.2 * len(streams), 4), squeeze=False, layout="constrained")
    colours = {"exact": "#2a7f62", "empirical": "#3b6fb6", "batched": "#c0563f"}
    for axis, stream in zip(axes[0], streams, strict=True):
        for kind, colour in colours.items():
            points = []
            for e in experiments:
                runs = [done[e.key(n)]["average_accuracy"] for n in range(e.seeds) if e.key(n) in done]
                if (e.scenario, e.setting) == stream and e.label == kind and runs:
                    points.append((e.options["strength"], [100 * r for r in runs]))
            if points:
                x, y = [p[0] for p in points], [statistics.mean(p[1]) for p in points]
                axis.plot(x, y, "o-", color=colour, label=kind)
                axis.fill_between(x, [min(p[1]) for p in points], [max(p[1]) for p in points], color=colour, alpha=0.15)
        axis.set(
            xscale="log", xlabel="lambda", ylabel="average accuracy, %", title=f"EWC, {stream[0]} MNIST, {stream[1]}"
        )
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(title="Fisher", frameon=False)
    figure.savefig(path, dpi=130)


def over_capacity(experiments: Sequence[Any], done: dict[str, dict[str, Any]], path: Path) -> None:
    """DEN's figure on MNIST-Variation: accuracy over parameters, for every size that each way was begun with."""
    figure, axis = plt.subplots(figsize=(6.4, 4.2), layout="constrained")
    colours = {"separate networks": "#7a7a7a", "joint": "#c0563f", "DEN": "#2a7f62", "DEN-Finetune": "#3b6fb6"}
    for label, colour in colours.items():
        points = []
        for e in experiments:
            runs = [done[e.key(n)] for n in range(e.seeds) if e.key(n) in done]
            if e.label == label and e.scenario == "variation" and runs:
                accuracy = [100 * r["average_accuracy"] for r in runs]
                points.append((statistics.mean(r["parameters"] for r in runs) / 1e6, accuracy))
        points.sort()
        if points:
            x = [p[0] for p in points]
            axis.plot(x, [statistics.mean(p[1]) for p in points], "o-", color=colour, label=label)
            axis.fill_between(x, [min(p[1]) for p in points], [max(p[1]) for p in points], color=colour, alpha=0.15)
    axis.set(
        xscale="log", xlabel="parameters, millions", ylabel="average accuracy, %", title="MNIST-Variation, ten tasks"
    )
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False)
    figure.savefig(path, dpi=130)


def over_tasks(experiments: Sequence[Any], done: dict[str, dict[str, Any]], path: Path) -> None:
    """DGM's figure 2: the generator's channels after each task, as a share of its first, beside the worst case."""
    sizes = {}
    for e in experiments:
        runs = [done[e.key(n)]["sizes"] for n in range(e.seeds) if "sizes" in done.get(e.key(n), {})]
        if runs:  # of every run as many; the two generators begin with 42 and 140 channels
            sizes[e.label] = [statistics.mean(s[t] / s[0] for s in runs) for t in range(len(runs[0]))]
    if sizes:
        plot_size(sizes, path, "channels of the generator, first size = 1")
