"""A terminal whose lowest lines are a view, while everybody's output goes by above it in whole lines."""

import contextlib
import os
import sys
import threading

from rich.console import Console, RenderableType
from rich.live import Live
from rich.text import Text

PATIENCE = 5.0  # seconds that closing waits for what was written before
DRAINED = b"\0"


class Terminal:
    """From `open` to `close` file descriptors 1 and 2, where they are terminals, lead through this object.

    So what other processes and libraries write does not tear the view either. The cursor stays visible: a process
    that is killed outright leaves a sane terminal.
    """

    def __init__(self) -> None:
        self._kept = {number: os.dup(number) for number in (1, 2) if os.isatty(number)}
        self._screen = os.fdopen(os.dup(2), "w", encoding="utf-8", errors="replace")
        self.console = _Console(file=self._screen, force_terminal=True, highlight=False)
        self._live = Live("", console=self.console, auto_refresh=False, transient=True, redirect_stdout=False,
                          redirect_stderr=False, vertical_overflow="crop")  # fmt: skip
        self._out, self._into = os.pipe()
        self._drained, self._closed = threading.Event(), False

    def open(self) -> None:
        """Begin to show what `show` is given."""
        self._measure()
        self._live.start()
        _flush()
        for number in self._kept:
            os.dup2(self._into, number)
        threading.Thread(target=self._copy, name="terminal", daemon=True).start()

    def show(self, picture: RenderableType) -> None:
        """Draw the view anew."""
        self._measure()
        self._live.update(picture, refresh=True)

    def close(self) -> None:
        """Give the terminal back, the view wiped, all output before this in place."""
        if self._closed:
            return
        _flush()
        for number, kept in self._kept.items():
            os.dup2(kept, number)
        with contextlib.suppress(OSError):
            os.write(self._into, DRAINED)
        self._drained.wait(PATIENCE)
        self._closed = True
        with contextlib.suppress(Exception):  # the terminal may be gone
            self._live.stop()

    def _copy(self) -> None:
        """Never ends before its writers do: they would be stuck. After `close` it passes on what children write."""
        rest = b""
        while chunk := os.read(self._out, 1 << 16):
            *lines, rest = (rest + chunk).split(b"\n")
            last = DRAINED in chunk
            if last and rest.strip(DRAINED):
                lines, rest = [*lines, rest], b""
            if lines:
                self._print(b"\n".join(lines).replace(DRAINED, b""))
            if last:
                rest = b""
                self._drained.set()

    def _print(self, text: bytes) -> None:
        try:
            if not self._closed:
                lines = text.decode("utf-8", "replace").split("\n")
                return self.console.print(Text("\n").join(map(Text.from_ansi, lines)), soft_wrap=True)
        except Exception:
            pass
        with contextlib.suppress(OSError):
            os.write(self._kept[2], text + b"\n")

    def _measure(self) -> None:
        with contextlib.suppress(OSError):  # keeps the last size
            self.console.size = os.get_terminal_size(self._screen.fileno())


class _Console(Console):
    def show_cursor(self, show: bool = True) -> bool:
        return False


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
