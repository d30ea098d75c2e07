"""`duet`: the console script. Torch and all that imports it are loaded by the job alone, not by `--help` or `--cfg`."""

import logging
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from launchers.cli_help import hint, missing, reaching
from launchers.found import found_rows
from launchers.live import watch
from launchers.pareto import Point, objectives
from launchers.program import Program
from launchers.sweeps.check import problem
from launchers.sweeps.slurm import FAILED

DUET = Program("duet")
NO_TASKS = "tasks.suite.no_tasks"  # of conf/suite/none.yaml


def row_files(config: DictConfig) -> list[str]:
    """Those of one Hydra job, none of suite=none; computed now unless they are all there: until here without torch.

    Raises UserError for an option that nothing reads or that has a value of the wrong type.
    """
    from launchers.options import check, check_run

    check_run(config)
    if config.suite.get("_target_") == NO_TASKS:
        with interruptible():
            from launchers.merge_only import merge_and_save

        check(config, HydraConfig.get().overrides.task)
        merge_and_save(config)
        return []
    if (files := found_rows(config)) is not None:
        return files
    with interruptible():
        from launchers.job import run

    check(config, HydraConfig.get().overrides.task)
    return run(config)


@contextmanager
def interruptible() -> Iterator[None]:
    """Ctrl-C while modules are loaded ends the command, also where one of them catches whatever is raised in it."""
    pressed, before = [], signal.getsignal(signal.SIGINT)
    if not callable(before) or threading.current_thread() is not threading.main_thread():
        yield
        return
    signal.signal(signal.SIGINT, lambda *signalled: pressed.append(signalled) or before(*signalled))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if pressed:
        raise KeyboardInterrupt


@hydra.main(config_path="pkg://conf", config_name="config", version_base="1.3")
def job(config: DictConfig) -> Point | None:
    """What Hydra calls; a sweeper that searches hears both objectives, None where there is no row."""
    return DUET.attempt(lambda: objectives(row_files(config)))


def main() -> None:
    """The console script."""
    logging.raiseExceptions = False  # a full disk is told once, not again for every line of run.log
    sys.argv[1:] = reaching(sys.argv[1:])
    if (wrong := missing(sys.argv[1:]) or problem(sys.argv[1:])) is not None:
        sys.exit(wrong)
    try:
        status = DUET.run(job, hint)
    finally:
        watch.stop()
    sys.exit(status or int(bool(FAILED)))


if __name__ == "__main__":
    main()
