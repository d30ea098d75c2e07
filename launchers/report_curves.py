"""Figures with axes: accuracy against stored bytes with its Pareto front, and accuracy against one knob."""

import json
import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from textwrap import fill
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, ScalarFormatter

from launchers import front
from launchers.columns import COMPETE
from launchers.labels import identity, labels
from launchers.report_style import COLUMN, INK, MARKERS, OKABE_ITO, PAGE, STYLES, TEXT, Drawn, named, styled
from launchers.summary import Line, Summary, Value

LOOKS = {"base": ("X", INK), "static": ("o", OKABE_ITO[0]), "routed": ("s", OKABE_ITO[1]),
         "oracle": ("^", OKABE_ITO[2]), "expert": ("P", INK)}  # fmt: skip
SAYS = {"base": "base", "static": "static", "routed": "routed per input", "oracle": "told the true task",
        "expert": "experts"}  # fmt: skip
PLACES = ((5, 0, "left", "center"), (-5, 0, "right", "center"), (0, 5, "center", "bottom"), (0, -5, "center", "top"),
          (4, 6, "left", "bottom"), (4, -6, "left", "top"), (-4, 6, "right", "bottom"), (-4, -6, "right", "top"),
          (0, 12, "center", "bottom"), (0, -12, "center", "top"))  # of a name beside its point, in points  # fmt: skip
Box = tuple[float, float, float, float]
CURVES = 6  # in one panel at most
FAR = 8  # from this ratio of the largest to the smallest on, an axis is logarithmic


@dataclass(frozen=True)
class Point:
    """A line of the table as a point: `at` in megabytes or in units of a knob, `score` in percent."""

    line: Line
    at: float
    score: float
    deviation: float | None


def pareto(points: Iterable[Point]) -> list[Point]:
    """The points that no other beats in both: less to store, more accurate. By rising size."""
    listed = list(points)
    return [listed[index] for index in front.front([front.Point(each.score, each.at) for each in listed])]


def scores(summary: Summary) -> tuple[str, dict[str, Value]]:
    """What the axis says, and by run id of its first row each scored line's value on it."""
    scored = [line for line in summary.lines if not line.failed]
    relative = all(line.norm for line in scored)
    values = {line.rows[0].run_id: line.norm if relative else line.mean for line in scored}
    unit = "mean accuracy, % of the experts'" if relative else "mean accuracy, %"
    return unit, {key: value for key, value in values.items() if value is not None}


def _point(line: Line, at: float, values: Mapping[str, Value]) -> Point:
    value = values[line.rows[0].run_id]
    return Point(line, at, 100 * value.mean, None if value.deviation is None else 100 * value.deviation)


@styled
def bytes_figure(summary: Summary) -> Drawn | None:
    """Accuracy against stored megabytes; None where fewer than two lines were scored."""
    unit, values = scores(summary)
    points = [
        _point(line, statistics.fmean(row.stored_bytes for row in line.rows) / 1e6, values)
        for line in summary.lines if not line.failed
    ]  # fmt: skip
    points = [point for point in points if point.at > 0]
    if len(points) < 2:
        return None
    figure = Figure(figsize=(PAGE, 3.6), layout="constrained")
    ax = figure.subplots()
    tips = _scatter(ax, points)
    fair = pareto(point for point in points if point.line.kind in COMPETE and not point.line.transductive)
    told = pareto(point for point in points if point.line.kind == "oracle")
    for best, look, name in ((fair, "-", "Pareto front"), (told, ":", "front when told the task")):
        if len(best) > 1:
            at, score = [point.at for point in best], [point.score for point in best]
            ax.plot(at, score, look, drawstyle="steps-post", color=INK, lw=0.9, zorder=1, label=name)
    _scale(ax, [point.at for point in points])
    ax.set(xlabel="stored, MB (base included)", ylabel=unit)
    ax.grid(True)
    figure.legend(loc="outside upper center", ncols=7, columnspacing=1.2, handletextpad=0.4)
    ends = [point for point in points if point.line.kind in ("base", "expert")]
    few = points if len(points) <= 12 else []
    wanted = list({id(point): point for point in (*fair, *ends, *told, *few)}.values())
    _label(figure, ax, summary, wanted, _taken(points, (fair, told)))
    caption = f"Front: {', '.join(named(summary, point.line) for point in fair) or 'no fair line'}."
    caption += " Bars: standard deviation over seeds." if any(point.deviation is not None for point in points) else ""
    return Drawn("bytes", "Accuracy against stored bytes", figure, caption, PAGE, tips)


def _scatter(ax: Axes, points: Sequence[Point]) -> dict[str, str]:
    """One point a line of the table, and what a pointer over it reads, by the ids given to the points."""
    tips, shown = {}, set()
    for number, point in enumerate(points):
        marker, colour = LOOKS[point.line.kind]
        label = None if point.line.kind in shown else SAYS[point.line.kind]
        shown.add(point.line.kind)
        if point.deviation is not None:
            ax.errorbar(point.at, point.score, point.deviation, color=colour, lw=0.7, capsize=2, fmt="none", alpha=0.7)
        (drawn,) = ax.plot(point.at, point.score, marker, color=colour, ms=4.5, label=label, ls="none", zorder=3)
        if point.line.kind == "oracle":
            drawn.set_markerfacecolor("none")
        drawn.set_gid(f"point-{number}")
        tips[f"point-{number}"] = f"{point.line.label}: {point.score:.1f} %, {point.at:.1f} MB"
    return tips


def _label(figure: Figure, ax: Axes, summary: Summary, wanted: Sequence[Point], taken: list[Box]) -> None:
    """Names beside points, where they cover nothing that is `taken` (data coordinates) nor each other."""
    figure.draw_without_rendering()
    pixels = ax.transData.transform
    boxes = [(*(pixels(box[:2]) - 3), *(pixels(box[2:]) + 3)) for box in taken]
    frame = ax.get_window_extent()
    for point in wanted:
        for dx, dy, ha, va in PLACES:
            text = ax.annotate(named(summary, point.line), (point.at, point.score), (dx, dy), ha=ha, va=va,
                               textcoords="offset points", size=TEXT - 1, annotation_clip=False)  # fmt: skip
            text.set_in_layout(False)
            box = text.get_window_extent()
            inside = frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0 and box.y1 <= frame.y1
            if inside and not any(_cover(box.extents, other) for other in boxes):
                boxes.append(tuple(box.extents))
                break
            text.remove()


def _taken(points: Sequence[Point], fronts: Sequence[Sequence[Point]]) -> list[Box]:
    """Where points with their bars and the steps of fronts lie: left, bottom, right, top."""
    bars = [(p.at, p.score - (p.deviation or 0), p.at, p.score + (p.deviation or 0)) for p in points]
    pairs = [pair for best in fronts for pair in pairwise(best)]
    flat = [(one.at, one.score, other.at, one.score) for one, other in pairs]
    steep = [(other.at, one.score, other.at, other.score) for one, other in pairs]
    return [*bars, *flat, *steep]


def _cover(one: Sequence[float], other: Sequence[float]) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def _scale(ax: Axes, places: Sequence[float]) -> None:
    """A logarithmic axis with plain numbers where the places lie far apart."""
    if min(places) > 0 and max(places) / min(places) >= FAR:
        ax.set_xscale("log")
        ax.xaxis.set_major_formatter(ScalarFormatter())
        ax.xaxis.set_minor_formatter(NullFormatter())
        if math.log10(max(places) / min(places)) < 2:  # else one tick or none would be named
            ax.set_xticks(_round_numbers(min(places), max(places)))


def _name_values(ax: Axes, values: Sequence[float]) -> None:
    """Ticks at the values themselves, without those that would stand in each other's way."""
    place = math.log if ax.get_xscale() == "log" else float
    room = (place(values[-1]) - place(values[0])) / 9
    kept = [values[0]]
    for value in values[1:]:
        if place(value) - place(kept[-1]) >= room:
            kept.append(value)
    ax.set_xticks(kept, [f"{value:g}" for value in kept])
    ax.minorticks_off()


def _round_numbers(low: float, high: float) -> list[float]:
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    return [n * 10.0**d for d in decades for n in (1, 2, 5) if low / 1.3 <= n * 10.0**d <= high * 1.3]


def curves(summary: Summary) -> dict[str, list[list[Point]]]:
    """Dotted knob -> runs of lines that differ in that number alone, longest first, each by rising value."""
    lines = {line.rows[0].run_id: line for line in summary.lines if not line.failed}
    known = {key: identity(line.rows[0]) for key, line in lines.items()}
    _, values = scores(summary)
    runs: dict[str, dict[str, list[Point]]] = defaultdict(lambda: defaultdict(list))
    for key, own in known.items():
        for knob, value in own.items():
            if _is_number(value) and not knob.startswith("row."):
                rest = json.dumps({**own, knob: None}, sort_keys=True)
                runs[knob][rest].append(_point(lines[key], value, values))
    found = {
        knob: [run for run in each.values() if len({point.at for point in run}) > 1] for knob, each in runs.items()
    }
    return {
        knob: sorted((sorted(run, key=lambda point: point.at) for run in each), key=len, reverse=True)
        for knob, each in found.items() if each
    }  # fmt: skip


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


@styled
def knob_figure(summary: Summary, knob: str, runs: Sequence[Sequence[Point]]) -> Drawn:
    """Accuracy against one knob, a curve a method (and what else tells curves apart)."""
    shown = runs[:CURVES]
    figure = curve_panel(shown, _names(knob, shown), knob, scores(summary)[0])
    caption = "Bars: standard deviation over seeds." if any(p.deviation is not None for r in shown for p in r) else ""
    if len(runs) > CURVES:
        caption += f" The {CURVES} longest of {len(runs)} curves; the others are in the table."
    return Drawn(f"knob-{knob}", f"Accuracy against {knob}", figure, caption.strip(), COLUMN)


def curve_panel(runs: Sequence[Sequence[Point]], names: Sequence[str], xlabel: str, ylabel: str) -> Figure:
    """One column wide: points joined by lines that differ in colour, marker and dashes; bars are deviations."""
    figure = Figure(figsize=(COLUMN, 2.5 + 0.13 * len(runs)), layout="constrained")
    ax = figure.subplots()
    for number, (run, name) in enumerate(zip(runs, names, strict=True)):
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
            label=fill(name, 52),
        )
    places = sorted({point.at for run in runs for point in run})
    if places:
        _scale(ax, places)
        _name_values(ax, places)
        figure.legend(loc="outside lower left", handlelength=3)
    ax.set(xlabel=xlabel, ylabel=ylabel)
    ax.grid(True)
    return figure


def _names(knob: str, runs: Sequence[Sequence[Point]]) -> list[str]:
    """What tells the curves apart: their labels without the knob itself."""
    firsts = labels([run[0].line.rows[0] for run in runs])
    last = knob.rpartition(".")[2]
    return [
        " ".join(part for part in name.split(" ") if part.partition("=")[0].rpartition(".")[2] != last)
        for name in firsts
    ]
