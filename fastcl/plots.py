"""Pictures of results (matplotlib, drawn without a screen)."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .checkpoint import write_atomically

INK, FAINT = "#222222", "#8a8a8a"
COLOURS = ("#9a9a9a", "#2a7f62", "#3b6fb6", "#c0563f", "#7d5ba6", "#b8872b", "#4aa3a2", "#d4729c", "#5d6d7e", "#8c9a3b")


def result_picture(result: dict[str, Any], path: str | Path) -> None:
    """The accuracy matrix of one run and, beside it, each task's accuracy over time.

    Example:
        >>> result_picture(result, folder / "a.png")
        >>> (folder / "a.png").stat().st_size > 1000
        True
    """
    accuracy = np.array(result["accuracy"])
    with plt.rc_context(_STYLE):
        figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.6), width_ratios=(1, 1.25), layout="constrained")
        _matrix(left, accuracy)
        _curves(right, accuracy)
        figure.suptitle(
            f"{result['method']}  on {result['scenario']} {result['data']}, {result['setting']} setting:  "
            f"average accuracy {100 * result['average_accuracy']:.1f}%,  forgetting {100 * result['forgetting']:.1f}%",
            fontsize=12,
        )
        _save(figure, Path(path))


def comparison_picture(results: Sequence[dict[str, Any]], path: str | Path) -> None:
    """For every stream in `results`: each method's mean accuracy on the tasks seen so far, as tasks go by.

    Example:
        >>> comparison_picture([result], folder / "a.png")
        >>> (folder / "a.png").stat().st_size > 1000
        True
    """
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for result in results:
        groups.setdefault((result["data"], result["scenario"], result["setting"]), []).append(result)
    with plt.rc_context(_STYLE):
        figure, axes = plt.subplots(
            1, len(groups), figsize=(4.1 * len(groups), 4.3), sharey=True, squeeze=False, layout="constrained"
        )
        lowest = min(
            100 * np.array(r["accuracy"])[t, : t + 1].mean() for r in results for t in range(len(r["accuracy"]))
        )
        bottom = max(0, 10 * (lowest // 10) - 5)
        for axis, ((data, scenario, setting), members) in zip(axes[0], groups.items(), strict=True):
            ends = []
            for colour, result in zip(COLOURS, members, strict=False):
                accuracy = 100 * np.array(result["accuracy"])
                seen = [accuracy[t, : t + 1].mean() for t in range(len(accuracy))]
                axis.plot(range(1, len(seen) + 1), seen, "o-", color=colour, lw=2, ms=5, label=result["method"])
                ends.append((seen[-1], colour, len(seen)))
            _label_ends(axis, ends, gap=(103 - bottom) / 22)
            axis.set_title(f"{scenario} {data}, {setting} setting")
            axis.set_xlabel("tasks learned")
            axis.set_xticks(range(1, len(members[0]["accuracy"]) + 1))
            axis.margins(x=0.16)
            axis.grid(axis="y", color="#e6e6e6")
        axes[0][0].set_ylabel("mean accuracy on tasks so far, %")
        axes[0][0].set_ylim(bottom, 103)
        figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=6, frameon=False)
        _save(figure, Path(path))


def speed_picture(result: dict[str, Any], path: str | Path) -> None:
    """`fastcl bench`: a bar for every contender of every case, its time over fastcl's, on a logarithmic axis.

    Example:
        >>> case = {"name": "masked_grad_", "medians": {"fastcl": 1e-5, "eager": 4e-5, "floor": 8e-6}}
        >>> speed_picture({"fastcl": "0.1", "torch": "2.13", "device": "cpu", "cases": [case]}, folder / "a.png")
        >>> (folder / "a.png").stat().st_size > 1000
        True
    """
    ticks, largest, smallest, y = [], 1.0, 1.0, 0.0
    n_bars = sum(len(case["medians"]) - 1 for case in result["cases"])
    with plt.rc_context(_STYLE):
        size = (9.2, 0.9 + 0.2 * n_bars + 0.18 * len(result["cases"]))
        figure, axis = plt.subplots(figsize=size, layout="constrained")
        for case in result["cases"]:
            mine = case["medians"]["fastcl"]
            ticks.append((y, case["name"]))
            for name, seconds in case["medians"].items():
                if name == "fastcl":
                    continue
                ratio = seconds / mine
                colour = FAINT if name == "floor" else COLOURS[1] if ratio >= 1 else COLOURS[3]
                axis.barh(y, ratio - 1, left=1, height=0.78, color=colour)
                shown = f"{ratio:.0f}" if ratio >= 20 else f"{ratio:.2g}"
                axis.text(max(ratio, 1) * 1.05, y, f"{name}  {shown}", va="center", fontsize=7.5)
                y, largest, smallest = y + 1, max(largest, ratio), min(smallest, ratio)
            y += 0.8
        axis.axvline(1, color=INK, linewidth=0.8)
        axis.set(xscale="log", xlim=(0.8 * smallest, 8 * largest), ylim=(y - 1.2, -0.8))
        axis.set_yticks([at for at, _ in ticks], [name for _, name in ticks], fontsize=8)
        axis.tick_params(axis="y", length=0)
        times = [t for t in (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200) if smallest <= t <= largest]
        axis.set_xticks(times, [f"{t:g}" for t in times], fontsize=8)
        axis.set_xticks([], minor=True)
        axis.set_xlabel(
            "time relative to fastcl, logarithmic (red: faster than fastcl; grey: the bytes that must move)"
        )
        axis.set_title(f"fastcl {result['fastcl']}, torch {result['torch']}, {result['device']}", fontsize=10)
        axis.spines["left"].set_visible(False)
        _save(figure, Path(path))


def _label_ends(axis: Axes, ends: list[tuple[float, str, int]], gap: float) -> None:
    """The last values beside their curves, pushed apart where they would print on each other."""
    at = float("inf")
    for value, colour, x in sorted(ends, reverse=True):
        at = min(value, at - gap)
        axis.annotate(
            f"{value:.1f}", (x, at), (7, 0), textcoords="offset points", va="center", color=colour, fontsize=9
        )


def _matrix(axis: Axes, accuracy: np.ndarray) -> None:
    n = len(accuracy)
    axis.imshow(accuracy, cmap="YlGnBu", vmin=0, vmax=1, aspect="equal")
    for i in range(n):
        for j in range(n):
            value = accuracy[i, j]
            axis.text(
                j,
                i,
                f"{100 * value:.0f}",
                ha="center",
                va="center",
                fontsize=10 if n <= 10 else 7,
                color="white" if value > 0.55 else (INK if j <= i else FAINT),
            )
    axis.set_xticks(range(n), [str(t + 1) for t in range(n)])
    axis.set_yticks(range(n), [str(t + 1) for t in range(n)])
    axis.set_xlabel("accuracy on task, %")
    axis.set_ylabel("after learning task")
    axis.spines[:].set_visible(False)


def _curves(axis: Axes, accuracy: np.ndarray) -> None:
    n = len(accuracy)
    shades = plt.get_cmap("viridis")(np.linspace(0.05, 0.85, n))
    for j in range(n):
        axis.plot(
            range(j + 1, n + 1), 100 * accuracy[j:, j], "o-", color=shades[j], markersize=4, label=f"task {j + 1}"
        )
    seen = [100 * accuracy[t, : t + 1].mean() for t in range(n)]
    axis.plot(range(1, n + 1), seen, "--", color=INK, linewidth=2, label="mean so far")
    axis.set_xticks(range(1, n + 1))
    axis.set_xlabel("tasks learned")
    axis.set_ylabel("test accuracy, %")
    axis.set_ylim(-3, 103)
    axis.grid(axis="y", color="#e6e6e6")
    axis.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))


def _save(figure: Figure, path: Path) -> None:
    buffer = io.BytesIO()
    figure.savefig(buffer, format=path.suffix[1:] or "png", dpi=130)
    plt.close(figure)
    write_atomically(path, buffer.getvalue())


_STYLE = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "text.color": INK,
}
