"""What all programs with Hydra jobs do about failures and interrupts."""

import logging
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from hydra.errors import CompactHydraException, InstantiationException

from launchers.cli_help import spelled
from merging.errors import UserError

log = logging.getLogger(__name__)
Result = TypeVar("Result")


@dataclass
class Program:
    """A command, the process in which its `run` runs, and how many of its jobs failed there."""

    name: str  # on the command line
    resumes: str = "What was finished is kept; run the same command to go on."
    process: int | None = None
    failed: int = 0

    def attempt(self, job: Callable[[], Result]) -> Result | None:
        """What a job returns. A failure is logged, a UserError as one paragraph, and the other jobs of a sweep go on.

        A job that was sent to another process raises it again: only Hydra can carry it home, without its traceback.
        """
        try:
            return job()
        except Exception as error:
            cause = error.__cause__ if isinstance(error, InstantiationException) else error
            readable = isinstance(cause, UserError)
            log.error(cause, exc_info=not readable)
            if self.process == os.getpid():
                self.failed += 1
                return None
            raise CompactHydraException(str(cause)) if readable else error from None

    def run(self, command: Callable[[], object], advise: Callable[[list[str]], str | None] = lambda words: None) -> int:
        """The exit status of Hydra's command; what a refused command line was meant to say follows Hydra's message."""
        self.process, self.failed = os.getpid(), 0
        try:
            command()
        except BrokenPipeError:  # whoever read the output, such as head, has enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0
        except KeyboardInterrupt:
            print(f"\nInterrupted. {self.resumes}", file=sys.stderr)
            return 130
        except SystemExit as stop:
            words = sys.argv[1:]
            if stop.code in (1, 2) and (advice := spelled(words, self.name) or advise(words)):
                print(advice, file=sys.stderr)
            raise
        return int(self.failed > 0)
