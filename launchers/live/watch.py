"""Watching a sweep from a thread: a view on a terminal, a log line whenever more cells are done elsewhere."""

import atexit
import contextlib
import logging
import sys
import threading
import time
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from rich.console import Console
from rich.live import Live
from rich.text import Text

from launchers.claims import clock
from launchers.live.page import page, status
from launchers.live.sources import Results, Sweep
from launchers.live.view import View, planned
from launchers.results.frame import summarise

log = logging.getLogger(__name__)
ALONE = (".BasicLauncher", ".SlurmLauncher")  # whose jobs do not write on this terminal from other processes
SHARE = 0.75  # of the terminal's height: log lines stay in sight above
EVERY, RARELY = 1.0, 20  # seconds from look to look, or this many times the processor time of a look
PATIENCE = 5.0  # seconds that the end of a sweep waits for the last look


class _Console(Console):
    """Standard error; the cursor stays visible, so that a process that is killed outright leaves a sane terminal."""

    def show_cursor(self, show: bool = True) -> bool:
        return False

    def print(self, *objects: Any, **options: Any) -> None:
        """Lines of the program, which rich hands over as texts, stay whole: the terminal wraps them."""
        lines = bool(objects) and all(isinstance(line, str | Text) for line in objects)
        how: dict[str, Any] = {"soft_wrap": lines} | options
        super().print(*objects, **how)


class Watcher:
    """Looks at a source and shows what it sees; whatever fails in it ends it, and nothing else."""

    def __init__(self, source: Sweep | Results, draws: bool = True):
        console = _Console(stderr=True, highlight=False)
        self._source, self._done, self._stop = source, 0, threading.Event()
        self._live = Live("", console=console, auto_refresh=False, transient=True, vertical_overflow="crop",
                          redirect_stdout=sys.stdout.isatty())  # fmt: skip
        self._draws = draws and console.is_interactive
        if self._draws:
            self._live.start()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def wait(self, seconds: float) -> bool:
        """Whether it has ended within this time: all cells are done, or it failed."""
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def stop(self) -> None:
        """Look a last time, and leave the terminal as it was."""
        self._stop.set()
        self._thread.join(PATIENCE)
        with contextlib.suppress(Exception):  # the terminal may be gone
            self._live.stop()

    def _run(self) -> None:
        try:
            last = False
            while not last:
                start, last = time.thread_time(), self._stop.is_set()
                view = self._source.look()
                self._show(view)
                last = last or view.done == view.plan.total
                self._stop.wait(0 if last else max(EVERY, RARELY * (time.thread_time() - start)))
        except Exception as error:
            with contextlib.suppress(Exception):
                self._live.stop()
            log.warning("no longer watching the sweep, which goes on: %s: %s", type(error).__name__, error)

    def _show(self, view: View) -> None:
        if self._draws:
            width, height = self._live.console.size
            self._live.update(page(view, summarise(view.rows), width - 1, int(SHARE * height)), refresh=True)
        elif view.done != self._done:
            log.info("%s", status(view))
        self._done = view.done


_WATCHERS: list[Watcher] = []  # of the sweep of this process: Hydra calls `start` and `stop` on different occasions


def start(config: DictConfig) -> None:
    """Watch the sweep of Hydra's configuration, which is about to begin in this process."""
    stop()
    try:
        now = clock(Path(config.output))
        folder, draws = Path(config.hydra.sweep.dir).absolute(), config.hydra.launcher._target_.endswith(ALONE)
        _WATCHERS.append(Watcher(Sweep(folder, planned(config), now, now - time.time()), draws))
    except Exception as error:
        log.warning("not watching the sweep: %s: %s", type(error).__name__, error)


@atexit.register
def stop() -> None:
    """End the view of this process' sweep, if there is one."""
    while _WATCHERS:
        _WATCHERS.pop().stop()
