"""A pseudo terminal and what a person would read on it."""

import fcntl
import os
import pty
import re
import select
import struct
import sys
import termios
import time
from contextlib import contextmanager

from processes import interruptible

HEIGHT, WIDTH = 40, 200
OWN = "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execvp(sys.argv[1], sys.argv[1:])"
TOKEN = re.compile(r"\x1b\[(\?25)?(\d*)(?:;\d+)*([A-Za-z])|\x1b.|[\r\n]|[^\x1b\r\n]+", re.DOTALL)


class Terminal:
    """The side of the person; `typed` characters reach the processes as a keyboard's would."""

    def __init__(self, side):
        self._side, self.raw = side, ""

    def type(self, characters):
        os.write(self._side, characters)

    def read(self, until=None, patience=120):
        """Read on until a text has been seen, or to the end."""
        deadline = time.monotonic() + patience
        while until is None or until not in self.raw:
            assert time.monotonic() < deadline, f"no {until!r} in\n{self.text}"
            if select.select([self._side], [], [], 0.2)[0]:
                try:
                    piece = os.read(self._side, 1 << 16)
                except OSError:  # Linux' way to say that nobody has it open any more
                    return
                self.raw += piece.decode("utf-8", "replace")

    @property
    def cursor_hidden(self):
        return self.raw.count("\x1b[?25l") > self.raw.count("\x1b[?25h")

    @property
    def text(self):
        """What stands on an endless page after all control codes: up, erase line, return, new line."""
        lines, row, column = [""], 0, 0
        for token in TOKEN.finditer(self.raw):
            text, (private, number, code) = token.group(), token.groups()
            if code and not private:
                row = max(0, row - int(number or 1)) if code == "A" else row
                lines[row] = "" if code == "K" else lines[row]
                assert code in "AKm", f"the page cannot read {text!r}"
            elif text == "\n":
                row += 1
                lines += [""] * (row == len(lines))
            elif text == "\r":
                column = 0
            elif not code:
                lines[row] = lines[row].ljust(column)[:column] + text + lines[row][column + len(text) :]
                column += len(text)
        return "\n".join(line.rstrip() for line in lines)


@contextmanager
def terminal(command, **options):
    """A command that runs on a terminal of its own: (its process, the person's side)."""
    side, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", HEIGHT, WIDTH, 0, 0))
    options["env"] = os.environ | {"TERM": "xterm"} | options.get("env", {})
    options |= dict.fromkeys(("stdin", "stdout", "stderr"), theirs)
    try:
        with interruptible([sys.executable, "-ISc", OWN, *command], **options) as process:
            os.close(theirs)
            yield process, Terminal(side)
    finally:
        os.close(side)
