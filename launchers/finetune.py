"""`duet-finetune`: trains an expert for every task of a suite into a folder. Composes the configuration of `duet`."""

import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig
from rich import box
from rich.console import Console
from rich.table import Table

from launchers.callback import check_writable
from launchers.claims import Taken, claim
from launchers.program import Program
from merging.errors import UserError

if TYPE_CHECKING:  # importing them imports torch, which `--help` does without
    from tasks.expert_files import Bench, Made
    from tasks.suite import Suite

log = logging.getLogger(__name__)
PROGRAM = Program("duet-finetune", "Run the same command again to go on from the last snapshot.")


def run(config: DictConfig) -> None:
    """An expert per task, or a model for all; those that another process is making are left to it, and one that fails
    stops no other."""
    from launchers.options import FINETUNE, check
    from merging.saving import check_target
    from tasks.multitask import Together

    check(config, HydraConfig.get().overrides.task, FINETUNE)
    check_writable("folder", Path(config.folder))
    suite = instantiate(config.suite)
    bench, tasks = bench_of(config, suite), suite.tasks
    if config.multitask:
        bench, tasks = bench.for_tasks(len(tasks)), [Together(tasks)]
    for task in tasks:
        bench.check(task.name)
        check_target(bench.path(task.name), [bench.base])
    bench.check_space([task.name for task in tasks])
    made = []
    for task in tasks:
        try:
            with claim(bench.unfinished(task.name).parent, task.name):
                made.append(bench.make(task))
        except Taken as taken:
            log.info("%s: being trained by %s; run the same command again to see it", task.name, taken)
        except UserError as error:
            PROGRAM.failed += 1
            log.error("%s", error)
    show(made)


def bench_of(config: DictConfig, suite: "Suite") -> "Bench":
    """The typed objects that the configuration names; the base is opened, its weights are not read."""
    from launchers.found import cache_of
    from tasks.expert_files import Bench
    from tasks.vision.folder import pretrained

    backbone, source = instantiate(config.backbone, _convert_="all"), instantiate(config.experts)
    return Bench(
        base=pretrained(source, suite, backbone, cache_of(config)),
        backbone=backbone,
        recipe=instantiate(config.recipe, _convert_="all"),
        seed=config.seed,
        folder=Path(config.folder),
        engine=instantiate(config.engine),
        family=source.family if hasattr(source, "base") else "folder",
        every=float(config.every),
        redo=bool(config.redo),
    )


def show(made: "list[Made]") -> None:
    """Print what there is now."""
    page = Table("expert", "val before", "val after", "file", box=box.HORIZONTALS)
    for expert in made:
        path = str(expert.path) if expert.fresh else f"{expert.path} (was there)"
        page.add_row(expert.task, f"{100 * expert.before:.1f}", f"{100 * expert.after:.1f}", path)
    if made:
        Console(width=None if sys.stdout.isatty() else 200).print(page)


@hydra.main(config_path="pkg://conf", config_name="finetune", version_base="1.3")
def job(config: DictConfig) -> None:
    """What Hydra calls."""
    PROGRAM.attempt(lambda: run(config))


def main() -> None:
    """The console script."""
    sys.exit(PROGRAM.run(job))


if __name__ == "__main__":
    main()
