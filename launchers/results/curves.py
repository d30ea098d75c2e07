"""Figures with axes: scores against a number, bars of what a word chose, accuracy against stored bytes."""

import math
from collections.abc import Iterable, Sequence
from itertools import cycle
from textwrap import fill, shorten
from typing import TYPE_CHECKING

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

from launchers.results.frame import MERGES, Summary
from launchers.results.pareto import front_of, level
from launchers.results.style import (
    COLUMN,
    INK,
    KIND_NAMES,
    LOOKS,
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

if TYPE_CHECKING:
    from pandas import DataFrame

FAR = 8  # from this ratio of the largest to the smallest on, an axis is logarithmic
SPAN = 4  # percent that an axis covers at least: noise must not look like a difference
BAR = 0.17  # inches a bar is high
LINES = 40  # of a table at most whose deviations are drawn


@styled
def curves(panels: Sequence[tuple[str, "DataFrame"]], measures: Sequence[str], xlabel: str, at_values: bool) -> Figure:
    """One column wide, a panel for each title and measure below each other; bars are deviations.

    The frames have the columns x, curve (its name), and for each measure its value and "<measure> sd", in percent.
    `at_values`: ticks at the values of x themselves.
    """
    names = list(dict.fromkeys(name for _, frame in panels for name in frame["curve"]))
    shown = {name: fill(name, 52) for name in names}
    rows = [(title, frame, measure) for title, frame in panels for measure in measures]
    height = 0.2 + 2.1 * len(rows) + 0.14 * sum(name.count("\n") + 1 for name in shown.values())
    figure = Figure(figsize=(COLUMN, height), layout="constrained")
    axes = figure.subplots(len(rows), 1, sharex=True, squeeze=False)[:, 0]
    for ax, (title, frame, measure) in zip(axes, rows, strict=True):
        for place, name in enumerate(names):
            _curve(ax, frame[frame["curve"] == name], measure, place, shown[name])
        ax.set(ylabel=MEASURES[measure], title=title)
        ax.grid(True)
        low, high = ax.get_ylim()
        room = max(0.0, SPAN - (high - low)) / 2
        ax.set_ylim(low - room, high + room)
    places = sorted({float(at) for _, frame in panels for at in frame["x"]})
    scale(axes[-1], places)
    if at_values:
        _name_values(axes[-1], places)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower left", handlelength=3)
    axes[-1].set_xlabel(xlabel)
    return figure


def _curve(ax: Axes, points: "DataFrame", measure: str, place: int, name: str) -> None:
    bars = points[f"{measure} sd"]
    ax.errorbar(points["x"], points[measure], bars.fillna(0) if bars.notna().any() else None, label=name,
                color=OKABE_ITO[place % len(OKABE_ITO)], marker=MARKERS[place % len(MARKERS)],
                linestyle=STYLES[place % len(STYLES)], ms=3.5, lw=1, capsize=2)  # fmt: skip


def scale(ax: Axes, places: Iterable[float]) -> None:
    """A logarithmic axis with plain numbers where the places lie far apart."""
    low, high = min(places := list(places)), max(places)
    if low > 0 and high / low >= FAR:
        ax.set_xscale("log")
        ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < 100 else (1,)))
        ax.xaxis.set_major_formatter(ScalarFormatter())
        ax.xaxis.set_minor_formatter(NullFormatter())


def _name_values(ax: Axes, values: Sequence[float]) -> None:
    """Ticks at the values themselves, without those that would stand in each other's way."""
    place = math.log if ax.get_xscale() == "log" else float
    fit = 9 if max(len(f"{value:.3g}") for value in values) < 5 else 6
    room = (place(values[-1]) - place(values[0])) / fit
    kept = [values[0]]
    for value in values[1:]:
        if place(value) - place(kept[-1]) >= room:
            kept.append(value)
    ax.set_xticks(kept, [f"{value:.3g}" for value in kept])
    ax.minorticks_off()


@styled
def bars(groups: Sequence[tuple[str, "DataFrame"]], measures: Sequence[str]) -> Figure:
    """A bar a line below the heading of its group, a panel a measure; the frames have name, kind and the measures."""
    listed = [bar for heading, frame in groups
              for bar in ((heading, None), *((line["name"], line) for _, line in frame.iterrows()))]  # fmt: skip
    wide = PAGE if len(measures) > 1 else COLUMN
    figure = Figure(figsize=(wide, 0.55 + BAR * len(listed)), layout="constrained")
    axes = figure.subplots(1, len(measures), sharey=True, squeeze=False)[0]
    for ax, measure in zip(axes, measures, strict=True):
        for place, (_, line) in enumerate(listed):
            if line is not None and not math.isnan(line[measure]):
                _bar(ax, place, line[measure], line[f"{measure} sd"], LOOKS[line["kind"]][1])
        ax.set(xlabel=MEASURES[measure], xlim=(0, max(112, ax.get_xlim()[1])), ylim=(len(listed) - 0.4, -0.6))
        ax.set_xticks(range(0, 101, 20))
        ax.spines["left"].set_visible(False)
        ax.tick_params(axis="y", length=0)
    inside = {place: shorten(name, 56) for place, (name, line) in enumerate(listed) if line is not None}
    axes[0].set_yticks(list(inside), list(inside.values()))
    for place, (name, line) in enumerate(listed):
        if line is None:
            axes[0].text(0, place, shorten(name, 60), va="center", weight="bold")
    return figure


def _bar(ax: Axes, place: int, value: float, deviation: float, colour: str) -> None:
    ax.barh(place, value, 0.8, color=colour, alpha=0.8)
    whisker = 0.0 if math.isnan(deviation) else deviation
    if whisker:
        ax.errorbar(value, place, xerr=whisker, color=INK, lw=0.8, capsize=2)
    ax.text(value + whisker + 1.5, place, f"{value:.1f}", va="center", size=TEXT - 1)


@styled
def level_figure(summary: Summary) -> Drawn | None:
    """Every line at its accuracy with its deviation over seeds; None without deviations, and where lines are many."""
    measure = level(summary)
    lines = summary.scored[(summary.scored["kind"] != "expert") & summary.scored[measure].notna()]
    if not 1 < len(lines) <= LINES or lines[f"{measure} sd"].isna().all():
        return None
    figure = Figure(figsize=(PAGE, 0.75 + BAR * len(lines)), layout="constrained")
    ax = figure.subplots()
    places = dict(zip(lines.index, range(len(lines)), strict=True))
    for kind, alike in lines.groupby("kind", sort=False):
        marker, colour = LOOKS[str(kind)]
        ax.errorbar(alike[measure], [places[number] for number in alike.index], xerr=alike[f"{measure} sd"], fmt=marker,
                    color=colour, ms=4, lw=1, capsize=2, label=KIND_NAMES[str(kind)])  # fmt: skip
    ax.grid(True, axis="y")
    ax.set_yticks(range(len(lines)), [named(line.label, line.Index) for line in lines.itertuples()])
    ax.set(xlabel=MEASURES[measure], ylim=(len(lines) - 0.4, -0.6))
    ax.tick_params(axis="y", length=0)
    figure.legend(loc="outside upper left", ncols=5)
    caption = f"Mean and standard deviation over up to {lines['n'].max()} seeds."
    return Drawn("levels", "Lines with their deviation over seeds", figure, caption)


@styled
def bytes_figure(summary: Summary) -> Drawn | None:
    """Accuracy against stored megabytes with the Pareto front; None where fewer than two lines have both.

    A colour and marker a method, hollow for oracles.
    """
    measure, scored = level(summary), summary.scored
    lines = scored[(scored["stored_bytes"] > 0) & scored[measure].notna()]
    if len(lines) < 2:
        return None
    lines = lines.assign(stored_mb=lines["stored_bytes"] / 1e6)
    methods = list(dict.fromkeys(lines["method"]))
    figure = Figure(figsize=(PAGE, max(3.2, 0.6 + 0.14 * len(methods))), layout="constrained")
    ax = figure.subplots()
    tips = {}
    for method, marker, colour in zip(methods, cycle(MARKERS), cycle(OKABE_ITO[:5]), strict=False):
        for line in lines[lines["method"] == method].assign(sd=lines[f"{measure} sd"]).itertuples():
            score, gid = getattr(line, measure), f"point-{line.Index}"
            if not math.isnan(line.sd):
                ax.errorbar(line.stored_mb, score, line.sd, color=colour, lw=0.7, capsize=2, fmt="none", alpha=0.7)
            (point,) = ax.plot(line.stored_mb, score, marker, color=colour, ms=4.5, ls="none", zorder=3)
            if line.kind == "oracle":
                point.set_markerfacecolor("none")
            point.set_gid(gid)
            tips[gid] = f"{line.label}: {score:.1f} %, {line.stored_mb:.1f} MB"
            suffix = " (oracle)" if line.kind == "oracle" else ""
            point.set_label(
                f"{method}{suffix}" if f"{method}{suffix}" not in ax.get_legend_handles_labels()[1] else "_"
            )
    fair = front_of(summary)
    for best, dashes, name in (
        (fair, "-", "Pareto front"),
        (front_of(summary, ("oracle",)), ":", "front of oracles"),
    ):
        if len(best) > 1:
            ax.step(
                best["stored_bytes"] / 1e6, best[measure], dashes, where="post", color=INK, lw=0.9, zorder=1, label=name
            )
    scale(ax, lines["stored_mb"])
    ax.set(xlabel="stored, MB (base included)", ylabel=MEASURES[measure])
    ax.grid(True)
    figure.legend(loc="outside right upper")
    caption = f"Front: {', '.join(named(line.label, line.Index) for line in fair.itertuples()) or 'no fair line'}."
    caption += " Bars: standard deviation over seeds." if lines[f"{measure} sd"].notna().any() else ""
    merges = int(lines["kind"].isin(MERGES).sum())
    title = f"Accuracy against stored bytes: {merges} merges, {len(summary.tasks)} tasks"
    return Drawn("bytes", title, figure, caption, tips)
