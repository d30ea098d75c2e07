"""What a command loads before it is known that something must be computed."""

import contextlib
import signal
import subprocess
import sys

import console
import pytest

from launchers.run import interruptible

HEAVY = ("torch", "open_clip", "matplotlib", "sklearn", "scipy", "wandb", "datasets", "pandas")
LOADED = """
import atexit, sys
from importlib import import_module
heavy = {heavy!r}
atexit.register(lambda: print("loaded:", *(name for name in heavy if name in sys.modules), file=sys.stderr))
sys.argv = {argv!r}
import_module({module!r}).main()
"""


def loaded(module, *arguments, cwd=None):
    """The heavy packages in memory when a program ends, its exit status and what it wrote to both streams."""
    code = LOADED.format(heavy=HEAVY, argv=["duet", *arguments], module=module)
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True)
    *lines, last = done.stderr.splitlines()
    return last.split()[1:], done.returncode, done.stdout + "\n".join(lines)


@pytest.mark.parametrize("module", ["launchers.run", "launchers.finetune"])
@pytest.mark.parametrize("flags", [["--help"], ["--cfg", "job"]])
def test_help_and_the_configuration_need_nothing_heavy(module, flags, tmp_path):
    packages, status, shown = loaded(module, *flags, cwd=tmp_path)
    assert (packages, status) == ([], 0), shown
    assert "backbone" in shown


def test_looking_ahead_needs_nothing_heavy():
    code = f"import sys, merging, launchers.preflight, launchers.callback; print(*({set(HEAVY)} & {{*sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_a_row_that_is_there_is_shown_without_torch(output):
    arguments = console.command(output, "method=average")[1:]
    _, status, first = loaded("launchers.run", *arguments, cwd=output.parent)
    assert status == 0, first
    packages, status, again = loaded("launchers.run", *arguments, cwd=output.parent)
    assert (packages, status) == (["matplotlib", "pandas"], 0), again
    assert "average: found in" in again
    first, again = (text.partition("\nmini8")[2].partition("scale: none")[0] for text in (first, again))
    assert first == again and "expert" in first  # the table
    packages, *_ = loaded("launchers.run", *arguments, "seed=1", cwd=output.parent)
    assert "torch" in packages


def test_an_interrupt_that_an_import_catches_still_ends_the_command():
    inherited = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts background jobs with none
    try:
        interrupted()
    finally:
        signal.signal(signal.SIGINT, inherited)


def interrupted():
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), interruptible(), contextlib.suppress(BaseException):
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before
    with interruptible():
        pass
