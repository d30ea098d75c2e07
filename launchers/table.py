"""Rows as a table: `python -m launchers.table [paths...] --format terminal|markdown|latex|csv`."""

import argparse
import io
import logging
import re
import sys
from collections.abc import Iterable, Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from launchers.columns import Cell, Column, columns
from launchers.export import comma_separated, latex, markdown
from launchers.notes import notes
from launchers.rows import Row, read
from launchers.summary import Summary, summarise
from merging.errors import UserError

RESULTS = "outputs/results"
WIDTH = 120  # of a table that does not go to a terminal


def show(rows: Iterable[Row], console: Console) -> None:
    """Print every suite of `rows`; columns that do not fit side by side follow below, none is dropped."""
    for summary in summarise(rows):
        family = ", ".join(sorted({line.rows[0].family for line in summary.lines}))
        title = summary.suite if family in ("", summary.suite) else f"{summary.suite} ({family})"
        console.print(Text(f"\n{title}\n", "bold"))
        for block in _blocks(columns(summary), console):
            console.print(_rich(block, summary))
            console.print()
        for note in notes(summary):
            console.print(Text(note, "dim"))


def _blocks(every: Sequence[Column], console: Console) -> list[list[Column]]:
    """Columns cut into runs that fit the console, each starting with the method; if one is too few, the facts that
    follow the scores start another, beside the mean scores."""
    method, *rest = every
    if _fits(every, console):
        return [[*every]]
    facts = next(index for index, column in enumerate(rest) if column.header == "scale")
    means = [column for column in rest if column.header in ("mean", "norm")]
    return [*_cut(method, rest[:facts], console), *_cut(method, [*means, *rest[facts:]], console)]


def _cut(method: Column, rest: Sequence[Column], console: Console) -> list[list[Column]]:
    blocks = [[method]]
    for column in rest:
        wider = [*blocks[-1], column]
        if len(wider) > 2 and not _fits(wider, console):
            blocks.append([method, column])
        else:
            blocks[-1] = wider
    return blocks


def _fits(block: Sequence[Column], console: Console) -> bool:
    return console.measure(_rich(block), options=console.options.update(width=10_000)).maximum <= console.width


def _rich(block: Sequence[Column], summary: Summary | None = None) -> Table:
    table = Table(box=SIMPLE_HEAD, padding=0, pad_edge=False, show_edge=False, header_style="bold cyan")
    for column in block:
        if column.header == "method":
            table.add_column(column.header, max_width=30, overflow="fold")
        else:
            wide = 7 if column.header in ("mean", "scale") else None  # air in front of each group of columns
            table.add_column(_narrow(column.header), justify="right", no_wrap=True, overflow="fold", min_width=wide)
    for index in range(len(block[0].cells)):
        reference = summary is not None and summary.lines[index].kind in ("base", "expert")
        table.add_row(
            *(_text(column.cells[index]) for column in block),
            style="dim" if reference else None,
            end_section=summary is not None and index in summary.breaks,
        )
    return table


def _narrow(header: str) -> str:
    """A long task name on several lines, cut where it has a joint."""
    return re.sub(r"[-_ ]", "\n", header) if len(header) > 8 else header


def _text(cell: Cell) -> Text:
    style = "bold green" if cell.bold else "red" if cell.text == "failed" else ""
    return Text.assemble((cell.text, style), ("\n" + cell.deviation if cell.deviation else "", "dim"))


def terminal(rows: Iterable[Row], width: int = WIDTH) -> str:
    """The terminal table as plain text of at most `width` columns."""
    page = io.StringIO()
    show(rows, Console(file=page, width=width, color_system=None))
    return page.getvalue()


FORMATS = {"terminal": terminal, "markdown": markdown, "latex": latex, "csv": comma_separated}


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line. Exits 1 with one paragraph when there is nothing to print."""
    parser = argparse.ArgumentParser("python -m launchers.table", description="Print result rows as a table.")
    parser.add_argument("paths", nargs="*", default=[RESULTS], help=f"row files or folders of them ({RESULTS})")
    parser.add_argument("--format", choices=FORMATS, default="terminal", help="what to print (terminal)")
    chosen = parser.parse_args(arguments)
    logging.basicConfig(format="%(levelname)s: %(message)s")
    try:
        rows = rows_of(chosen.paths)
    except UserError as error:
        sys.exit(f"error: {error}")
    if chosen.format == "terminal":
        show(rows, Console(width=None if sys.stdout.isatty() else WIDTH))
    else:
        sys.stdout.write(FORMATS[chosen.format](rows))


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
