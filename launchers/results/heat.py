"""Figures made of coloured cells: methods x tasks, tasks x tasks, energy per layer, grids of two options."""

import re
from collections.abc import Callable, Sequence
from math import ceil, sqrt
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from launchers.results.frame import Summary
from launchers.results.style import COLOURS, COLUMN, MEASURES, MISSING, PAGE, TEXT, Drawn, named, styled
from launchers.rows import Row

if TYPE_CHECKING:
    from pandas import DataFrame

ROW = 0.2  # inches a line is high
WIDEST, SMALLEST = 0.55, 4.4  # inches a square cell is wide at most; points that a number must have
BROADEST = 1.0  # inches that one of a line is wide at most
TALL = 30  # lines above which the columns are named at the top
ENERGIES = 24  # columns of the map of energies at most
OTHER = "other"  # column of what lies in no layer


class Scale(NamedTuple):
    """What colours cover: at least `least` from `low` on, which is the smallest value where it is None."""

    least: float
    low: float | None = None


# so that noise does not look like a difference
SCORES, ABLATION, WEIGHTS, COSINES = Scale(10), Scale(4), Scale(100, 0.0), Scale(0.2, 0.0)


class Panel(NamedTuple):
    """A map: its cells, named by index and columns, and the deviations that stand below the numbers."""

    title: str
    cells: "DataFrame"
    deviations: "DataFrame | None" = None


def paint(ax: Axes, panel: Panel, scale: Scale, digits: int | None, size: float = TEXT) -> None:
    """Coloured cells from the top left, with numbers of so many digits; None for none."""
    cells = np.ma.masked_invalid(panel.cells.to_numpy(dtype=float))
    known = cells.compressed()
    low = min(known, default=0.0) if scale.low is None else min([scale.low, *known])
    high = max([low + scale.least, *known])
    ax.pcolormesh(cells, cmap=COLOURS, vmin=low, vmax=high, edgecolors=MISSING, linewidth=0.8)
    for row, column in np.argwhere(~np.ma.getmaskarray(cells)) if digits is not None else ():
        value = cells[row, column]
        deviation = np.nan if panel.deviations is None else panel.deviations.iloc[row, column]
        text = f"{value:.{digits}f}" + (f"\n±{deviation:.1f}" if np.isfinite(deviation) else "")
        ink = contrast(COLOURS((value - low) / (high - low)))
        ax.text(column + 0.5, row + 0.5, text, color=ink, ha="center", va="center", size=size, in_layout=False)
    names = [f"{name:g}" if isinstance(name, float) else str(name) for name in panel.cells]
    if tall := len(cells) > TALL:
        ax.xaxis.tick_top()
        ax.xaxis.set_label_position("top")
    slant = {"rotation": 40, "ha": "left" if tall else "right", "rotation_mode": "anchor"}
    slanted = slant if len(max(names, key=len)) > 5 else {}
    ax.set_xticks(np.arange(len(names)) + 0.5, names, **slanted)
    ax.set_yticks(np.arange(len(cells)) + 0.5, map(str, panel.cells.index))
    ax.set_ylim(len(cells), 0)
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)


def contrast(colour: Any) -> str:
    """Black or white, whichever contrasts more with a colour."""
    luminance = np.dot(np.array(colour[:3]) ** 2.2, (0.2126, 0.7152, 0.0722))
    return "#000000" if luminance > 0.18 else "#ffffff"  # where both contrast equally


def maps(panels: Sequence[Panel], scale: Scale, digits: int, xlabel: str, ylabel: str = "", width: float = PAGE,
         high: float | None = None, across: int = 1) -> tuple[Figure, list[Axes]]:  # fmt: skip
    """Maps beside and below each other, `width` inches in all; cells are `high` inches, else square.

    Numbers are as large as fits; where that is too small, a bar explains the colours.
    """
    columns = max(panel.cells.shape[1] for panel in panels)
    names = max(len(str(name)) for panel in panels for name in panel.cells.index)
    inside = width / across - 0.3 - 0.055 * names
    cell = min(WIDEST, inside / columns)
    below = 0.5 + 0.045 * max(len(str(name)) for panel in panels for name in panel.cells)
    heights = [below + len(panel.cells) * (high or cell) for panel in panels[::across]]
    beside = 0.25 + 0.06 * max(map(len, ylabel.splitlines()), default=0)
    figure = Figure(figsize=(width, max(beside, sum(heights))), layout="constrained")
    axes = figure.subplots(len(heights), across, sharey=across > 1, squeeze=False, height_ratios=heights).flatten()
    characters = max(len(f"{value:.{digits}f}") for panel in panels for value in (*panel.cells.stack(), 10.0))
    size = min(TEXT, 72 * cell / (0.7 * characters))
    for ax, panel in zip(axes, panels, strict=False):
        paint(ax, panel, scale, digits if size >= SMALLEST else None, size)
        ax.set_title(panel.title)
        ax.set_xlabel(xlabel, loc="center" if high is None else "left")
        if high is None:
            ax.set_aspect("equal")
        else:
            ax.set_xlim(0, max(columns, inside / BROADEST))  # few columns do not become bars
        if size < SMALLEST:
            figure.colorbar(ax.collections[0], ax=ax, shrink=0.6)
    for ax in axes[len(panels) :]:
        ax.remove()
    axes[0].set_ylabel(ylabel)
    return figure, list(axes[: len(panels)])


@styled
def score_map(summaries: Sequence[Summary]) -> Drawn:
    """Methods x tasks, a panel a suite: percent of the expert, plain scores where a line has no expert."""
    whats = {"norm": "score, % of the expert's", "mean": "score, %"}
    titles = [f"{summary.title}: {whats[summary.level]}" if len(summaries) > 1 else "" for summary in summaries]
    painted = [_scores(summary) for summary in summaries]
    lines = [summary.lines.loc[cells.index] for summary, cells in zip(summaries, painted, strict=True)]
    panels = [
        Panel(title, cells.set_axis([*map(named, some.itertuples())]))
        for title, cells, some in zip(titles, painted, lines, strict=True)
    ]
    relative = any(summary.level == "norm" for summary in summaries)
    xlabel = "task, with the expert's score; last the mean" if relative else "task"
    figure, axes = maps(panels, SCORES, 1, xlabel, high=ROW)
    for ax, some, panel in zip(axes, lines, panels, strict=True):
        for position, error in enumerate(some["error"]):
            if isinstance(error, str):
                text = f"failed: {error}"[: 14 * panel.cells.shape[1]]
                ax.text(0.1, position + 0.5, text, va="center", style="italic")
    title = f"Methods x tasks: {whats[summaries[0].level]}"
    return Drawn("heatmap", title, figure, "One line a method, mean over its seeds.")


def _scores(summary: Summary) -> "DataFrame":
    """What is painted, by the number of the line; of normalised scores the expert is the unit."""
    lines, tasks, units = summary.lines, list(summary.tasks), list(summary.tasks)
    if summary.level == "mean":
        return lines[[*(f"task {task}" for task in tasks), "mean"]].set_axis([*tasks, "mean"], axis=1)
    experts = lines[lines["kind"] == "expert"]
    if len(experts) == 1:
        units = [f"{task} ({experts[f'task {task}'].iloc[0]:.1f})" for task in tasks]
    merged = lines.drop(index=experts.index) if len(experts) < len(lines) else lines
    return merged[[*(f"norm {task}" for task in tasks), "norm"]].set_axis([*units, "norm"], axis=1)


def routed(summary: Summary) -> list[tuple[Summary, Any]]:
    """The lines whose gates left a routing matrix."""
    lines = summary.lines.rename(columns={"routing_accuracy sd": "sd"})
    return [(summary, line) for line in lines[lines["routing_accuracy"].notna()].itertuples()]


@styled
def routing_map(pairs: Sequence[tuple[Summary, Any]]) -> Drawn:
    """True task x mean weight in percent, a panel for each of these lines, mean over its seeds."""
    titles = [f"{line.label}: {line.routing_accuracy:.1f} ±{line.sd:.1f} %".replace(" ±nan", "") for _, line in pairs]
    several, line = len(pairs) > 1, pairs[0][1]
    panels = [Panel(title if several else "", 100 * weights(*pair)) for title, pair in zip(titles, pairs, strict=True)]
    across = min(3, ceil(sqrt(len(pairs))))
    side = max(0.8 * COLUMN, 0.9 + 0.2 * len(panels[0].cells)) if several else COLUMN
    figure, _ = maps(panels, WEIGHTS, 0, "mean gating weight of the expert for, %", "samples of", side * across,
                     across=across)  # fmt: skip
    name = "routing" if several else f"routing-{line.method}-{line.Index}"
    title = "Mean gating weight of every expert" if several else named(line)
    caption = f"Routing accuracy (largest weight on the own task), in percent of the samples: {'; '.join(titles)}."
    return Drawn(name, title, figure, caption)


def weights(summary: Summary, line: Any) -> "DataFrame":
    """Mean over seeds of true task x mean weight, in the order of the table; unseen tasks last."""

    def matrix(row: Row) -> list[Any]:
        routing: dict[str, Any] = {**row.routing}
        return [*routing["matrix"], *(routing["unseen"][task] for task in summary.unseen)]

    more = [f"{task} (unseen)" for task in summary.unseen]
    return _mean(summary, [row for row in line.rows if row.routing], matrix, more)


def _mean(summary: Summary, rows: Sequence[Row], matrix: Callable[[Row], Any],
          more: Sequence[str] = ()) -> "DataFrame":  # fmt: skip
    """The mean of the rows' matrices over their own tasks, with more lines, in the order of the table."""
    from pandas import DataFrame

    order = list(summary.tasks)
    ordered = [DataFrame(matrix(row), [*row.tasks, *more], row.tasks, dtype=float).loc[[*order, *more], order]
               for row in rows]  # fmt: skip
    return sum(ordered[1:], ordered[0]) / len(ordered)


@styled
def similarity_map(summary: Summary) -> Drawn | None:
    """Cosines between task vectors, mean over the expert rows that know them; None where none does."""
    if not (rows := [row for row in summary.rows if row.similarity]):
        return None
    apart = off_diagonal(_mean(summary, rows, lambda row: row.similarity))
    others = apart.stack().dropna()
    figure = square(apart, 3 if others.abs().max() < 0.1 else 2, "cosine of the task vector with that of",
                    "task vector of")  # fmt: skip
    largest = f", largest {others.max():.3f}: {' and '.join(map(str, others.idxmax()))}" if len(others) else ""
    caption = f"Mean {others.mean() if len(others) else 0:.3f}{largest}."
    return Drawn("similarity", "Similarity of task vectors, cosine", figure, caption)


def square(apart: "DataFrame", digits: int, xlabel: str, ylabel: str) -> Figure:
    """A map of tasks against tasks, one column wide while that is readable."""
    wide = COLUMN if len(apart) <= 9 else PAGE
    return maps([Panel("", apart)], COSINES, digits, xlabel, ylabel, wide)[0]


def off_diagonal(cells: "DataFrame") -> "DataFrame":
    """NaN where a task meets itself."""
    return cells.where(~np.eye(len(cells), dtype=bool))


@styled
def energy_map(summary: Summary) -> Drawn | None:
    """Per layer, the share of the task vectors' energy that the routed parts hold; None where no row knows it."""
    from pandas import DataFrame

    known = summary.lines[summary.lines["energy"].notna()]
    if not len(known):
        return None
    held = {}  # line -> mean over tasks and seeds, of every parameter
    for line in known.itertuples():
        seeds = [{key: np.mean(shares) for key, shares in row.energy.items() if shares} for row in line.rows]
        held[named(line)] = 100 * DataFrame(seeds).mean()
    shares = DataFrame(held).reindex(dict.fromkeys(key for shares in held.values() for key in shares.index))
    layers = shares.groupby(_layers(shares.index), sort=False).mean()
    layers = layers.sort_index(key=lambda names: names == OTHER, kind="stable").T
    figure, _ = maps([Panel("", layers)], SCORES, 0, "layer", high=ROW)
    caption = "Share of the squared norm of the task vectors, mean over tasks, seeds and a layer's matrices."
    return Drawn("energy", "Energy captured per layer, %", figure, caption)


def _layers(keys: Sequence[str]) -> list[str]:
    """The layer of each parameter, and what in it while that fits: "resblocks.3.mlp.c_fc.weight" is "3 mlp" or "3"."""
    layers = [re.search(r"(?:^|\.)(\d+)\.(\w+)", key) for key in keys]
    parts = [OTHER if layer is None else f"{layer[1]} {layer[2]}" for layer in layers]
    return parts if len({*parts}) <= ENERGIES else [part.split()[0] for part in parts]


@styled
def grids(panels: Sequence[tuple[str, "DataFrame"]], measures: Sequence[str], xlabel: str, ylabel: str) -> Figure:
    """A map for each title and measure beside each other; the frames have x, hue, the measures and their deviations."""
    made = []
    for title, frame in panels:
        for measure in measures:
            names = (measure, f"{measure} sd")
            cells, deviations = (frame.pivot_table(name, "hue", "x", dropna=False) for name in names)
            made.append(Panel(f"{title} {MEASURES[measure]}".strip(), cells, deviations))
    wide = PAGE if len(made) > 1 or max(panel.cells.shape[1] for panel in made) > 5 else COLUMN
    return maps(made, ABLATION, 1, xlabel, ylabel, wide, 1.5 * ROW, across=len(made))[0]
