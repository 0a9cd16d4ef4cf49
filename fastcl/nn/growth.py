"""Pictures of a network that grew, and of what it generates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor


def plot_growth(units: Mapping[str, Sequence[Sequence[int]]], path: str | Path) -> None:
    """A panel for each layer: its units after every task, stacked by the task that added them.

    Args:
        units: layer name to a row for each task, how many of its units came with task 0, 1, ...
        path: png, pdf or svg.

    Example:
        >>> plot_growth({"fc1": [[4], [4, 2]]}, folder / "a.png")
        >>> (folder / "a.png").stat().st_size > 1000
        True
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(units), figsize=(4.2 * len(units), 3.4), squeeze=False, layout="constrained")
    for axis, (name, rows) in zip(axes[0], units.items(), strict=True):
        colours = plt.get_cmap("viridis")([i / max(1, len(rows) - 1) for i in range(len(rows))])
        places = range(1, len(rows) + 1)
        bottom = [0] * len(rows)
        for added, colour in enumerate(colours):
            heights = [row[added] if added < len(row) else 0 for row in rows]
            axis.bar(places, heights, bottom=bottom, color=colour, width=0.8)
            bottom = [b + h for b, h in zip(bottom, heights, strict=True)]
        axis.set(xlabel="after task", ylabel="units", title=f"layer {name}", xticks=list(places))
        axis.margins(y=0.08)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def plot_size(
    sizes: Mapping[str, Sequence[float]], path: str | Path, ylabel: str = "channels of the generator"
) -> None:
    """A network's units after each task (DGM's figure 2), and the worst case beside: its first size for every task.

    Args:
        sizes: layer name to its units after each task.
        path: png, pdf or svg.
        ylabel: what is counted.

    Example:
        >>> plot_size({"conv1": [8, 10, 11]}, folder / "a.png")
        >>> (folder / "a.png").stat().st_size > 1000
        True
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(5.2, 3.8), layout="constrained")
    alike = len({values[0] for values in sizes.values()}) == 1  # then one worst case is everybody's
    for i, (name, values) in enumerate(sizes.items()):
        tasks = range(len(values))
        (line,) = axis.plot(tasks, values, marker="o", markersize=4, label=name)
        if not alike or i == len(sizes) - 1:
            worst = [values[0] * (t + 1) for t in tasks]
            colour, label = ("0.4", "worst case") if alike else (line.get_color(), f"{name}, worst case")
            axis.plot(tasks, worst, "--", color=colour, alpha=0.5, label=label)
    axis.set(xlabel="tasks learned", ylabel=ylabel, ylim=(0, None))
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.legend(frameon=False, fontsize="small")
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def plot_images(rows: Mapping[str, Tensor], path: str | Path, columns: int = 10) -> None:
    """Grids of images [N, 1 or 3, H, W] in [0, 1], `columns` side by side, a panel for each title.

    Args:
        rows: title to its images.
        path: png, pdf or svg.

    Example:
        >>> plot_images({"after task 1": torch.rand(20, 1, 8, 8)}, folder / "a.png")
        >>> (folder / "a.png").stat().st_size > 1000
        True
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(rows), figsize=(2.6 * len(rows), 3.2), squeeze=False, layout="constrained")
    for axis, (title, images) in zip(axes[0], rows.items(), strict=True):
        n, channels, height, width = images.shape
        lines = -(-n // columns)
        grid = images.new_zeros(channels, lines * height, columns * width)
        for i, image in enumerate(images):
            line, column = divmod(i, columns)
            grid[:, line * height : (line + 1) * height, column * width : (column + 1) * width] = image
        axis.imshow(grid.permute(1, 2, 0).squeeze(-1).numpy(), cmap="gray_r", vmin=0, vmax=1, interpolation="nearest")
        axis.set_title(title, fontsize=9)
        axis.axis("off")
    figure.savefig(path, dpi=130)
    plt.close(figure)
