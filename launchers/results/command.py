"""What the programs beside `duet` share."""

import logging
import sys
from argparse import ArgumentParser
from collections.abc import Iterator
from contextlib import contextmanager

from hydra.errors import HydraException

from launchers.results.frame import RESULTS
from merging.errors import UserError


def parser_of(program: str, description: str) -> ArgumentParser:
    """The parser of `python -m launchers.<program> [paths...]`."""
    parser = ArgumentParser(f"python -m launchers.{program}", description=description)
    parser.add_argument("paths", nargs="*", default=[RESULTS], help=f"row files or folders of them ({RESULTS})")
    return parser


@contextmanager
def one_paragraph() -> Iterator[None]:
    """A UserError, or what Hydra cannot read, ends the program with status 1 and its text; warnings go to stderr."""
    logging.basicConfig(format="%(levelname)s: %(message)s")
    try:
        yield
    except (UserError, HydraException) as error:
        sys.exit(f"error: {error}")
