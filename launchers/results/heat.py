"""Figures made of coloured cells: methods x tasks, tasks x tasks, energy per layer, grids of two options."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, sqrt
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from launchers.results.frame import Summary
from launchers.results.style import COLOURS, COLUMN, KIND_NAMES, MEASURES, MISSING, PAGE, TEXT, Drawn, named, styled

if TYPE_CHECKING:
    from pandas import DataFrame

NAMES = 1.9  # inches for the names of lines
ROW = 0.2  # inches a line is high
WIDEST, READABLE = 0.55, 0.2  # inches a cell is wide at most; narrower cells carry no number
ENERGIES = 24  # columns of the map of energies at most
OUTSIDE = "other"  # column of what lies in no layer


@dataclass(frozen=True)
class Scale:
    """What colours cover: at least `least` from `low` on, which is the smallest value where it is None."""

    least: float
    low: float | None = None

    def ends(self, known: np.ndarray) -> tuple[float, float]:
        low = min(known, default=0.0) if self.low is None else min([self.low, *known])
        return low, max([low + self.least, *known])


# so that noise does not look like a difference
SCORES, ABLATION, WEIGHTS, COSINES = Scale(10), Scale(4), Scale(100, 0.0), Scale(0.2, 0.0)


def paint(ax: Axes, values: "DataFrame", scale: Scale, digits: int | None, size: float = TEXT,
          deviations: "DataFrame | None" = None) -> None:  # fmt: skip
    """Coloured cells from the top left, named by index and columns, with numbers of so many digits; None for none."""
    cells = values.to_numpy(dtype=float)
    low, high = scale.ends(cells[np.isfinite(cells)])
    ax.pcolormesh(np.ma.masked_invalid(cells), cmap=COLOURS, vmin=low, vmax=high, edgecolors=MISSING, linewidth=0.8)
    for row, column in np.ndindex(cells.shape) if digits is not None else ():
        if np.isfinite(cells[row, column]):
            ink = contrast(COLOURS((cells[row, column] - low) / (high - low)))
            deviation = np.nan if deviations is None else deviations.iloc[row, column]
            text = f"{cells[row, column]:.{digits}f}" + (f"\n±{deviation:.1f}" if np.isfinite(deviation) else "")
            ax.text(column + 0.5, row + 0.5, text, color=ink, ha="center", va="center", size=size, in_layout=False)
    ax.set_xticks(np.arange(cells.shape[1]) + 0.5, map(str, values.columns), rotation=40, ha="right",
                  rotation_mode="anchor")  # fmt: skip
    ax.set_yticks(np.arange(cells.shape[0]) + 0.5, map(str, values.index))
    ax.set_ylim(len(cells), 0)
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)


def contrast(colour: Any) -> str:
    """Black or white, whichever contrasts more with a colour."""
    luminance = np.dot(np.array(colour[:3]) ** 2.2, (0.2126, 0.7152, 0.0722))
    return "#000000" if luminance > 0.18 else "#ffffff"  # where both contrast equally


def page_wide(tables: Sequence["DataFrame"], digits: int, xlabel: str) -> tuple[Figure, list[Axes]]:
    """Maps below each other, as wide as a page; numbers are left out where they do not fit."""
    slanted = [0.5 + 0.045 * max(len(str(name)) for name in table.columns) for table in tables]
    heights = [ROW * len(table) + more for table, more in zip(tables, slanted, strict=True)]
    figure = Figure(figsize=(PAGE, sum(heights)), layout="constrained")
    axes = figure.subplots(len(tables), 1, squeeze=False, height_ratios=heights)[:, 0]
    for ax, table in zip(axes, tables, strict=True):
        wide = min(WIDEST, (PAGE - NAMES) / table.shape[1])
        size = TEXT if wide > 0.33 else TEXT - 2
        paint(ax, table, SCORES, digits if wide >= READABLE else None, size)
        ax.set_xlim(0, max(table.shape[1], (PAGE - NAMES) / WIDEST))  # few columns do not become bars
        ax.set_xlabel(xlabel, loc="left")
        if wide < READABLE:
            figure.colorbar(ax.collections[0], ax=ax, label="%", shrink=0.6)
    return figure, list(axes)


def square(ax: Axes, values: "DataFrame", scale: Scale, digits: int, xlabel: str, ylabel: str) -> None:
    """A map of tasks against tasks; of many tasks without numbers, with a scale of colours beside it."""
    count = values.shape[1]
    fits = count <= 14 or ax.figure.get_figwidth() > COLUMN  # type: ignore[union-attr]
    paint(ax, values, scale, digits if fits else None, TEXT if count <= 9 and digits < 2 else TEXT - 1.5)
    ax.set(aspect="equal", xlabel=xlabel, ylabel=ylabel)
    if not fits:
        ax.figure.colorbar(ax.collections[0], ax=ax, shrink=0.6)


@styled
def score_map(summaries: Sequence[Summary]) -> Drawn:
    """Methods x tasks, a panel a suite: percent of the expert, plain accuracy where a line has no expert."""
    tables, relative = zip(*map(_scores, summaries), strict=True)
    whats = ["accuracy, % of the expert's" if is_relative else "accuracy, %" for is_relative in relative]
    figure, axes = page_wide(tables, 1, "task, with the expert's accuracy; last the mean" if any(relative) else "task")
    for ax, summary, table, what in zip(axes, summaries, tables, whats, strict=True):
        _mark_kinds(ax, summary, table)
        if len(summaries) > 1:
            ax.set_title(f"{summary.title}: {what}")
    return Drawn("heatmap", f"Methods x tasks: {whats[0]}", figure, "One line a method, mean over its seeds.")


def _scores(summary: Summary) -> tuple["DataFrame", bool]:
    """What is painted, by the number of the line, and whether it is normalised: then the expert is the unit."""
    lines, scored = summary.lines, summary.scored
    relative = len(scored) > 0 and bool(scored["norm"].notna().all())
    experts = lines[lines["kind"] == "expert"]
    if relative and len(experts) < len(lines):
        lines = lines.drop(index=experts.index)
    has_units = relative and len(experts) == 1
    units = {task: f"{task} ({experts[f'task {task}'].iloc[0]:.1f})" if has_units else task for task in summary.tasks}
    kind, mean = ("norm", "norm") if relative else ("task", "mean")
    table = lines[[*(f"{kind} {task}" for task in summary.tasks), mean]].set_axis([*units.values(), mean], axis=1)
    return table, relative


def _mark_kinds(ax: Axes, summary: Summary, table: "DataFrame") -> None:
    """Names of lines and, at the side, what routed and oracle lines are; a failed line carries its error."""
    lines, columns = summary.lines.loc[table.index], table.shape[1]
    ax.set_yticklabels([named(line.label, line.Index) for line in lines.itertuples()])
    for place, line in enumerate(lines.itertuples()):
        if line.kind == "failed":
            ax.text(0.1, place + 0.5, f"failed: {line.error}"[: 14 * columns], va="center", style="italic")
    kinds = list(lines["kind"])
    for kind in ("routed", "oracle"):
        if kind in kinds:
            first, last = kinds.index(kind), kinds.index(kind) + kinds.count(kind)
            ax.axhline(first, color=MISSING, lw=3)
            ax.axhline(last, color=MISSING, lw=3)
            name = KIND_NAMES[kind].replace(" ", "\n", 1)
            ax.text(columns + 0.1, (first + last) / 2, name, va="center", style="italic")


@styled
def routing_map(pairs: Sequence[tuple[Summary, Any]]) -> Drawn:
    """True task x mean weight in percent, a panel for each of these lines, mean over its seeds."""
    across = min(3, ceil(sqrt(len(pairs))))
    tables = [weights(summary, line.rows) for summary, line in pairs]
    side = COLUMN if len(pairs) == 1 else max(COLUMN * 0.8, 0.9 + 0.2 * max(map(len, tables)))
    down = ceil(len(pairs) / across)
    tall = side * max(len(table) / table.shape[1] for table in tables) + 0.2
    figure = Figure(figsize=(side * across, tall * down), layout="constrained")
    axes = figure.subplots(down, across, squeeze=False).flatten()
    titles = [f"{line.label}: {_plus_minus(line.routing_accuracy, line.sd)} %" for _, line in pairs]
    for ax, table, title in zip(axes, tables, titles, strict=False):
        square(ax, 100 * table, WEIGHTS, 0, "mean gating weight of the expert for, %", "images of")
        if len(pairs) > 1:
            ax.set_title(title)
    for ax in axes[len(pairs) :]:
        ax.remove()
    line = pairs[0][1]
    name = "routing" if len(pairs) > 1 else f"routing-{line.method}-{line.Index}"
    title = "Mean weight of each task's part" if len(pairs) > 1 else named(line.label, line.Index)
    caption = f"Largest weight on the own task, in percent of the images: {'; '.join(titles)}."
    return Drawn(name, title, figure, caption)


def _plus_minus(mean: float, deviation: float) -> str:
    return f"{mean:.1f}" + ("" if np.isnan(deviation) else f" ±{deviation:.1f}")


def routed(summary: Summary) -> list[tuple[Summary, Any]]:
    """The lines whose gates left a routing matrix."""
    lines = summary.lines.rename(columns={"routing_accuracy sd": "sd"})
    return [(summary, line) for line in lines[lines["routing_accuracy"].notna()].itertuples()]


def weights(summary: Summary, rows: Sequence[Any]) -> "DataFrame":
    """Mean over seeds of true task x mean weight, in the order of the table; unseen tasks last."""
    seeds = [(row, [*row.routing["matrix"], *(row.routing["unseen"][task] for task in summary.unseen)])
             for row in rows if row.routing]  # fmt: skip
    return _mean(summary, seeds, [f"{task} (unseen)" for task in summary.unseen])


def _mean(summary: Summary, seeds: Sequence[tuple[Any, Any]], more: Sequence[str] = ()) -> "DataFrame":
    """The mean of the seeds' matrices over the tasks of their rows, with more lines, in the order of the table."""
    from pandas import DataFrame

    order = list(summary.tasks)
    ordered = [DataFrame(matrix, [*row.tasks, *more], row.tasks, dtype=float).loc[[*order, *more], order]
               for row, matrix in seeds]  # fmt: skip
    return sum(ordered[1:], ordered[0]) / len(ordered)


@styled
def similarity_maps(summary: Summary) -> list[Drawn]:
    """Cosines between task vectors, mean over seeds; one for every set of experts of other seeds or families."""
    lines = summary.lines[summary.lines["kind"] == "expert"]
    known = [similarity(summary, rows) for rows in lines["rows"] if any(row.similarity for row in rows)]
    unlike = list({str(cosines.to_numpy().tolist()): cosines for cosines in known}.values())
    return [_similarity(cosines, str(place) if len(unlike) > 1 else "") for place, cosines in enumerate(unlike, 1)]


def similarity(summary: Summary, rows: Sequence[Any]) -> "DataFrame":
    """Mean over the seeds that know it, in the order of the table's tasks."""
    return _mean(summary, [(row, row.similarity) for row in rows if row.similarity])


def _similarity(cosines: "DataFrame", number: str) -> Drawn:
    apart = cosines.where(~np.eye(len(cosines), dtype=bool))  # a task is 1 with itself
    others = apart.stack().dropna()
    wide = COLUMN if len(cosines) <= 9 else PAGE
    figure = Figure(figsize=(wide, wide), layout="constrained")
    digits = 3 if others.abs().max() < 0.1 else 2
    square(figure.subplots(), apart, COSINES, digits, "cosine of the task vector with that of", "task vector of")
    largest = f", largest {others.max():.3f}: {' and '.join(map(str, others.idxmax()))}" if len(others) else ""
    still = [task for task in cosines if cosines.loc[task, task] == 0]
    caption = f"Mean {others.mean() if len(others) else 0:.3f}{largest}."
    caption += f" Experts that equal the base have no direction: {', '.join(still)}." if still else ""
    return Drawn(f"similarity{number}", "Similarity of task vectors, cosine", figure, caption)


@styled
def energy_map(summary: Summary) -> Drawn | None:
    """Per layer, the share of the task vectors' energy that the routed parts hold; None where no row knows it."""
    from pandas import DataFrame

    alike: dict[str, list[Any]] = {}  # lines that hold the same parts under other gates
    for line in summary.lines[summary.lines["energy"].notna()].itertuples():
        alike.setdefault(str([row.energy for row in line.rows]), []).append(line)
    columns = _columns(
        list(dict.fromkeys(key for lines in alike.values() for row in lines[0].rows for key in row.energy))
    )
    if not columns:
        return None
    captured = {}
    for line, *more in alike.values():
        name = named(line.label, line.Index, f" (+{len(more)})" if more else "")
        shares = {column: [share for row in line.rows for key in keys for share in row.energy.get(key, ())]
                  for column, keys in columns.items()}  # fmt: skip
        captured[name] = {
            column: 100 * float(np.mean(values)) if values else np.nan for column, values in shares.items()
        }
    figure, _ = page_wide([DataFrame.from_dict(captured, orient="index", columns=list(columns))], 0,
                          "layer and what in it")  # fmt: skip
    caption = "Share of the squared norm of the task vectors, mean over tasks, seeds and a layer's matrices."
    caption += " (+n): n more lines hold the same parts." if len(alike) < summary.lines["energy"].count() else ""
    return Drawn("energy", "Energy captured per layer, %", figure, caption)


def _columns(keys: Sequence[str]) -> dict[str, list[str]]:
    """Parameters by their column: one a matrix while those fit, else one a kind of matrix, else one a layer."""
    columns: dict[str, list[str]] = {}
    for depth in (None, 1, 0):
        columns = {}
        for key in keys:
            columns.setdefault(_column(key, depth), []).append(key)
        if len(columns) <= ENERGIES:
            break
    return dict(sorted(columns.items(), key=lambda item: item[0] == OUTSIDE))


def _column(key: str, depth: int | None) -> str:
    """ "visual.transformer.resblocks.3.mlp.c_fc.weight" is "3 mlp.c_fc", or with one name behind the layer "3 mlp"."""
    inside = re.search(r"\.(\d+)\.(.+)", key)
    if inside is None:
        return key.removesuffix(".weight") if depth is None else OUTSIDE
    return " ".join([inside[1], ".".join(inside[2].removesuffix(".weight").split(".")[:depth])]).strip()


@styled
def grids(panels: Sequence[tuple[str, "DataFrame"]], measures: Sequence[str], xlabel: str, ylabel: str) -> Figure:
    """A map for each title and measure beside each other; the frames have x, hue, the measures and their deviations."""
    shown = [(title, frame, measure) for title, frame in panels for measure in measures]
    tables = [[frame.pivot_table(f"{measure}{what}", "hue", "x", dropna=False) for what in ("", " sd")]
              for _, frame, measure in shown]  # fmt: skip
    across = max(table.shape[1] for table, _ in tables)
    wide = PAGE if len(shown) > 1 or across > 5 else COLUMN
    figure = Figure(figsize=(wide, 1.0 + 0.3 * max(len(table) for table, _ in tables)), layout="constrained")
    axes = figure.subplots(1, len(shown), sharey=True, squeeze=False)[0]
    room = (wide - 1) / len(shown) / across
    for ax, (title, _, measure), (table, deviations) in zip(axes, shown, tables, strict=True):
        paint(ax, table, ABLATION, 1, TEXT - 1 if room > 0.35 else TEXT - 2.5, deviations)
        ax.set(title=title, xlim=(0, max(across, (wide - 1) / len(shown) / 0.62)))
        ax.set_xticklabels([f"{value:g}" for value in table.columns], rotation=0, ha="center")
        ax.set_xlabel(f"{xlabel}\n{MEASURES[measure]}", loc="left")
    axes[0].set_ylabel(ylabel)
    return figure
