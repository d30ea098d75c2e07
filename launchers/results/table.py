"""Rows as a table: `python -m launchers.table [paths...] --format terminal|markdown|latex|csv --against published`."""

import argparse
import io
import logging
import sys
from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.text import Text

from launchers.results import against_table
from launchers.results.columns import UNSEEN, Column, columns
from launchers.results.draw import cut, draw, fits
from launchers.results.export import comma_separated, latex, markdown
from launchers.results.frame import REFERENCES, summarise
from launchers.results.notes import notes
from launchers.rows import Row, read
from merging.errors import UserError

RESULTS = "outputs/results"
WIDTH = 120  # of a table that does not go to a terminal


def show(rows: Iterable[Row], console: Console) -> None:
    """Print every suite of `rows`; columns that do not fit side by side follow below, none is dropped."""
    for summary in summarise(rows):
        family = ", ".join(sorted({line.rows[0].family for line in summary.lines}))
        title = summary.suite if family in ("", summary.suite) else f"{summary.suite} ({family})"
        console.print(Text(f"\n{title}\n", "bold"))
        references = [index for index, line in enumerate(summary.lines) if line.kind in REFERENCES]
        for block in _blocks(columns(summary), console):
            console.print(draw(block, references, summary.breaks))
            console.print()
        for note in notes(summary):
            console.print(Text(note, "dim"))


def _blocks(every: Sequence[Column], console: Console) -> list[list[Column]]:
    """Columns cut into runs that fit the console, each starting with the method; if one is too few, the facts that
    follow the scores start another, beside the mean scores."""
    method, *rest = every
    if fits(every, console):
        return [[*every]]
    facts = next(index for index, column in enumerate(rest) if column.header == "scale")
    means = [column for column in rest if column.header in ("mean", "norm", UNSEEN)]
    return [*cut(method, rest[:facts], console), *cut(method, [*means, *rest[facts:]], console)]


def terminal(rows: Iterable[Row], width: int = WIDTH) -> str:
    """The terminal table as plain text of at most `width` columns."""
    page = io.StringIO()
    show(rows, Console(file=page, width=width, color_system=None))
    return page.getvalue()


FORMATS = {"terminal": terminal, "markdown": markdown, "latex": latex, "csv": comma_separated}
AGAINST = ("published",)  # what rows may be put beside


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line. Exits 1 with one paragraph when there is nothing to print."""
    parser = argparse.ArgumentParser("python -m launchers.table", description="Print result rows as a table.")
    parser.add_argument("paths", nargs="*", default=[RESULTS], help=f"row files or folders of them ({RESULTS})")
    parser.add_argument("--format", choices=FORMATS, default="terminal", help="what to print (terminal)")
    parser.add_argument("--against", choices=AGAINST, help="put published numbers beside the measured ones")
    chosen = parser.parse_args(arguments)
    logging.basicConfig(format="%(levelname)s: %(message)s")
    try:
        rows = rows_of(chosen.paths)
    except UserError as error:
        sys.exit(f"error: {error}")
    printed, formats = (show, FORMATS) if chosen.against is None else (against_table.show, against_table.FORMATS)
    if chosen.format == "terminal":
        printed(rows, Console(width=None if sys.stdout.isatty() else WIDTH))
    else:
        sys.stdout.write(formats[chosen.format](rows))


def rows_of(paths: Sequence[str]) -> list[Row]:
    """All rows under `paths`; raises UserError when there is not one."""
    rows = read(paths)
    if not rows:
        raise UserError(
            f"No result rows in {', '.join(map(str, paths))}. A run writes them: try `duet method=ties suite=mini8`, "
            "or name the folder that holds your rows."
        )
    return rows


if __name__ == "__main__":
    main()
