"""A sweep that runs elsewhere, as it runs: `python -m launchers.live [folder] [--once]`."""

import argparse
import contextlib
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from launchers.live.page import page
from launchers.live.sources import source_of
from launchers.live.watch import EVERY, Watcher
from launchers.results.frame import RESULTS, summarise
from launchers.results.writers import WIDTH


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line. Ends with Ctrl-C, or when all cells of a sweep are done; leaves the last view on the page."""
    parser = argparse.ArgumentParser("python -m launchers.live", description="Watch a sweep that runs elsewhere.")
    parser.add_argument("folder", nargs="?", default=RESULTS, type=Path,
                        help=f"a results folder, or the folder of a sweep under outputs/runs ({RESULTS})")  # fmt: skip
    parser.add_argument("--once", action="store_true", help="print the view once")
    options = parser.parse_args(arguments)
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    if not options.folder.is_dir():
        sys.exit(f"error: There is no folder {options.folder}. Name a results folder, or a sweep's under outputs/runs.")
    source = source_of(options.folder)
    if not options.once:
        watcher = Watcher(source)
        with contextlib.suppress(KeyboardInterrupt):
            while not watcher.wait(EVERY):
                pass
        watcher.stop()
    view, console = source.look(), Console(width=None if sys.stdout.isatty() else WIDTH)
    console.print(page(view, summarise(view.rows), console.width, 10_000))


if __name__ == "__main__":
    main()
