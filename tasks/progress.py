"""A progress bar with ETA on a terminal, one log line per phase otherwise."""

import logging
import sys
import time

from rich.console import Console
from rich.progress import Progress as Bar

log = logging.getLogger(__name__)


class Progress:
    """`with Progress("what", total) as progress`: then `advance()` or `at(done)`. `detail` goes to the log only."""

    def __init__(self, what: str, total: int, detail: str = ""):
        self._what, self._detail, self._start = what, detail, time.perf_counter()
        self._bar = Bar(console=Console(stderr=True), disable=not sys.stderr.isatty(), transient=True)
        self._task = self._bar.add_task(what, total=total)

    def __enter__(self) -> "Progress":
        log.info("%s: %s ...", self._what, self._detail)
        self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        self._bar.stop()
        if kind is None:
            log.info("%s: done in %.0f s", self._what, time.perf_counter() - self._start)

    def advance(self) -> None:
        self._bar.advance(self._task)

    def at(self, done: int) -> None:
        self._bar.update(self._task, completed=done)
