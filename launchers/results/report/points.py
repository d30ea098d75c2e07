"""What figures with axes are made of: lines of a table as points, on what a reader may want to know of them."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.ticker import NullFormatter, ScalarFormatter

from launchers.results import pareto as front
from launchers.results.frame import Line, Summary, Value

FAR = 8  # from this ratio of the largest to the smallest on, an axis is logarithmic
SPAN = 4  # percent that an axis or the colours of an ablation cover at least: noise must not look like a difference
VARIES = 0.5  # percent; what varies less along an ablation is not drawn beside the accuracy


@dataclass(frozen=True)
class Point:
    """A line of the table as a point: `at` in megabytes or in units of a knob, `score` in percent."""

    line: Line
    at: float
    score: float
    deviation: float | None


@dataclass(frozen=True)
class Measure:
    """What is drawn: the words on its axis, and by run id of a line's first row its value, a fraction."""

    unit: str
    values: Mapping[str, Value]

    def of(self, line: Line) -> Value | None:
        return self.values.get(line.rows[0].run_id)

    def point(self, line: Line, at: float) -> Point | None:
        """None where the line has no such value."""
        value = self.of(line)
        if value is None:
            return None
        return Point(line, at, 100 * value.mean, None if value.deviation is None else 100 * value.deviation)


def accuracy(summary: Summary) -> Measure:
    """Normalised accuracy if every scored line has one, else plain accuracy."""
    scored = [line for line in summary.lines if not line.failed]
    relative = all(line.norm for line in scored)
    values = {line.rows[0].run_id: line.norm if relative else line.mean for line in scored}
    unit = "mean accuracy, % of the experts'" if relative else "mean accuracy, %"
    return Measure(unit, {key: value for key, value in values.items() if value is not None})


def measures(summary: Summary, groups: Iterable[Iterable[Line]]) -> list[Measure]:
    """Accuracy, and beside it what differs within one of the groups: images routed right, energy that is kept."""
    listed = [list(group) for group in groups]
    right = {line.rows[0].run_id: line.routed_right for line in summary.lines if not line.failed}
    held = {line.rows[0].run_id: line.energy for line in summary.lines if not line.failed}
    others = [Measure("images routed right, %", {key: value for key, value in right.items() if value}),
              Measure("energy kept, %", {key: value for key, value in held.items() if value})]  # fmt: skip
    return [accuracy(summary), *(each for each in others if any(_varies(each, group) for group in listed))]


def _varies(measure: Measure, lines: Iterable[Line]) -> bool:
    known = [100 * value.mean for line in lines if (value := measure.of(line))]
    return bool(known) and max(known) - min(known) > VARIES


def pareto(points: Iterable[Point]) -> list[Point]:
    """The points that no other beats in both: less to store, more accurate. By rising size."""
    listed = list(points)
    return [listed[index] for index in front.front([front.Point(each.score, each.at) for each in listed])]


def scale(ax: Axes, places: Iterable[float]) -> None:
    """A logarithmic axis with plain numbers where the places lie far apart."""
    low, high = min(places := list(places)), max(places)
    if low > 0 and high / low >= FAR:
        ax.set_xscale("log")
        ax.xaxis.set_major_formatter(ScalarFormatter())
        ax.xaxis.set_minor_formatter(NullFormatter())
        if math.log10(high / low) < 2:  # else one tick or none would be named
            ax.set_xticks(_round_numbers(low, high))


def _round_numbers(low: float, high: float) -> list[float]:
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    return [n * 10.0**d for d in decades for n in (1, 2, 5) if low / 1.3 <= n * 10.0**d <= high * 1.3]
