"""A terminal whose lowest lines are a view, while everybody's output goes by above it in whole lines."""

import contextlib
import os
import sys
import threading

from rich.console import Console, RenderableType
from rich.live import Live
from rich.text import Text

PATIENCE = 5.0  # seconds that closing waits for what was written before
DRAINED = b"\0\n"


class Screen:
    """From the start to `close` file descriptors 1 and 2, where they are terminals, lead through this object.

    So what other processes and libraries write does not tear the view either. The cursor stays visible: a process
    that is killed outright leaves a sane terminal.
    """

    def __init__(self) -> None:
        self._terminals = {number: os.dup(number) for number in (1, 2) if os.isatty(number)}
        self._file = os.fdopen(os.dup(2), "w", encoding="utf-8", errors="replace")
        self.console = _Console(file=self._file, force_terminal=True, highlight=False)
        self._live = Live("", console=self.console, auto_refresh=False, transient=True, redirect_stdout=False,
                          redirect_stderr=False, vertical_overflow="crop")  # fmt: skip
        self._read, self._write = os.pipe()
        self._drained, self._closed = threading.Event(), False
        self._live.start()
        self._lead(dict.fromkeys(self._terminals, self._write))
        threading.Thread(target=self._copy, daemon=True).start()

    def show(self, picture: RenderableType) -> None:
        """Draw the view anew."""
        with contextlib.suppress(OSError):  # keeps the last size
            self.console.size = os.get_terminal_size(self._file.fileno())
        self._live.update(picture, refresh=True)

    def close(self) -> None:
        """Give the terminal back, the view wiped, all output before this in place."""
        if self._closed:
            return
        self._lead(self._terminals)
        with contextlib.suppress(OSError):
            os.write(self._write, DRAINED)
        self._drained.wait(PATIENCE)
        self._closed = True
        with contextlib.suppress(Exception):  # the terminal may be gone
            self._live.stop()

    def _lead(self, targets: dict[int, int]) -> None:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):
                stream.flush()
        for number, target in targets.items():
            os.dup2(target, number)

    def _copy(self) -> None:
        """Never ends before its writers do: they would be stuck. After `close` it passes on what children write."""
        for line in os.fdopen(self._read, "rb"):
            if line != DRAINED:
                self._print(line.removesuffix(b"\n").removesuffix(b"\0"))
            if line.endswith(DRAINED):
                self._drained.set()

    def _print(self, line: bytes) -> None:
        with contextlib.suppress(Exception):  # the terminal may be gone
            if self._closed:
                os.write(self._terminals[2], line + b"\n")
            else:
                self.console.print(Text.from_ansi(line.decode("utf-8", "replace")), soft_wrap=True)


class _Console(Console):
    def show_cursor(self, show: bool = True) -> bool:
        return False
