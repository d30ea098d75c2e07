"""A figure over several tables of one suite: accuracy against the number of tasks that were merged."""

import json
import statistics
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import replace
from itertools import groupby

from launchers.results.frame import Line, Summary, over_seeds
from launchers.results.labels import identity, labels
from launchers.results.report.curves import curve_panels
from launchers.results.report.points import Point, accuracy
from launchers.results.report.style import COLUMN, Drawn, styled
from launchers.rows import Row


@styled
def count_figures(summaries: Iterable[Summary]) -> list[Drawn]:
    """One for every suite that was merged with different numbers of tasks."""
    suites: dict[str, list[Summary]] = defaultdict(list)
    for summary in summaries:
        suites[summary.suite].append(summary)
    return [
        _figure(suite, members) for suite, members in suites.items()
        if len({len(summary.tasks) for summary in members}) > 1
    ]  # fmt: skip


def _figure(suite: str, members: list[Summary]) -> Drawn:
    unit, found = by_count(members)
    figure = curve_panels([(unit, [*found.values()])], [*found], "number of tasks")
    title = f"{suite}: accuracy against the number of tasks"
    caption = "Mean over sets of tasks; bars: standard deviation over them, for a single set over its seeds."
    return Drawn(f"{suite}-tasks", title, figure, caption, COLUMN)


def by_count(members: list[Summary]) -> tuple[str, dict[str, list[Point]]]:
    """What the axis says, and by name of the line its points, a number of tasks each; only lines with several."""
    units = {accuracy(summary).unit for summary in members}
    relative = len(units) == 1
    unit = units.pop() if relative else "mean accuracy, %"
    lines: dict[str, list[tuple[int, Line]]] = defaultdict(list)
    for summary in members:
        for line in summary.lines:
            if not line.failed and not (line.kind == "expert" and line.norm):
                lines[json.dumps(identity(_anywhere(line.rows[0])), sort_keys=True)].append((len(summary.tasks), line))
    runs = {key: _run(each, relative) for key, each in lines.items()}
    kept = {key: run for key, run in runs.items() if len(run) > 1}
    names = labels([_anywhere(run[0].line.rows[0]) for run in kept.values()])
    return unit, dict(zip(names, kept.values(), strict=True))


def _run(lines: list[tuple[int, Line]], relative: bool) -> list[Point]:
    points = []
    for count, group in groupby(sorted(lines, key=lambda each: each[0]), key=lambda each: each[0]):
        same = [line for _, line in group]
        values = [value for line in same if (value := (line.norm if relative else None) or line.mean)]
        over = over_seeds([value.mean for value in values])
        deviation = values[0].deviation if len(values) == 1 else over.deviation
        points.append(Point(same[0], count, 100 * statistics.fmean(value.mean for value in values),
                            None if deviation is None else 100 * deviation))  # fmt: skip
    return points


def _anywhere(row: Row) -> Row:
    """The row without what follows from its tasks."""
    suite = row.config.get("suite")
    config = {name: part for name, part in row.config.items() if name not in ("order", "count")}
    if isinstance(suite, dict):
        config["suite"] = {name: value for name, value in suite.items() if name != "tasks"}
    return replace(row, config=config)
