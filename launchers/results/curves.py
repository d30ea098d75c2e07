"""Figures with axes: scores against a number, bars of what a word chose, scores against costs."""

import math
import statistics
from collections.abc import Sequence
from itertools import cycle
from textwrap import fill, shorten
from typing import TYPE_CHECKING, Any, NamedTuple

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FormatStrFormatter, LogLocator, NullFormatter

from launchers.results.frame import MERGES, Summary
from launchers.results.style import (
    COLOURS,
    COLUMN,
    INK,
    KIND_COLOURS,
    MARKERS,
    MEASURES,
    OKABE_ITO,
    PAGE,
    STYLES,
    TEXT,
    Drawn,
    named,
    styled,
)
from launchers.rows import Row

if TYPE_CHECKING:
    from pandas import DataFrame, Series

FAR = 8  # from this ratio of the largest to the smallest on, an axis is logarithmic
SPAN = 4  # percent that an axis covers at least: noise must not look like a difference
TICKS = 8  # at most, of an axis that names its values
BAR = 0.17  # inches a bar is high
TOLD_APART = 24  # methods at most with a colour and marker each
LINES = 40  # of a table at most whose deviations are drawn
ABOVE = (4, 12)  # points above a point where its name stands


@styled
def curves(panels: Sequence[tuple[str, "DataFrame"]], measures: Sequence[str], xlabel: str, at_values: bool) -> Figure:
    """One column wide, a panel for each title and measure below each other; bars are deviations.

    The frames have the columns x, curve (its name), and for each measure its value and "<measure> sd", in percent.
    `at_values`: ticks at the values of x themselves, if they are few.
    """
    names = list(dict.fromkeys(name for _, frame in panels for name in frame["curve"]))
    shown = {name: fill(name, 52) for name in names}
    rows = [(title, frame, measure) for title, frame in panels for measure in measures]
    height = 0.2 + 2.1 * len(rows) + 0.14 * sum(name.count("\n") + 1 for name in shown.values())
    figure = Figure(figsize=(COLUMN, height), layout="constrained")
    axes = figure.subplots(len(rows), 1, sharex=True, squeeze=False)[:, 0]
    for ax, (title, frame, measure) in zip(axes, rows, strict=True):
        for name, colour, marker, dashes in zip(names, cycle(OKABE_ITO), cycle(MARKERS), cycle(STYLES), strict=False):
            points = frame[frame["curve"] == name]
            _points(ax, points["x"], points, measure, label=shown[name], color=colour, marker=marker, ls=dashes, ms=3.5)
        ax.set(ylabel=MEASURES[measure], title=title)
        ax.grid(True)
        low, high = ax.get_ylim()
        room = max(0.0, SPAN - (high - low)) / 2
        ax.set_ylim(low - room, high + room)
    values = sorted({float(x) for _, frame in panels for x in frame["x"]})
    scale(axes[-1], values)
    if at_values and len(values) <= TICKS:
        axes[-1].set_xticks(values, [f"{value:.3g}" for value in values])
        axes[-1].minorticks_off()
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower left", handlelength=3)
    axes[-1].set_xlabel(xlabel)
    return figure


def _points(ax: Axes, x: "Series | float", lines: "DataFrame", measure: str, **look: Any) -> Artist:
    """A measure with its deviations; its own points are returned."""
    deviations = lines[f"{measure} sd"]
    bars = deviations.fillna(0) if deviations.notna().any() else None
    return ax.errorbar(x, lines[measure], bars, lw=1, capsize=2, **look)[0]


def scale(ax: Axes, values: Sequence[float]) -> None:
    """A logarithmic axis with plain numbers where the values lie far apart."""
    low, high = min(values), max(values)
    if low > 0 and high / low >= FAR:
        ax.set_xscale("log")
        ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < 100 else (1,)))
        ax.xaxis.set_major_formatter(FormatStrFormatter("%g"))
        ax.xaxis.set_minor_formatter(NullFormatter())


@styled
def bars(groups: Sequence[tuple[str, "DataFrame"]], measures: Sequence[str]) -> Figure:
    """A bar a line below the heading of its group, if that has one; a panel a measure.

    The frames have name, kind and the measures.
    """
    listed: list[tuple[str, Any]] = []
    for heading, frame in groups:
        listed += [(heading, None)] * bool(heading) + [(line["name"], line) for _, line in frame.iterrows()]
    figure = Figure(figsize=(PAGE if len(measures) > 1 else COLUMN, 0.55 + BAR * len(listed)), layout="constrained")
    axes = figure.subplots(1, len(measures), sharey=True, squeeze=False)[0]
    for ax, measure in zip(axes, measures, strict=True):
        for position, (_, line) in enumerate(listed):
            if line is not None and not math.isnan(line[measure]):
                _bar(ax, position, line[measure], line[f"{measure} sd"], KIND_COLOURS[line["kind"]])
        ax.set(xlabel=MEASURES[measure], xlim=(0, max(112, ax.get_xlim()[1])))
        ax.set_xticks(range(0, 101, 20))
        ax.spines["left"].set_visible(False)
        ax.tick_params(axis="y", length=0)
    names = {position: shorten(name, 56) for position, (name, line) in enumerate(listed) if line is not None}
    axes[0].set_yticks(list(names), list(names.values()))
    axes[0].set_ylim(len(listed) - 0.4, -0.6)
    for position, (name, line) in enumerate(listed):
        if line is None:
            axes[0].text(0, position, shorten(name, 60), va="center", weight="bold")
    return figure


def _bar(ax: Axes, position: int, value: float, deviation: float, colour: str) -> None:
    whisker = 0.0 if math.isnan(deviation) else deviation
    ax.barh(position, value, 0.8, xerr=whisker or None, color=colour, alpha=0.8, ecolor=INK, capsize=2,
            error_kw={"lw": 0.8})  # fmt: skip
    ax.text(value + whisker + 1.5, position, f"{value:.1f}", va="center", size=TEXT - 1)


def level_figure(summary: Summary) -> Drawn | None:
    """Every line with its deviation over seeds; None without deviations, and where lines are many."""
    measure = summary.level
    lines = summary.scored[(summary.scored["kind"] != "expert") & summary.scored[measure].notna()]
    if not 1 < len(lines) <= LINES or lines[f"{measure} sd"].isna().all():
        return None
    figure = bars([("", lines.assign(name=list(map(named, lines.itertuples()))))], [measure])
    caption = f"Mean and standard deviation over up to {lines['n'].max()} seeds."
    return Drawn("levels", "Lines with their deviation over seeds", figure, caption)


def search_figures(summary: Summary) -> list[Drawn]:
    """A figure for every line whose method searched a front: of its first seed that has one."""
    firsts = [(line, next((row for row in line.rows if len(row.front) > 1), None))
              for line in summary.scored.itertuples()]  # fmt: skip
    return [_search_figure(line, row) for line, row in firsts if row is not None]


@styled
def _search_figure(line: Any, row: Row) -> Drawn:
    """Mean scores against what is stored, or without it the scores of every task, a curve a point of the front."""
    figure, points = Figure(figsize=(COLUMN, 2.4), layout="constrained"), row.front
    ax, means = figure.subplots(), [100 * statistics.fmean(point["scores"].values()) for point in points]
    kept = [100 * point["storage"] for point in points if "storage" in point]
    if len(kept) == len(points):
        ax.step(kept, means, where="post", color=INK, lw=0.9, zorder=1)
        ax.plot(kept, means, "o", color=OKABE_ITO[0], ms=3.5)
        ax.set(xlabel="modules kept, % of those of the experts", ylabel="mean validation score, %")
        caption = "Of all scored merges those that no other beats in one without being worse in the other."
    else:
        low, high = min(means), max(means)
        for point, mean in sorted(zip(points, means, strict=True), key=lambda pair: pair[1]):
            shade = COLOURS((mean - low) / (high - low) if high > low else 1.0)
            ax.plot(row.tasks, [100 * point["scores"][task] for task in row.tasks], color=shade, lw=0.9)
        ax.tick_params(axis="x", rotation=45)
        ax.set(ylabel="predicted validation score, %")
        caption = f"A curve a point: the lighter, the higher its mean, {low:.1f} to {high:.1f} %."
    ax.grid(True)
    return Drawn(f"front-{line.Index}", f"The front that {named(line)} found: {len(points)} points", figure, caption)


class Cost(NamedTuple):
    """What a merge costs, an axis of a figure."""

    column: str  # of Summary.lines
    unit: float
    form: str
    axis: str
    title: str


COSTS = {
    "bytes": Cost("stored_bytes", 1e6, "{:.1f} MB", "stored, MB (base included)", "stored bytes"),
    "macs": Cost("macs", 1e6, "{:.1f} M", "multiply-accumulates per sample, millions", "multiply-accumulates"),
    "seconds": Cost("ready_seconds", 1, "{:.2f} s", "merging and training gates, seconds", "seconds of merging"),
}


@styled
def front_figure(summary: Summary, against: str = "bytes") -> Drawn | None:
    """Scores against one of COSTS with the Pareto front; None where fewer than two lines have both, or all cost alike.

    A colour and marker a method, hollow for oracles; where methods are many, a kind, and the front is labelled.
    """
    cost, measure, scored = COSTS[against], summary.merges_level, summary.scored
    lines = scored[(scored[cost.column] > 0) & scored[measure].notna()]
    if len(lines) < 2 or (against != "bytes" and lines[cost.column].nunique() < 2):
        return None
    by_kind = lines["method"].nunique() > TOLD_APART
    oracle = (lines["kind"] == "oracle").map({True: " (oracle)", False: ""})
    names = (lines["kind"] if by_kind else lines["method"] + oracle).rename("name")
    figure = Figure(figsize=(PAGE, max(3.2, 0.6 + 0.14 * names.nunique())), layout="constrained")
    ax, tips = figure.subplots(), {}
    for (name, alike), marker, colour in zip(lines.groupby(names, sort=False), cycle(MARKERS), cycle(OKABE_ITO[:5]),
                                             strict=False):  # fmt: skip
        filled = "none" if str(name).endswith(("oracle", "(oracle)")) else colour
        for number, line in alike.iterrows():
            x = line[cost.column] / cost.unit
            tips[f"point-{number}"] = f"{line['label']}: {line[measure]:.1f} %, {cost.form.format(x)}"
            label = name if number == alike.index[0] else "_"
            point = _points(ax, x, lines.loc[[number]], measure, fmt=marker, color=colour, mfc=filled, ms=4.5,
                            label=label)  # fmt: skip
            point.set_gid(f"point-{number}")
    front = summary.front(cost.column)
    if len(front) > 1:
        ax.step(front[cost.column] / cost.unit, front[measure], where="post", color=INK, lw=0.9, zorder=1,
                label="Pareto front")  # fmt: skip
    scale(ax, lines[cost.column] / cost.unit)
    ax.set(xlabel=cost.axis, ylabel=MEASURES[measure])
    ax.grid(True)
    figure.legend(loc="outside right upper")
    if by_kind:
        best = front[::-1]
        _name(figure, [*zip(best["label"], best[cost.column] / cost.unit, best[measure], strict=True)])
    caption = f"Front: {', '.join(map(named, front.itertuples())) or 'no fair line'}."
    caption += " Bars: standard deviation over seeds." if lines[f"{measure} sd"].notna().any() else ""
    title = f"Score against {cost.title}: {lines['kind'].isin(MERGES).sum()} merges, {len(summary.tasks)} tasks"
    return Drawn(against, title, figure, caption, tips)


def _name(figure: Figure, points: Sequence[tuple[str, float, float]]) -> None:
    """Write names (text, x, y) to the left of points, where nothing is better and cheaper, those first that come first.

    One that would lie on another is left out.
    """
    figure.draw_without_rendering()  # so that texts have a size
    (ax,) = figure.axes
    taken: list[Any] = []
    for text, x, y in points:
        note = ax.annotate(text, (x, y), (0, 0), ha="right", textcoords="offset points",
                           path_effects=[withStroke(linewidth=2, foreground="white")])  # fmt: skip
        for above in ABOVE:
            note.set_position((-3, above))
            box = note.get_window_extent()
            if not any(map(box.overlaps, taken)):
                taken.append(box)
                break
        else:
            note.remove()
