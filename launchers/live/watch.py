"""A sweep as it runs: a view on a terminal, log lines elsewhere; `python -m launchers.live [folder] [--once]`."""

import argparse
import atexit
import logging
import os
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from omegaconf import DictConfig
from rich.console import Console, RenderableType

from launchers.live.jobs import Jobs, View, clock_of
from launchers.live.page import SHARE, page, status
from launchers.live.plan import plan_of, planned
from launchers.live.results import Results
from launchers.live.terminal import Terminal
from launchers.results.frame import Summary, summarise
from launchers.results.table import RESULTS, WIDTH
from launchers.rows import Row

log = logging.getLogger(__name__)
EVERY = 1.0  # seconds from look to look,
RARELY = 20  # or this many times the processor time of a look
PATIENCE = 5.0  # seconds that the end of a sweep waits for the last look


class Source(Protocol):
    """What can be looked at."""

    def look(self) -> View: ...


class Teller(Protocol):
    """Who is told what was seen."""

    def tell(self, view: View) -> None: ...
    def close(self) -> None: ...


class Lines:
    """A log line whenever more cells are done."""

    def __init__(self) -> None:
        self._over = 0

    def tell(self, view: View) -> None:
        if view.over != self._over:
            log.info("%s", status(view))
        self._over = view.over

    def close(self) -> None:
        pass


class Screen:
    """The view on a terminal."""

    def __init__(self) -> None:
        self._terminal, self._tables = Terminal(), Tables()
        self._terminal.open()

    def tell(self, view: View) -> None:
        width, height = self._terminal.console.size
        self._terminal.show(page(view, self._tables.of(view.rows), width - 1, int(SHARE * height)))

    def close(self) -> None:
        self._terminal.close()


class Tables:
    """The summaries of rows, computed again where rows are new."""

    def __init__(self) -> None:
        self._rows: tuple[Row, ...] = ()
        self._summaries: list[Summary] = []

    def of(self, rows: tuple[Row, ...]) -> list[Summary]:
        if [*map(id, rows)] != [*map(id, self._rows)]:
            self._rows, self._summaries = rows, summarise(rows)
        return self._summaries


class Watcher:
    """Looks from a thread of its own and tells what it sees; whatever fails in it ends it, and nothing else."""

    def __init__(self, source: Source, teller: Teller):
        self._source, self._teller = source, teller
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="live", daemon=True)
        self._thread.start()

    def wait(self, seconds: float) -> bool:
        """Whether it has ended within this time: all cells are done, or it failed."""
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def stop(self) -> None:
        """Tell of the last look, and leave the terminal as it was."""
        self._stop.set()
        self._thread.join(PATIENCE)
        self._teller.close()

    def _run(self) -> None:
        try:
            while not self._tell():
                self._stop.wait(max(EVERY, RARELY * self._spent))
        except Exception as error:
            self._teller.close()
            log.warning("no longer watching the sweep, which goes on: %s: %s", type(error).__name__, error)

    def _tell(self) -> bool:
        """Whether this was the last look: all cells are done, or `stop` was called before it."""
        began, stopping = time.thread_time(), self._stop.is_set()
        view = self._source.look()
        self._teller.tell(view)
        self._spent = time.thread_time() - began
        return stopping or (view.plan.total is not None and view.over >= view.plan.total)


_HERE: list[Watcher] = []  # of the sweep of this process


def start(config: DictConfig) -> None:
    """Watch the sweep of Hydra's configuration, which is about to begin in this process."""
    stop()
    try:
        folder, plan, screen = Path(config.hydra.sweep.dir).absolute(), planned(config), _is_screen()
        started = clock_of(Path(config.output))
        jobs = Jobs(folder, plan, started, started - time.time(), owners=screen)
        _HERE.append(Watcher(jobs, Screen() if screen else Lines()))
    except Exception as error:
        log.warning("not watching the sweep: %s: %s", type(error).__name__, error)


def stop() -> None:
    """End the view of this process' sweep, if there is one."""
    while _HERE:
        _HERE.pop().stop()


atexit.register(stop)


def _is_screen() -> bool:
    return sys.stderr.isatty() and os.isatty(2) and os.environ.get("TERM", "dumb") not in ("dumb", "unknown", "")


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line. Ends with Ctrl-C, or when all cells of a sweep are done; leaves the last view on the page."""
    parser = argparse.ArgumentParser("python -m launchers.live", description="Watch a sweep that runs elsewhere.")
    parser.add_argument("folder", nargs="?", default=RESULTS, type=Path,
                        help=f"a results folder, or the folder of a sweep under outputs/runs ({RESULTS})")  # fmt: skip
    parser.add_argument("--once", action="store_true", help="print the view once")
    chosen = parser.parse_args(arguments)
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    if not chosen.folder.is_dir():
        sys.exit(f"error: There is no folder {chosen.folder}. Name a results folder, or a sweep's under outputs/runs.")
    source = source_of(chosen.folder)
    if not chosen.once:
        watcher = Watcher(source, Screen() if _is_screen() else Lines())
        try:
            while not watcher.wait(EVERY):
                pass
        except KeyboardInterrupt:
            pass
        watcher.stop()
    Console(width=None if sys.stdout.isatty() else WIDTH).print(_whole(source.look()))


def source_of(folder: Path) -> Source:
    """What there is to look at in a sweep's folder or a results folder."""
    record = folder / "multirun.yaml"
    if not record.exists():
        return Results(folder)
    return Jobs(folder, plan_of(folder), record.stat().st_mtime, clock_of(folder) - time.time())


def _whole(view: View) -> RenderableType:
    width = Console().width if sys.stdout.isatty() else WIDTH
    return page(view, summarise(view.rows), width, 10_000)
