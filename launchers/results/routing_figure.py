"""The routing matrix as a picture: where the gates of each dynamic merge send the images of each task."""

from collections.abc import Iterable
from math import ceil, sqrt
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from launchers.results.frame import Line, Summary, summarise
from launchers.results.plots import COLOURS, ink
from launchers.rows import Row
from merging.files import write_atomically

ABREAST = 3  # panels in a row at most


def routing_figure(rows: Iterable[Row], path: str | Path) -> Path | None:
    """Draw true task x mean weight in percent as a PNG, one panel a routed line, mean over its seeds.

    None, and no file, where no row was routed by gates. Raises UserError when the file cannot be written.
    """
    panels = [(summary, line) for summary in summarise(rows) for line in summary.lines if line.routed_right]
    if not panels:
        return None
    across = min(ABREAST, ceil(sqrt(len(panels))))
    down = ceil(len(panels) / across)
    side = 1.5 + 0.38 * max(len(summary.tasks) for summary, _ in panels)
    figure = Figure(figsize=((side - 0.1) * across, side * down), layout="constrained")
    axes = figure.subplots(down, across, squeeze=False).flatten()
    for ax, (summary, line) in zip(axes, panels, strict=False):
        _panel(ax, summary, line)
    for ax in axes[len(panels) :]:
        ax.remove()
    figure.suptitle("Mean weight of each task's part, in percent", fontsize=11, x=0.01, ha="left")
    return write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=160))


def matrix(line: Line, tasks: tuple[str, ...], unseen: tuple[str, ...] = ()) -> np.ndarray:
    """Mean over seeds of true task x mean weight, in the order of `tasks`; those that no expert was merged for last."""
    seeds = []
    for row in line.rows:
        if row.routing:
            order = [row.tasks.index(task) for task in tasks]
            lines = [row.routing["matrix"][index] for index in order] + [row.routing["unseen"][task] for task in unseen]
            seeds.append(np.array(lines)[:, order])
    return np.mean(seeds, axis=0)


def images_of(summary: Summary) -> list[str]:
    """Names of the lines of `matrix`."""
    return [*summary.tasks, *(f"{task} (unseen)" for task in summary.unseen)]


def _panel(ax: Axes, summary: Summary, line: Line) -> None:
    weights, count = matrix(line, summary.tasks, summary.unseen), len(summary.tasks)
    scale = Normalize(min(0.0, weights.min()), max(1.0, weights.max()))
    ax.pcolormesh(weights, cmap=COLOURS, norm=scale, edgecolors="white", linewidth=1.5)
    for row, column in np.ndindex(weights.shape):
        number = f"{100 * weights[row, column]:.0f}"
        colour = ink(COLOURS(scale(weights[row, column])))
        ax.text(column + 0.5, row + 0.5, number, color=colour, ha="center", va="center", fontsize=8)
    ticks = [index + 0.5 for index in range(count)]
    ax.set_xticks(ticks, summary.tasks, rotation=45, ha="right", rotation_mode="anchor", fontsize=8)
    ax.set_yticks(np.arange(len(weights)) + 0.5, images_of(summary), fontsize=8)
    ax.set(aspect="equal", ylim=(len(weights), 0))
    ax.set_xlabel("weight of the part of", fontsize=8)
    ax.set_ylabel("images of", fontsize=8)
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    ax.set_title(_title(line), fontsize=9, loc="left")


def _title(line: Line) -> str:
    right = line.routed_right
    assert right is not None
    deviation = "" if right.deviation is None else f" ±{100 * right.deviation:.1f}"
    return f"{line.label}\nrouted right {100 * right.mean:.1f}{deviation} %"
