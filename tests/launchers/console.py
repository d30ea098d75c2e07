"""The `duet` command on two tasks and a handful of images, as a process of its own or in this one."""

import logging
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

from launchers import rows

DUET = Path(sys.executable).with_name("duet")
TASKS = ["cars", "digits"]
TINY = [
    "suite.tasks=[cars,digits]",
    "suite.sizes.train=64",
    "suite.sizes.val=12",
    "suite.sizes.calibration=8",
    "suite.sizes.test=25",
    "experts.recipe.steps=2",
    "experts.recipe.batch=8",
    "experts.workers=1",
    "scale=fixed",
]


def command(output, *arguments):
    """Flags stand first: argparse, below Hydra, refuses them between overrides."""
    flags = [argument for argument in arguments if argument.startswith("-")]
    return [str(DUET), *flags, *TINY, f"output={output}", *(each for each in arguments if each not in flags)]


def duet(output, *arguments):
    """The finished process, started beside `output`, to see that nothing else is written there."""
    return subprocess.run(command(output, *arguments), cwd=output.parent, capture_output=True, text=True, timeout=300)


def by_method(output):
    """The rows of an output folder."""
    return {row.method: row for row in rows.read(output / "results")}


@contextmanager
def logging_kept():
    """Hydra gives the root logger handlers of its own; afterwards the old ones are back."""
    root = logging.getLogger()
    before, level = list(root.handlers), root.level
    try:
        yield
    finally:
        root.handlers[:] = before
        root.setLevel(level)
