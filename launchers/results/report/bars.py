"""Bars for what was chosen by a word, and every line of a table with its deviation over seeds."""

from collections.abc import Mapping, Sequence
from textwrap import shorten
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from launchers.results.frame import Line, Summary
from launchers.results.labels import labels
from launchers.results.report.axes import Choice
from launchers.results.report.points import Measure, accuracy, measures
from launchers.results.report.style import COLUMN, INK, LOOKS, PAGE, SAYS, TEXT, Drawn, named, styled

GROUPS = 6  # of bars in a figure at most
LINES = 40  # of a table at most whose deviations are drawn
BAR = 0.17  # inches a bar is high
Bars = list[tuple[str, Line | None]]  # a name, and its line; None is a heading


@styled
def choice_figure(summary: Summary, knob: str, found: Sequence[Choice]) -> Drawn:
    """A bar a line, grouped by what the lines share; beside accuracy what else the choice changes."""
    shown = found[:GROUPS]
    told = measures(summary, [each.lines for each in shown])
    bars = [bar for number, each in enumerate(shown) for bar in _group(summary, each, _heading(shown, number))]
    figure = _bars(bars, told)
    caption = "Bars: mean over seeds; whiskers: standard deviation." if _deviate(bars, told[0]) else ""
    if any(name.startswith("alone: ") for name, _ in bars):
        caption += " Alone: what the part gives by itself."
    if len(found) > GROUPS:
        caption += f" The {GROUPS} largest of {len(found)} groups; the others are in the table."
    return Drawn(f"choice-{knob}", f"Accuracy by {knob}", figure, caption.strip(), figure.get_figwidth())


def _heading(shown: Sequence[Choice], number: int) -> str:
    """What a group's lines share, told where there are several groups."""
    if len(shown) == 1:
        return shown[0].lines[0].rows[0].method
    last = shown[number].knob.rpartition(".")[2]
    told = labels([each.lines[0].rows[0] for each in shown])[number].split(" ")
    return " ".join(part for part in told if part.partition("=")[0].rpartition(".")[2] != last)


def _group(summary: Summary, choice: Choice, heading: str) -> Bars:
    bars: Bars = [(heading, None)]
    for name, line in zip(choice.names, choice.lines, strict=True):
        bars.append((name, line))
        alone = _alone(summary, line, choice.knob)
        bars += [(f"alone: {alone.rows[0].method}", alone)] if alone is not None else []
    return bars


def _alone(summary: Summary, line: Line, knob: str) -> Line | None:
    """The line of the method that is a part of another, at the scale it has there."""
    part: Any = line.rows[0].config
    for name in knob.split("."):
        part = part.get(name) if isinstance(part, Mapping) else None
    if not isinstance(part, Mapping):
        return None
    static = [each for each in summary.lines if each.kind == "static" and each.rows[0].config.get("method") == part]
    return next((each for each in static if each.rows[0].scale == part.get("scale")), None)


def _bars(bars: Bars, told: Sequence[Measure]) -> Figure:
    wide = PAGE if len(told) > 1 else COLUMN
    figure = Figure(figsize=(wide, 0.55 + BAR * len(bars)), layout="constrained")
    axes = figure.subplots(1, len(told), sharey=True, squeeze=False)[0]
    for ax, measure in zip(axes, told, strict=True):
        for place, (_, line) in enumerate(bars):
            if line is not None:
                _bar(ax, place, line, measure)
        ax.set(xlabel=measure.unit, xlim=(0, max(112, ax.get_xlim()[1])), ylim=(len(bars) - 0.4, -0.6))
        ax.set_xticks(range(0, 101, 20))
        ax.spines["left"].set_visible(False)
        ax.tick_params(axis="y", length=0)
    named = [(place, shorten(name, 56)) for place, (name, line) in enumerate(bars) if line is not None]
    axes[0].set_yticks([place for place, _ in named], [name for _, name in named])
    for place, (name, line) in enumerate(bars):
        if line is None:
            axes[0].text(0, place, shorten(name, 60), va="center", weight="bold")
    return figure


def _bar(ax: Axes, place: int, line: Line, measure: Measure) -> None:
    point = measure.point(line, place)
    if point is None:
        return
    ax.barh(place, point.score, 0.8, color=LOOKS[line.kind][1], alpha=0.8)
    reach = point.deviation or 0.0
    if reach:
        ax.errorbar(point.score, place, xerr=reach, color=INK, lw=0.8, capsize=2)
    ax.text(point.score + reach + 1.5, place, f"{point.score:.1f}", va="center", size=TEXT - 1)


def _deviate(bars: Bars, measure: Measure) -> bool:
    values = [measure.of(line) for _, line in bars if line is not None]
    return any(value is not None and value.deviation is not None for value in values)


@styled
def level_figure(summary: Summary) -> Drawn | None:
    """Every line at its accuracy with its deviation over seeds; None without deviations, and where lines are many."""
    told = accuracy(summary)
    lines = [line for line in summary.lines if told.of(line) is not None and line.kind != "expert"]
    if not 1 < len(lines) <= LINES or not _deviate([("", line) for line in lines], told):
        return None
    figure = Figure(figsize=(PAGE, 0.75 + BAR * len(lines)), layout="constrained")
    ax = figure.subplots()
    seen = set()
    for place, line in enumerate(lines):
        point, (marker, colour) = told.point(line, place), LOOKS[line.kind]
        assert point is not None
        label = None if line.kind in seen else SAYS[line.kind]
        seen.add(line.kind)
        bar = None if point.deviation is None else [point.deviation]
        ax.errorbar([point.score], [place], xerr=bar, fmt=marker, color=colour, ms=4, lw=1, capsize=2, label=label)
    ax.grid(True, axis="y")
    ax.set_yticks(range(len(lines)), [named(summary, line) for line in lines])
    ax.set(xlabel=told.unit, ylim=(len(lines) - 0.4, -0.6))
    ax.tick_params(axis="y", length=0)
    figure.legend(loc="outside upper left", ncols=5)
    seeds = max(len(line.rows) for line in lines)
    told_of = f"Mean and standard deviation over up to {seeds} seeds."
    return Drawn("levels", "Lines with their deviation over seeds", figure, told_of, PAGE)
