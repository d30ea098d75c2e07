"""Accuracy against stored bytes: every line with the Pareto front, and methods along one of their knobs."""

import statistics
from collections.abc import Sequence
from itertools import pairwise

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from launchers.results.columns import COMPETE
from launchers.results.frame import REFERENCES, Line, Summary
from launchers.results.report.axes import LONG, runs
from launchers.results.report.curves import CURVES, curve_panels, names
from launchers.results.report.points import Measure, Point, accuracy, pareto, scale
from launchers.results.report.style import INK, LOOKS, PAGE, SAYS, TEXT, Drawn, named, settle, styled

PLACES = ((5, 0, "left", "center"), (-5, 0, "right", "center"), (0, 5, "center", "bottom"), (0, -5, "center", "top"),
          (4, 6, "left", "bottom"), (4, -6, "left", "top"), (-4, 6, "right", "bottom"), (-4, -6, "right", "top"),
          (0, 12, "center", "bottom"), (0, -12, "center", "top"))  # of a name beside its point, in points  # fmt: skip
AXIS = "stored, MB (base included)"
Box = tuple[float, float, float, float]


@styled
def bytes_figure(summary: Summary) -> Drawn | None:
    """Accuracy against stored megabytes; None where fewer than two lines were scored."""
    told = accuracy(summary)
    points = [point for line in summary.lines if (point := _at(line, told)) is not None]
    if len(points) < 2:
        return None
    figure = Figure(figsize=(PAGE, 3.6), layout="constrained")
    ax = figure.subplots()
    tips = _scatter(ax, points)
    fair = pareto(point for point in points if point.line.kind in COMPETE and point.line.fair)
    ceiling = pareto(point for point in points if point.line.kind == "oracle")
    for best, look, name in ((fair, "-", "Pareto front"), (ceiling, ":", "front when told the task")):
        if len(best) > 1:
            at, score = [point.at for point in best], [point.score for point in best]
            ax.plot(at, score, look, drawstyle="steps-post", color=INK, lw=0.9, zorder=1, label=name)
    scale(ax, [point.at for point in points])
    ax.set(xlabel=AXIS, ylabel=told.unit)
    ax.grid(True)
    figure.legend(loc="outside upper center", ncols=7, columnspacing=1.2, handletextpad=0.4)
    ends = [point for point in points if point.line.kind in REFERENCES]
    few = points if len(points) <= 12 else []
    wanted = list({id(point): point for point in (*fair, *ends, *ceiling, *few)}.values())
    _label(figure, ax, summary, wanted, _taken(points, (fair, ceiling)))
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
    settle(figure)
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


def _at(line: Line, told: Measure) -> Point | None:
    """The line at its megabytes; None where it failed or stores nothing."""
    size = 0.0 if line.failed else statistics.fmean(row.stored_bytes for row in line.rows) / 1e6
    return told.point(line, size) if size > 0 else None


@styled
def size_figure(summary: Summary) -> Drawn | None:
    """Accuracy against stored megabytes along the knobs that change both; None where there is no such knob."""
    told = accuracy(summary)
    found = []
    for knob, each in runs(summary).items():
        for run in each:
            points = [point for _, line in run if (point := _at(line, told)) is not None]
            if len({round(point.at, 2) for point in points}) >= LONG:
                found.append((knob, sorted(points, key=lambda point: point.at)))
    shown = sorted(found, key=lambda each: len(each[1]), reverse=True)[:CURVES]
    if not shown:
        return None
    told_apart = names([knob for knob, _ in shown], [points[0].line for _, points in shown])
    figure = curve_panels([(told.unit, [points for _, points in shown])], told_apart, AXIS, values=False)
    caption = "Lines join merges that differ in one knob."
    if any(point.deviation is not None for _, points in shown for point in points):
        caption += " Bars: standard deviation over seeds."
    caption += f" The {CURVES} longest of {len(found)} lines." if len(found) > CURVES else ""
    return Drawn("sizes", "Accuracy against stored bytes, knob by knob", figure, caption, figure.get_figwidth())
