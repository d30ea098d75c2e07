"""The printed columns of a table, whatever the format: text, deviations, and what is bold."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from launchers.rows import Row
from launchers.summary import Line, Summary, Value


@dataclass(frozen=True)
class Cell:
    """A printed value, the deviation that belongs to it, and whether it is the best of its column."""

    text: str = "-"
    deviation: str = ""
    bold: bool = False


@dataclass(frozen=True)
class Column:
    header: str
    cells: tuple[Cell, ...]


def columns(summary: Summary) -> list[Column]:
    """The printed columns of a suite, accuracies in percent, the best static method of each in bold."""
    lines = summary.lines
    scores: list[tuple[str, Callable[[Line], Value | None]]] = [
        *((task, lambda line, task=task: line.accuracy.get(task)) for task in summary.tasks),
        ("mean", lambda line: line.mean),
        ("norm", lambda line: line.norm),
    ]
    facts: list[tuple[str, Callable[[Line], str]]] = [("scale", _scale), ("needs", lambda line: line.rows[0].needs)]
    if any(line.rows[0].router != "none" for line in lines if line.rows[0].method not in ("base", "expert")):
        facts.append(("router", lambda line: line.rows[0].router))
    facts.append(("MB", lambda line: _mean(line, lambda row: row.stored_bytes / 1e6, 1)))
    facts.append(("merge s", lambda line: _mean(line, lambda row: row.seconds.get("merge"), 2)))
    seeds = [("n", lambda line: str(len(line.rows)))] if any(len(line.rows) > 1 for line in lines) else []
    return [
        *(_plain(header, lines, tell) for header, tell in [("method", lambda line: line.label), *seeds]),
        *(_percents(header, lines, value) for header, value in scores),
        *(_plain(header, lines, tell) for header, tell in facts),
    ]


def _plain(header: str, lines: Sequence[Line], tell: Callable[[Line], str]) -> Column:
    return Column(header, tuple(Cell(tell(line)) for line in lines))


def _percents(header: str, lines: Sequence[Line], value: Callable[[Line], Value | None]) -> Column:
    cells = [_percent(value(line)) for line in lines]
    if header == "mean":
        cells = [Cell("failed") if line.failed else cell for line, cell in zip(lines, cells, strict=True)]
    rivals = [float(cell.text) for line, cell in zip(lines, cells, strict=True) if line.static and cell.text != "-"]
    if len(rivals) > 1:
        best = f"{max(rivals):.1f}"
        cells = [replace(cell, bold=line.static and cell.text == best) for line, cell in zip(lines, cells, strict=True)]
    return Column(header, tuple(cells))


def _percent(value: Value | None) -> Cell:
    if value is None:
        return Cell()
    return Cell(f"{100 * value.mean:.1f}", "" if value.deviation is None else f"±{100 * value.deviation:.1f}")


def _scale(line: Line) -> str:
    scales = sorted({row.scale for row in line.rows if row.scale is not None and not line.failed})
    return "-" if not scales else "..".join(f"{scale:.3g}" for scale in dict.fromkeys((scales[0], scales[-1])))


def _mean(line: Line, number: Callable[[Row], float | None], digits: int) -> str:
    known = [value for row in line.rows if not line.failed and (value := number(row)) is not None]
    return f"{sum(known) / len(known):.{digits}f}" if known else "-"
