"""Accuracy against one knob, and beside it what else the knob changes."""

import math
from collections.abc import Sequence
from textwrap import fill

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from launchers.results.frame import Line, Summary
from launchers.results.labels import labels
from launchers.results.report.axes import Run
from launchers.results.report.points import SPAN, Point, measures, scale
from launchers.results.report.style import COLUMN, MARKERS, OKABE_ITO, STYLES, Drawn, styled

CURVES = 6  # in one panel at most
Panel = tuple[str, Sequence[Sequence[Point]]]  # what its axis says, and its curves


@styled
def knob_figure(summary: Summary, knob: str, found: Sequence[Run]) -> Drawn:
    """A curve a method (and what else tells curves apart); a panel for accuracy, others for what varies with it."""
    shown = found[:CURVES]
    panels = [
        (each.unit, [[point for at, line in run if (point := each.point(line, at)) is not None] for run in shown])
        for each in measures(summary, [[line for _, line in run] for run in shown])
    ]
    told_apart = names([knob] * len(shown), [run[0][1] for run in shown], tell=False)
    figure = curve_panels(panels, told_apart, knob)
    deviations = any(point.deviation is not None for _, curves in panels for run in curves for point in run)
    caption = "Bars: standard deviation over seeds." if deviations else ""
    if len(found) > CURVES:
        caption += f" The {CURVES} longest of {len(found)} curves; the others are in the table."
    return Drawn(f"knob-{knob}", f"Accuracy against {knob}", figure, caption.strip(), COLUMN)


def curve_panels(panels: Sequence[Panel], names: Sequence[str], xlabel: str, values: bool = True) -> Figure:
    """One column wide: panels below each other of points joined by lines that differ in colour, marker and dashes.

    Bars are deviations. `values`: ticks at the values themselves.
    """
    names = [fill(name, 52) for name in names]
    height = 0.2 + 2.1 * len(panels) + 0.14 * sum(name.count("\n") + 1 for name in names)
    figure = Figure(figsize=(COLUMN, height), layout="constrained")
    axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    for ax, (unit, curves) in zip(axes, panels, strict=True):
        for number, run in enumerate(curves):
            _curve(ax, run, number, names[number])
        ax.set_ylabel(unit)
        ax.grid(True)
        low, high = ax.get_ylim()
        room = max(0.0, SPAN - (high - low)) / 2
        ax.set_ylim(low - room, high + room)
    places = sorted({point.at for _, curves in panels for run in curves for point in run})
    if places:
        scale(axes[-1], places)
        if values:
            _name_values(axes[-1], places)
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower left", handlelength=3)
    axes[-1].set_xlabel(xlabel)
    return figure


def _curve(ax: Axes, run: Sequence[Point], number: int, name: str) -> None:
    ax.errorbar(
        [point.at for point in run],
        [point.score for point in run],
        [point.deviation or 0 for point in run] if any(point.deviation for point in run) else None,
        color=OKABE_ITO[number % len(OKABE_ITO)],
        marker=MARKERS[number % len(MARKERS)],
        linestyle=STYLES[number % len(STYLES)],
        ms=3.5,
        lw=1,
        capsize=2,
        label=name,
    )


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


def names(knobs: Sequence[str], firsts: Sequence[Line], tell: bool = True) -> list[str]:
    """What tells curves apart: the label of a line of each without its knob, and if `tell` the knob's name behind."""
    found = []
    for knob, label in zip(knobs, labels([line.rows[0] for line in firsts]), strict=True):
        last = knob.rpartition(".")[2]
        parts = [part for part in label.split(" ") if part.partition("=")[0].rpartition(".")[2] != last]
        found.append(" ".join([*parts, f"({last})"] if tell else parts))
    told = [" (told the true task)" if line.kind == "oracle" else "" for line in firsts]
    return [name + more for name, more in zip(found, told, strict=True)]
