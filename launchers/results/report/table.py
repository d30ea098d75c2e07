"""The summary table of a report, its warnings and where its numbers come from; the same lines as in the terminal."""

import re
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from launchers.results.columns import Cell, Column, columns
from launchers.results.frame import Line, Summary, Value
from launchers.results.notes import notes
from launchers.rows import Row

WORDS = ("method", "kind", "needs", "router", "granularity", "adapt",
         "run", "code", "family", "created", "scale from")  # columns of words, not of numbers  # fmt: skip


RIGHT, ENERGY = "routed right", "energy kept"
FEW = 12  # lines whose names the notes below the table repeat; of longer tables they give the numbers


@dataclass(frozen=True)
class Shown:
    """A cell with what it is sorted by, None for what has no value."""

    cell: Cell
    key: float | str | None


@dataclass(frozen=True)
class Grid:
    headers: tuple[str, ...]
    lines: tuple[tuple[Line, tuple[Shown, ...]], ...]  # the method itself is not among the cells


@dataclass(frozen=True)
class Run:
    """One row of results in the list of runs."""

    row: Row
    number: int  # of its line in the table
    label: str


def grid(summary: Summary) -> Grid:
    """The terminal's columns, and behind them what a wide page has room for: kind, granularity, all MACs, all time."""
    _, *every = _widened(columns(summary), summary)
    shown = [[_shown(column.header, cell) for cell in column.cells] for column in every]
    lines = ((line, tuple(column[index] for column in shown)) for index, line in enumerate(summary.lines))
    return Grid(tuple(column.header for column in every), tuple(lines))


def _widened(every: Sequence[Column], summary: Summary) -> list[Column]:
    headers = [column.header for column in every]
    found = list(every)
    if "router" in headers:
        found.insert(headers.index("router") + 1, _facts("granularity", summary, lambda row: row.granularity))
    found.insert(1, Column("kind", tuple(Cell(line.kind) for line in summary.lines)))
    place = [column.header for column in found].index("MB") + 1
    found.insert(place, _mean("MMACs", summary, lambda row: row.macs / 1e6, 1))
    for header, tell in ((ENERGY, lambda line: line.energy), (RIGHT, lambda line: line.routed_right)):
        if any(tell(line) for line in summary.lines):
            found.insert(headers.index("norm") + 2, _shares(header, summary, tell))
    return [*found, _mean("total s", summary, lambda row: sum(row.seconds.values()), 1)]


def _shares(header: str, summary: Summary, tell: Callable[[Line], Value | None]) -> Column:
    values = [None if line.failed else tell(line) for line in summary.lines]
    deviations = [
        "" if value is None or value.deviation is None else f"±{100 * value.deviation:.1f}" for value in values
    ]
    texts = ["-" if value is None else f"{100 * value.mean:.1f}" for value in values]
    return Column(header, tuple(map(Cell, texts, deviations)))


def _facts(header: str, summary: Summary, tell: Callable[[Row], str]) -> Column:
    return Column(header, tuple(Cell("-" if line.failed else tell(line.rows[0])) for line in summary.lines))


def _mean(header: str, summary: Summary, number: Callable[[Row], float], digits: int) -> Column:
    values = (None if line.failed else statistics.fmean(map(number, line.rows)) for line in summary.lines)
    return Column(header, tuple(Cell() if value is None else Cell(f"{value:.{digits}f}") for value in values))


def _shown(header: str, cell: Cell) -> Shown:
    if header in WORDS:
        return Shown(cell, None if cell.text == "-" else cell.text)
    number = re.match(r"x?(-?\d+(\.\d+)?(e-?\d+)?)", cell.text)
    return Shown(cell, float(number[1]) if number else None)


def remarks(summary: Summary) -> list[str]:
    """The notes of the terminal's table; below a long table with the numbers of lines in place of their names."""
    if len(summary.lines) <= FEW:
        return notes(summary)
    numbered = [replace(line, label=f"#{number}") for number, line in enumerate(summary.lines, 1)]
    said = (note for note in notes(replace(summary, lines=tuple(numbered))) if not note.startswith("Routed right"))
    return [re.sub(r"#\d+(, #\d+)*", lambda found: _ranges(found[0]), note) for note in said]


def _ranges(listed: str) -> str:
    """ "#1, #2, #3, #5" is "lines 1-3, 5"."""
    numbers = [int(each) for each in re.findall(r"\d+", listed)]
    runs = [[numbers[0], numbers[0]]]
    for number in numbers[1:]:
        if number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    told = ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
    return f"{'line' if len(numbers) == 1 else 'lines'} {told}"


def warnings(summary: Summary) -> list[str]:
    """What makes lines of one table doubtful to compare, or worth a second look."""
    rows = [row for line in summary.lines for row in line.rows]
    said = []
    for what, values in (("code versions", {row.code for row in rows}), ("families", {row.family for row in rows})):
        if len(values) > 1:
            listed = ", ".join(sorted(values)[:8]) + (", ..." if len(values) > 8 else "")
            said.append(f"Rows of this table come from {len(values)} {what}: {listed}. Differences between lines "
                        "need not be the methods'.")  # fmt: skip
    mixed = [task for task in summary.tasks if len({str(row.splits[task]) for row in rows if task in row.splits}) > 1]
    if mixed:
        said.append(f"Rows were scored on different splits of {', '.join(mixed)}.")
    failed = [line.label for line in summary.lines if line.failed]
    if failed:
        said.append(f"{len(failed)} of {len(summary.lines)} lines failed: {', '.join(failed)}. Their errors are below.")
    collapsed = [line.label for line in summary.lines if any(row.collapsed for row in line.rows)]
    if collapsed:
        said.append(f"Gates are suspected of collapse in {', '.join(collapsed)}; the notes name the tasks.")
    return said


def runs(summary: Summary) -> list[Run]:
    """All rows behind the table, in its order."""
    return [Run(row, number, line.label) for number, line in enumerate(summary.lines, 1) for row in line.rows]


def checkpoints(summary: Summary) -> list[tuple[str, int, dict[str, str]]]:
    """The sets of checkpoints: family, number of rows, and name -> content id."""
    found: dict[str, tuple[str, int, dict[str, str]]] = {}
    for run in runs(summary):
        key = f"{run.row.family}{sorted(run.row.checkpoints.items())}"
        _, count, _ = found.get(key, ("", 0, {}))
        found[key] = (run.row.family, count + 1, run.row.checkpoints)
    return list(found.values())


def splits(summary: Summary) -> list[tuple[str, str, str, str]]:
    """Every split that a row was scored on: task, name, images, fingerprint."""
    seen = {
        (task, str(split.get("name", "-")), str(split.get("size", "-")), str(split.get("id", "-")))
        for run in runs(summary) for task, split in run.row.splits.items()
    }  # fmt: skip
    return sorted(seen, key=lambda each: (summary.tasks.index(each[0]) if each[0] in summary.tasks else 99, each))
