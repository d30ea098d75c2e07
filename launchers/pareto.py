"""Scores against bytes: the two numbers of a run that a search is told, and `python -m launchers.pareto [paths]`."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from launchers import rows
from launchers.results.command import one_paragraph, parser_of
from launchers.results.frame import rows_of, summarise
from merging.errors import UserError


class Point(NamedTuple):
    """A merge as a search sees it: normalised score (plain without experts), to be high; bytes, to be low."""

    score: float
    stored_bytes: float


def objectives(files: Sequence[str | Path]) -> Point | None:
    """Those of the first row file, whose references are among the others; None where it is missing or failed."""
    listed = rows.read([file for file in files if Path(file).exists()])
    run_id = Path(files[0]).stem if files else ""
    for summary in summarise(listed):
        for line in summary.scored.itertuples():
            if line.run_ids == run_id:
                return Point((line.mean if math.isnan(line.norm) else line.norm) / 100, float(line.stored_bytes))
    return None


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line. Exits 1 with one paragraph when there is nothing to draw."""
    from launchers.results.curves import front_figure

    parser = parser_of("pareto", "Draw scores against stored bytes.")
    parser.add_argument("--file", default="pareto.png", help="the picture, of several suites one each (pareto.png)")
    chosen = parser.parse_args(arguments)
    path = Path(chosen.file)
    with one_paragraph():
        summaries = summarise(rows_of(chosen.paths))
        drawn = [(summary, figure) for summary in summaries if (figure := front_figure(summary)) is not None]
        if not drawn:
            raise UserError(f"There is nothing to draw in {chosen.file}: no two finished merges. Run a method first.")
        for number, (summary, figure) in enumerate(drawn, 1):
            print(figure.write(path if number == 1 else path.with_stem(f"{path.stem}-{number}"), dpi=200))
            for line in summary.front().itertuples():
                score = getattr(line, summary.merges_level)
                print(f"{summary.suite}  {score:5.1f} %  {line.stored_bytes / 1e6:8.1f} MB  {line.label}")


if __name__ == "__main__":
    main()
