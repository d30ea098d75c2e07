"""Processes that tests start and disturb."""

import contextlib
import os
import signal
import subprocess


@contextlib.contextmanager
def interruptible(command, **options):
    """A running command in a group of its own, which is killed in the end. Ctrl-C reaches it also where the tests run
    in the background and were told to ignore it."""
    restore = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # noqa: E731
    process = subprocess.Popen(command, preexec_fn=restore, start_new_session=True, **options)
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
