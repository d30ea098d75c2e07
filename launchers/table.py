"""Rows as a table: `python -m launchers.table [paths...] --format terminal|markdown|latex|csv --against published`."""

import sys
from collections.abc import Sequence

from rich.console import Console

from launchers.results import against, table
from launchers.results.command import one_paragraph, parser_of
from launchers.results.frame import rows_of
from launchers.results.writers import FORMATS, WIDTH, comma_separated, frame_of, show


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line. Exits 1 with one paragraph when there is nothing to print."""
    parser = parser_of("table", "Print result rows as a table.")
    parser.add_argument("--format", choices=[*FORMATS, "csv"], default="terminal", help="what to print (terminal)")
    parser.add_argument("--against", choices=["published"], help="put published numbers beside the measured ones")
    parser.add_argument("--sort", choices=["needs"], help="within a kind by what methods need: nothing, inputs, labels")
    chosen = parser.parse_args(arguments)
    with one_paragraph():
        rows = rows_of(chosen.paths)
    sheets = against.sheets(rows) if chosen.against else table.sheets(rows, chosen.sort == "needs")
    if chosen.format == "csv":
        sys.stdout.write(comma_separated(frame_of(sheets) if chosen.against else table.records(rows)))
    elif chosen.format == "terminal":
        show(sheets, Console(width=None if sys.stdout.isatty() else WIDTH))
    else:
        sys.stdout.write(FORMATS[chosen.format](sheets))


if __name__ == "__main__":
    main()
