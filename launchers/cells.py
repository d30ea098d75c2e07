"""One cell: merge with one method, choose its scale, score every task, write the row."""

import logging
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from launchers import rows
from launchers.rows import Row
from merging.api import describe
from merging.experts import Experts
from merging.methods import Method
from tasks.grid import Fixed, Grid, Search

log = logging.getLogger(__name__)
Config = dict[str, Any]
OnTask = Callable[[str, float], object]


@dataclass(frozen=True)
class Setup:
    """What the cells of one configuration share: experts loaded once, a grid with its towers and images."""

    experts: Experts
    grid: Grid
    family: str

    @property
    def checkpoints(self) -> dict[str, str]:
        ids = (checkpoint.id for checkpoint in self.experts.checkpoints)
        return {"base": self.experts.origin.id, **dict(zip(self.experts.tasks, ids, strict=True))}


@dataclass(frozen=True)
class Cell:
    """A method in a setup. `config` is what changes the numbers, and nothing else."""

    label: str
    method: Method
    scale: Fixed | Search
    config: Config
    setup: Setup

    @property
    def run_id(self) -> str:
        return rows.run_id(self.config, self.setup.checkpoints)

    def row(self) -> Row:
        """The row before any result: everything that is known without computing."""
        grid = self.setup.grid
        tests = {task.name: task.split("test") for task in grid.suite.tasks}
        return Row(
            run_id=self.run_id,
            status="ok",
            method=self.label,
            config=self.config,
            suite=grid.suite.name,
            tasks=list(grid.suite.names),
            accuracy={},
            validation=None,
            scale=None,
            scale_source="-",
            needs=self.method.needs,
            router="none",
            granularity="none",
            family=self.setup.family,
            checkpoints=self.setup.checkpoints,
            splits={name: {"name": "test", "id": split.id, "size": len(split)} for name, split in tests.items()},
            seed=self.config["seed"],
            code=code_version(),
            stored_bytes=0,
            macs=grid.backbone.macs,
            seconds={},
            created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        )

    def compute(self, on_task: OnTask, save: str | None = None) -> Row:
        """Merge, choose the scale on validation, score the test split once; `on_task` hears each accuracy."""
        grid, start = self.setup.grid, time.perf_counter()
        merged = self.method(self.setup.experts)
        merged_at = time.perf_counter()
        merged, validation = self.scale.choose(merged, grid)
        chosen_at = time.perf_counter()
        accuracy = grid.score(merged, "test", on_task)
        seconds = {
            "merge": merged_at - start,
            "search": chosen_at - merged_at,
            "score": time.perf_counter() - chosen_at,
        }
        log.info(
            "%s: mean accuracy %.1f %%, merged in %.1f s",
            self.label,
            100 * sum(accuracy.values()) / len(accuracy),
            seconds["merge"],
        )
        if save is not None:
            merged = replace(merged, provenance={"method": describe(self.method), "run_id": self.run_id})
            log.info("saved %s", merged.save(save, backbone=grid.backbone.facts()))
        routing = merged.routing
        return replace(
            self.row(),
            accuracy=accuracy,
            validation=validation,
            scale=merged.scale,
            scale_source="-" if merged.scale is None else self.scale.source,
            router=routing.router if routing else "none",
            granularity=routing.granularity if routing else "none",
            stored_bytes=merged.stored_bytes,
            seconds={name: round(value, 3) for name, value in seconds.items()},
        )


def finish(
    cell: Cell,
    folder: Path,
    on_task: OnTask,
    redo: bool = False,
    save: str | None = None,
    found_level: int = logging.INFO,
) -> Row:
    """The cell's row: found if finished before, else computed and written. A failure is written too, then raised."""
    done = None if redo or save is not None else rows.find(folder, cell.run_id)
    if done is not None:
        where = folder / f"{cell.run_id}.json"
        log.log(found_level, "%s: found in %s (redo=true computes it again)", cell.label, where)
        return done
    try:
        row = cell.compute(on_task, save)
    except Exception as error:
        if rows.find(folder, cell.run_id) is None:  # a failed redo does not replace a good row
            rows.write(replace(cell.row(), status="error", error=f"{type(error).__name__}: {error}"), folder)
        raise
    rows.write(row, folder)
    return row


@cache
def code_version() -> str:
    """The commit of the checkout this file lies in, `-dirty` if changed; else the installed version."""
    root = Path(__file__).resolve().parent.parent
    if (root / ".git").exists():
        command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=9"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode == 0:
            return done.stdout.strip()
    try:
        return version("duet-merging")
    except PackageNotFoundError:
        return "unknown"
