"""Heat maps of lines that differ in two or three numbers."""

from collections.abc import Sequence

import numpy as np
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from launchers.results.frame import Line, Summary
from launchers.results.plots import COLOURS, ink
from launchers.results.report.axes import Grid
from launchers.results.report.points import SPAN, Measure, measures
from launchers.results.report.style import COLUMN, MISSING, PAGE, TEXT, Drawn, styled

CELL = 0.62  # inches a cell is wide at most


@styled
def grid_figure(summary: Summary, grid: Grid, number: int) -> Drawn:
    """The longest axis across, the others down; cells hold mean and deviation in percent."""
    told = measures(summary, [grid.cells.values()])
    down, across = grid.lines, grid.columns
    wide = PAGE if len(told) > 1 or len(across) > 5 else COLUMN
    figure = Figure(figsize=(wide, 0.8 + 0.3 * len(down)), layout="constrained")
    axes = figure.subplots(1, len(told), sharey=True, squeeze=False)[0]
    room = (wide - 1) / len(told) / len(across)
    for ax, measure in zip(axes, told, strict=True):
        values = [[_value(grid, place, at, measure) for at in across] for place in down]
        _paint(ax, values, TEXT if room > 0.35 else TEXT - 2)
        ax.set_xticks(np.arange(len(across)) + 0.5, [f"{at:g}" for at in across])
        ax.set_xlim(0, max(len(across), (wide - 1) / len(told) / CELL))
        ax.set_xlabel(f"{grid.knobs[-1]}\n{measure.unit}", loc="left")
    axes[0].set_yticks(np.arange(len(down)) + 0.5, [", ".join(f"{value:g}" for value in place) for place in down])
    axes[0].set_ylabel(",\n".join(grid.knobs[:-1]))
    method = next(iter(grid.cells.values())).rows[0].method
    title = f"Accuracy by {' and '.join(grid.knobs)}: {method}"
    deviations = any(line.mean and line.mean.deviation is not None for line in grid.cells.values())
    caption = "Small: standard deviation over seeds." if deviations else ""
    return Drawn(f"grid-{number}-{grid.knobs[-1]}", title, figure, caption, wide)


def _value(grid: Grid, place: tuple[float, ...], at: float, measure: Measure) -> tuple[float, float | None]:
    line: Line | None = grid.cells.get((*place, at))
    point = measure.point(line, at) if line is not None else None
    return (np.nan, None) if point is None else (point.score, point.deviation)


def _paint(ax, values: Sequence[Sequence[tuple[float, float | None]]], size: float) -> None:
    means = np.array([[mean for mean, _ in line] for line in values])
    known = means[np.isfinite(means)]
    low = known.min() if known.size else 0.0
    scale = Normalize(low, max(low + SPAN, known.max() if known.size else 0.0))
    ax.pcolormesh(np.ma.masked_invalid(means), cmap=COLOURS, norm=scale, edgecolors=MISSING, linewidth=0.8)
    for row, column in np.ndindex(means.shape):
        mean, deviation = values[row][column]
        if np.isfinite(mean):
            colour = ink(COLOURS(scale(mean)))
            high = 0.5 if deviation is None else 0.36
            ax.text(column + 0.5, row + high, f"{mean:.1f}", color=colour, ha="center", va="center", size=size)
            if deviation is not None:
                ax.text(column + 0.5, row + 0.76, f"±{deviation:.1f}", color=colour, ha="center", va="center",
                        size=size - 2)  # fmt: skip
    ax.set_ylim(len(means), 0)
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
