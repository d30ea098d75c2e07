"""`duet`: the console script. Torch and all that imports it are loaded by the job alone, not by `--help` or `--cfg`."""

import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import CompactHydraException, InstantiationException
from omegaconf import DictConfig

from launchers.claims import Taken
from launchers.extras import missing
from launchers.found import found
from launchers.hints import hint
from launchers.live import watch
from launchers.quoting import spelled
from launchers.results.pareto import Point, objectives
from launchers.sweeps.check import problem
from launchers.sweeps.slurm import FAILED
from merging.errors import UserError

log = logging.getLogger(__name__)


def row_files(config: DictConfig) -> list[str]:
    """Those of one Hydra job, computed now unless they are all there: until here torch is not needed.

    Raises UserError for an option that nothing reads or that has a value of the wrong type.
    """
    from launchers.options import check

    check(config, HydraConfig.get().overrides.task)
    if (files := found(config)) is None:
        with heard():
            from launchers.job import run

        return run(config)
    return files


@contextmanager
def heard() -> Iterator[None]:
    """Ctrl-C while modules are loaded ends the command, also where one of them catches whatever is raised in it."""
    pressed, before = [], signal.getsignal(signal.SIGINT)
    if not callable(before) or threading.current_thread() is not threading.main_thread():
        yield
        return

    def note(number: int, frame: FrameType | None) -> None:
        pressed.append(number)
        before(number, frame)

    signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if pressed:
        raise KeyboardInterrupt


@hydra.main(config_path="pkg://conf", config_name="config", version_base="1.3")
def job(config: DictConfig) -> Point | None:
    """What Hydra calls; a sweeper that searches hears both objectives, None where there is no row.

    A failure is logged, a UserError as one paragraph, and the other jobs of a sweep go on.
    """
    try:
        return objectives(row_files(config))
    except Taken as taken:  # between the look and the claim
        log.info("being computed by %s; run the same command again for its row", taken)
        return None
    except Exception as error:
        cause = error.__cause__ if isinstance(error, InstantiationException) else error
        if not _COMMAND.is_here():  # a job sent elsewhere: only Hydra can carry the failure home, without its traceback
            log.error(cause, exc_info=not isinstance(cause, UserError))
            raise CompactHydraException(str(cause)) if isinstance(cause, UserError) else error from None
        _COMMAND.failed += 1
        log.error(cause, exc_info=not isinstance(cause, UserError))
        return None


@dataclass
class _Command:
    """The process in which `main` runs, and how many of its jobs failed."""

    process: int | None = None
    failed: int = 0

    def is_here(self) -> bool:
        return self.process == os.getpid()


_COMMAND = _Command()


def main() -> None:
    """The console script."""
    logging.raiseExceptions = False  # a full disk is told once, not again for every line of run.log
    _COMMAND.process, _COMMAND.failed = os.getpid(), 0
    if (wrong := missing(sys.argv[1:]) or problem(sys.argv[1:])) is not None:
        sys.exit(wrong)
    try:
        job()
    except KeyboardInterrupt:
        print("\nInterrupted. What was finished is kept; run the same command to go on.", file=sys.stderr)
        sys.exit(130)
    except SystemExit as stop:
        if stop.code in (1, 2) and (advice := spelled(sys.argv[1:]) or hint(sys.argv[1:])):
            print(advice, file=sys.stderr)
        raise
    finally:
        watch.stop()
    sys.exit(1 if _COMMAND.failed or FAILED else 0)


if __name__ == "__main__":
    main()
