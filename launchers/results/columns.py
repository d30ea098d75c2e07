"""The printed columns of a table, whatever the format: text, deviations, and what is bold."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from launchers.results.frame import REFERENCES, Line, Summary, Value
from launchers.rows import Row

UNSEEN = "unseen"  # tasks whose experts were left out
COMPETE = ("static", "routed")  # kinds of lines whose best is bold; what is not fair takes no part


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
    """The printed columns of a suite, accuracies in percent, the best of each kind in COMPETE in bold."""
    lines = summary.lines
    scores: list[tuple[str, Callable[[Line], Value | None]]] = [
        *((task, lambda line, task=task: line.accuracy.get(task)) for task in summary.tasks),
        *((f"{task} {UNSEEN}", lambda line, task=task: line.unseen.get(task)) for task in summary.unseen),
        ("mean", lambda line: line.mean),
        ("norm", lambda line: line.norm),
    ]
    if summary.unseen:
        scores.append((UNSEEN, lambda line: line.unseen_mean))
    seeds = [("n", lambda line: str(len(line.rows)))] if any(len(line.rows) > 1 for line in lines) else []
    return [
        *(_plain(header, lines, tell) for header, tell in [("method", lambda line: line.label), *seeds]),
        *(_percents(header, lines, value) for header, value in scores),
        *(_plain(header, lines, tell) for header, tell in _facts(lines)),
    ]


def _facts(lines: Sequence[Line]) -> list[tuple[str, Callable[[Line], str]]]:
    """The columns behind the scores; those of dynamic merges only where there is one."""
    merged = [row for line in lines if line.kind not in (*REFERENCES, "failed") for row in line.rows]
    ratios = {row.run_id: ratio for line in lines for row in line.rows if (ratio := _work(row, lines)) is not None}
    facts: list[tuple[str, Callable[[Line], str]]] = [("scale", _scale), ("needs", lambda line: line.rows[0].needs)]
    if any(row.router != "none" for row in merged):
        facts.append(("router", lambda line: "-" if line.failed else line.rows[0].router))
    if any(row.adaptation not in ("none", "calibration") for row in merged):
        facts.append(("adapt", lambda line: "-" if line.failed else line.rows[0].adaptation))
    facts.append(("MB", lambda line: _mean(line, lambda row: row.stored_bytes / 1e6, 1)))
    if any(ratio != 1 for ratio in ratios.values()):
        facts.append(("MACs", lambda line: _mean(line, lambda row: ratios.get(row.run_id), 2, "x")))
    facts.append(("merge s", lambda line: _mean(line, lambda row: row.seconds.get("merge"), 2)))
    if any("router" in row.seconds for row in merged):
        facts.append(("router s", lambda line: _mean(line, lambda row: row.seconds.get("router"), 2)))
    return facts


def _work(row: Row, lines: Sequence[Line]) -> float | None:
    """MACs relative to the static forward of the same backbone, None where no line of the table is static."""
    backbone = row.config.get("backbone")
    others = (other for line in lines for other in line.rows if other.config.get("backbone") == backbone)
    static = min((other.macs for other in others if other.router in ("none", "oracle")), default=0)
    return row.macs / static if static else None


def _plain(header: str, lines: Sequence[Line], tell: Callable[[Line], str]) -> Column:
    return Column(header, tuple(Cell(tell(line)) for line in lines))


def _percents(header: str, lines: Sequence[Line], value: Callable[[Line], Value | None]) -> Column:
    cells = [_percent(value(line)) for line in lines]
    if header == "mean":
        cells = [Cell("failed") if line.failed else cell for line, cell in zip(lines, cells, strict=True)]
    for kind in COMPETE:
        rivals = [index for index, line in enumerate(lines) if line.kind == kind and line.fair]
        best = max((float(cells[index].text) for index in rivals if cells[index].text != "-"), default=None)
        for index in rivals if len(rivals) > 1 and best is not None else []:
            cells[index] = replace(cells[index], bold=cells[index].text == f"{best:.1f}")
    return Column(header, tuple(cells))


def _percent(value: Value | None) -> Cell:
    if value is None:
        return Cell()
    return Cell(f"{100 * value.mean:.1f}", "" if value.deviation is None else f"±{100 * value.deviation:.1f}")


def _scale(line: Line) -> str:
    scales = sorted({row.scale for row in line.rows if row.scale is not None and not line.failed})
    return "-" if not scales else "..".join(f"{scale:.3g}" for scale in dict.fromkeys((scales[0], scales[-1])))


def _mean(line: Line, number: Callable[[Row], float | None], digits: int, unit: str = "") -> str:
    known = [value for row in line.rows if not line.failed and (value := number(row)) is not None]
    return f"{unit}{sum(known) / len(known):.{digits}f}" if known else "-"
