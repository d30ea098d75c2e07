"""Accuracy against bytes: the two numbers of a run that a search is told, and `python -m launchers.pareto [paths]`."""

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from launchers import rows
from launchers.results.frame import RESULTS, Summary, rows_of, summarise
from merging.errors import UserError

if TYPE_CHECKING:  # every run has its two numbers, a figure alone needs matplotlib
    from pandas import DataFrame

FAIR = ("static", "routed")  # kinds of lines that may be on the front


class Point(NamedTuple):
    """A merge as a search sees it: normalised accuracy (plain without experts), to be high; bytes, to be low."""

    accuracy: float
    stored_bytes: float


def objectives(files: Sequence[str | Path]) -> Point | None:
    """Those of the first row file, whose references are among the others; None where it is missing or failed."""
    listed = rows.read([file for file in files if Path(file).exists()])
    own = Path(files[0]).stem if files else ""
    for summary in summarise(listed):
        for line in summary.scored.itertuples():
            if line.run_ids == own:
                return Point((line.mean if math.isnan(line.norm) else line.norm) / 100, float(line.stored_bytes))
    return None


def level(summary: Summary) -> str:
    """The score that lines are compared by: "norm" where every line has one, else "mean"."""
    return "norm" if summary.scored["norm"].notna().all() else "mean"


def front_of(summary: Summary, kinds: Sequence[str] = FAIR) -> "DataFrame":
    """The fair lines of these kinds that no other beats in both, by rising bytes; of equal lines the first."""
    lines, measure = summary.scored, level(summary)
    rivals = lines[lines["kind"].isin(kinds) & lines["fair"] & (lines["stored_bytes"] > 0) & lines[measure].notna()]
    return pareto(rivals, "stored_bytes", measure)


def pareto(frame: "DataFrame", cost: str, gain: str) -> "DataFrame":
    """The records of rising cost whose gain exceeds that of everything cheaper."""
    ordered = frame.sort_values([cost, gain], ascending=[True, False], kind="stable")
    return ordered[ordered[gain] > ordered[gain].cummax().shift(fill_value=-math.inf)]


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line. Exits 1 with one paragraph when there is nothing to draw."""
    from launchers.results.curves import bytes_figure
    from launchers.results.report import write_figure

    parser = argparse.ArgumentParser("python -m launchers.pareto", description="Draw accuracy against stored bytes.")
    parser.add_argument("paths", nargs="*", default=[RESULTS], help=f"row files or folders of them ({RESULTS})")
    parser.add_argument("--file", default="pareto.png", help="the picture, of several suites one each (pareto.png)")
    chosen = parser.parse_args(arguments)
    try:
        summaries = summarise(rows_of(chosen.paths))
        drawn = [(summary, figure) for summary in summaries if (figure := bytes_figure(summary)) is not None]
        if not drawn:
            raise UserError(f"There is nothing to draw in {chosen.file}: no two finished merges. Run a method first.")
        for place, (summary, figure) in enumerate(drawn):
            path = Path(chosen.file)
            path = path.with_stem(f"{path.stem}-{place + 1}") if place else path
            print(write_figure(figure, path, dpi=200))
            for line in front_of(summary).itertuples():
                score = getattr(line, level(summary))
                print(f"{summary.suite}  {score:5.1f} %  {line.stored_bytes / 1e6:8.1f} MB  {line.label}")
    except UserError as error:
        sys.exit(f"error: {error}")
