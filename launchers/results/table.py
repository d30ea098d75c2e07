"""Rows as a table: `python -m launchers.table [paths...] --format terminal|markdown|latex|csv --against published`."""

import argparse
import logging
import math
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console

from launchers.results.frame import REFERENCES, RESULTS, Summary, rows_of, summarise
from launchers.results.notes import notes
from launchers.results.writers import FORMATS, WIDTH, Cell, Column, Sheet, comma_separated, show
from launchers.rows import Row
from merging.errors import UserError

if TYPE_CHECKING:
    from pandas import DataFrame

COMPETE = ("static", "routed")  # kinds of lines whose best is bold; what is not fair takes no part
FIRST = ("suite", "label", "status", "n")  # columns of CSV
INSIDE = ("method", "kind", "rows", "transductive", "by_batch", "fair", "work", "seconds", "unseen", "unseen sd")
Tell = Callable[[Any], str]  # of a line


def sheets(rows: Iterable[Row]) -> list[Sheet]:
    """Every suite of `rows` as a formatted table with its notes."""
    return [sheet(summary) for summary in summarise(rows)]


def sheet(summary: Summary) -> Sheet:
    """The lines of one suite; references are grey."""
    dim = (place for place, kind in enumerate(summary.lines["kind"]) if kind in REFERENCES)
    return Sheet(summary.title, columns(summary), tuple(notes(summary)), frozenset(dim), frozenset(summary.breaks))


def columns(summary: Summary, wide: bool = False) -> tuple[Column, ...]:
    """The printed columns, scores in percent, the best of each kind in COMPETE in bold.

    `wide` adds what a page has room for: kind, routing accuracy, energy, granularity, all work and all time.
    """
    lines = summary.lines
    means = ["mean", "norm", *["unseen"] * bool(summary.unseen)]
    named = {task: "" if metric == "accuracy" else f" ({metric})" for task, metric in summary.metrics.items()}
    scores = {f"{task}{named.get(task, '')}": f"task {task}" for task in summary.tasks}
    scores |= {f"{task} unseen": f"unseen {task}" for task in summary.unseen} | {name: name for name in means}
    extra = {"routing accuracy": "routing_accuracy", "energy kept": "energy"} if wide else {}
    known = {header: name for header, name in extra.items() if lines[name].notna().any()}
    return (
        _plain("method", lines, lambda line: line.label),
        *([_plain("kind", lines, lambda line: line.kind)] if wide else []),
        *([_plain("n", lines, lambda line: str(line.n))] if (lines["n"] > 1).any() else []),
        *(_percents(header, name, lines, is_mean=name in means) for header, name in scores.items()),
        *(_percents(header, name, lines, best=False) for header, name in known.items()),
        *(_plain(header, lines, tell, True) for header, tell in _facts(summary, wide)),
    )


def _facts(summary: Summary, wide: bool) -> list[tuple[str, Tell]]:
    """The columns behind the scores; those of dynamic merges only where there is one."""
    scored = summary.scored
    merged = scored[~scored["kind"].isin(REFERENCES)]
    routed = bool((merged["router"] != "none").any())
    shown: list[tuple[bool, str, Tell]] = [
        (True, "scale", _scale),
        (True, "needs", lambda line: line.needs),
        (routed, "router", _unless_failed("router")),
        (routed and wide, "granularity", _unless_failed("granularity")),
        (not merged["adaptation"].isin(["none", "calibration"]).all(), "adapt", _unless_failed("adaptation")),
        (True, "MB", lambda line: _number(line, line.stored_bytes / 1e6, ".1f")),
        (wide, "MMACs", lambda line: _number(line, line.macs / 1e6, ".1f")),
        (bool((summary.lines["work"].dropna() != 1).any()), "MACs", lambda line: _number(line, line.work, ".2f", "x")),
        (True, "merge s", lambda line: _number(line, line.merge_seconds, ".2f")),
        (bool(merged["router_seconds"].notna().any()), "router s",
         lambda line: _number(line, line.router_seconds, ".2f")),
        (wide, "total s", lambda line: _number(line, line.seconds, ".1f")),
    ]  # fmt: skip
    return [(header, tell) for is_shown, header, tell in shown if is_shown]


def _unless_failed(name: str) -> Tell:
    return lambda line: "-" if line.kind == "failed" else getattr(line, name)


def _number(line: Any, value: float | None, digits: str, unit: str = "") -> str:
    known = line.kind != "failed" and value is not None and not math.isnan(value)
    return f"{unit}{value:{digits}}" if known else "-"


def _scale(line: Any) -> str:
    scales = sorted({row.scale for row in line.rows if row.scale is not None and row.status == "ok"})
    return "-" if not scales else "..".join(f"{scale:.3g}" for scale in dict.fromkeys((scales[0], scales[-1])))


def _plain(header: str, lines: "DataFrame", tell: Tell, is_fact: bool = False) -> Column:
    cells = tuple(Cell(tell(line)) for line in lines.itertuples())
    return Column(header, cells, is_fact=is_fact, is_text=not any(cell.text[:1].isdigit() for cell in cells))


def _percents(header: str, name: str, lines: "DataFrame", is_mean: bool = False, best: bool = True) -> Column:
    texts = lines[name].map(lambda value: "-" if math.isnan(value) else f"{value:.1f}")
    signs = lines[f"{name} sd"].map(lambda value: "" if math.isnan(value) else f"±{value:.1f}")
    bold = {number for kind in COMPETE if best for number in _best(texts[(lines["kind"] == kind) & lines["fair"]])}
    if header == "mean":
        texts = texts.mask(lines["kind"] == "failed", "failed")
    cells = (Cell(texts[number], signs[number], number in bold) for number in lines.index)
    return Column(header, tuple(cells), is_mean)


def _best(texts: Any) -> list[int]:
    """The lines that print the highest number; none where a line has no rival."""
    numbers = texts[texts != "-"].astype(float)
    return list(numbers.index[numbers == numbers.max()]) if len(texts) > 1 else []


def records(rows: Iterable[Row]) -> "DataFrame":
    """The lines of all tables as one frame of numbers and text: what CSV and the experiment tracker get."""
    from pandas import DataFrame, concat

    return concat([DataFrame(), *map(_record, summarise(rows))], ignore_index=True)


def _record(summary: Summary) -> "DataFrame":
    lines = summary.lines
    tasks = [
        *(f"task {task}" for task in summary.tasks),
        "mean",
        "norm",
        *(f"unseen {task}" for task in summary.unseen),
    ]
    scores = [name for quantity in tasks for name in (quantity, f"{quantity} sd")]
    normalised = {f"norm {task}{more}" for task in summary.tasks for more in ("", " sd")}  # their mean is shown
    facts = [name for name in lines if name not in {*INSIDE, *FIRST, *scores, *normalised}]
    frame = lines[[*FIRST, *scores, *facts]]
    return frame.rename(columns=lambda name: "method" if name == "label" else name.removeprefix("task "))


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line. Exits 1 with one paragraph when there is nothing to print."""
    from launchers.results import against

    parser = argparse.ArgumentParser("python -m launchers.table", description="Print result rows as a table.")
    parser.add_argument("paths", nargs="*", default=[RESULTS], help=f"row files or folders of them ({RESULTS})")
    parser.add_argument("--format", choices=[*FORMATS, "csv"], default="terminal", help="what to print (terminal)")
    parser.add_argument("--against", choices=["published"], help="put published numbers beside the measured ones")
    chosen = parser.parse_args(arguments)
    logging.basicConfig(format="%(levelname)s: %(message)s")
    try:
        rows = rows_of(chosen.paths)
    except UserError as error:
        sys.exit(f"error: {error}")
    if chosen.format == "csv":
        sys.stdout.write(comma_separated(against.records(rows) if chosen.against else records(rows)))
        return
    made = against.sheets(rows) if chosen.against else sheets(rows)
    if chosen.format == "terminal":
        show(made, Console(width=None if sys.stdout.isatty() else WIDTH))
    else:
        sys.stdout.write(FORMATS[chosen.format](made))
