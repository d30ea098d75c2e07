"""One cell: merge with one method, choose its scale, score every task, write the row."""

import logging
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass, replace
from datetime import datetime, timezone
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from launchers import rows
from launchers.claims import claim
from launchers.rows import Row
from merging.accounting import macs
from merging.adapt import Log, Router
from merging.api import describe
from merging.experts import Experts
from merging.merged import Merged
from merging.methods import Method
from tasks.grid import Fixed, Grid, RoutingFound, Search
from tasks.journal import Journal

log = logging.getLogger(__name__)
Config = dict[str, Any]
OnTask = Callable[[str, float], object]


@dataclass(frozen=True)
class Setup:
    """What the cells of one configuration share: experts loaded once, a grid with its towers and images."""

    experts: Experts
    grid: Grid
    family: str
    unfinished: Path | None = None  # folder for what a cell has done so far
    remarks: tuple[str, ...] = ()  # on the experts

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
    router: Router
    config: Config
    setup: Setup

    @property
    def run_id(self) -> str:
        return rows.run_id(self.config, self.setup.checkpoints)

    @property
    def split(self) -> str:
        """What is scored: the test split, or validation while a setting is being chosen."""
        return self.config.get("split", "test")

    def row(self) -> Row:
        """The row before any result: everything that is known without computing."""
        grid = self.setup.grid
        scored = {task.name: task.split(self.split) for task in grid.suite.tasks}
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
            splits={name: {"name": self.split, "id": split.id, "size": len(split)} for name, split in scored.items()},
            seed=self.config["seed"],
            code=code_version(),
            stored_bytes=0,
            macs=grid.backbone.macs,
            seconds={},
            created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            remarks=list(self.setup.remarks),
        )

    @property
    def journal(self) -> Journal:
        """What this cell has done before it was killed; only the same code goes on with it."""
        folder = self.setup.unfinished
        return Journal(None if folder is None else folder / self.run_id, code_version())

    def compute(self, on_task: OnTask, save: str | None = None, log_step: Log = lambda values, step: None) -> Row:
        """Merge, choose the scale on validation, train the gates, score the split once.

        `on_task` hears each accuracy, `log_step` the losses of a gate in training. Scores and trained gates of a run
        that was killed are used again.
        """
        grid, clock, journal = self.setup.grid, Clock(), self.journal
        merged = self.method(self.setup.experts)
        clock.lap("merge")
        merged, validation = self.scale.choose(merged, grid, journal)
        clock.lap("search")
        collapsed: list[str] = []
        if merged.routing is not None and merged.routing.router == "learned":
            merged, collapsed = self._fitted(merged, journal, log_step)
            clock.lap("router")
        scored = grid.score(merged, self.split, on_task, journal)
        clock.lap("score")
        if save is not None:
            merged = replace(merged, provenance={"method": describe(self.method), "run_id": self.run_id})
            log.info("saved %s", merged.save(save, backbone=grid.backbone.facts()))
        row = replace(
            self.row(),
            accuracy=scored.accuracy,
            validation=validation,
            collapsed=collapsed,
            scale=merged.scale,
            scale_source="-" if merged.scale is None else "fixed" if validation is None else self.scale.source,
            seconds=clock.seconds,
            **self.told(merged, scored.routing),
        )
        log.info("%s: %s", self.label, said(row))
        return row

    def _fitted(self, merged: Merged, journal: Journal, log_step: Log) -> tuple[Merged, list[str]]:
        """The merge with trained gates, and the tasks suspected of collapse."""

        def fit() -> dict[str, Tensor]:
            trained, collapsed = self.router.fit(merged, self.setup.experts, self.config["seed"], log_step)
            gates = trained.routing.gates if trained.routing is not None else None  # an oracle has none
            suspected = torch.tensor([task in collapsed for task in merged.tasks])
            return {**({} if gates is None else gates.state_dict()), "collapsed": suspected}

        found = journal.tensors("gates", fit)
        suspected = found.pop("collapsed").tolist()
        names = [task for task, collapsed in zip(merged.tasks, suspected, strict=True) if collapsed]
        return self.router.restored(merged, found), names

    def told(self, merged: Merged, found: RoutingFound | None) -> dict[str, Any]:
        """What a row says of the merged model itself."""
        routing, looks = merged.routing, needs_of(self.method) == "inputs"
        adaptation = (routing.adaptation if routing else None) or ("calibration" if looks else "none")
        return {
            "needs": "inputs" if adaptation != "none" else needs_of(self.method),
            "adaptation": adaptation,
            "router": routing.router if routing else "none",
            "granularity": routing.granularity if routing else "none",
            "stored_bytes": merged.stored_bytes,
            "params": merged.params,
            "macs": macs(merged, self.setup.grid.backbone),
            "routing": {} if found is None else found._asdict(),
            "energy": {key: [round(share, 5) for share in shares] for key, shares in merged.energy.items()},
        }


def needs_of(method: Method) -> str:
    """What a method and those inside it ask for besides weights: nothing | inputs | labels, the most of all."""
    inner = [getattr(method, knob.name) for knob in fields(method)] if is_dataclass(method) else []
    asked = [method.needs, *(needs_of(each) for each in inner if hasattr(each, "needs"))]
    return next(need for need in ("labels", "inputs", "nothing") if need in asked)


class Clock:
    """Seconds of the phases of a cell."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, phase: str) -> None:
        """The time since the last call was spent on `phase`."""
        now = time.perf_counter()
        self.seconds[phase], self._last = round(now - self._last, 3), now


def said(row: Row) -> str:
    """One line about a finished row."""
    text = f"mean accuracy {100 * sum(row.accuracy.values()) / len(row.accuracy):.1f} %"
    if row.routing:
        routed = row.routing["accuracy"].values()
        text += f", routed right {100 * sum(routed) / len(routed):.1f} %"
    if row.collapsed:
        text += f", suspected of collapse: {', '.join(row.collapsed)}"
    return text + f", {', '.join(f'{phase} {seconds:.1f} s' for phase, seconds in row.seconds.items())}"


def finish(
    cell: Cell,
    folder: Path,
    on_task: OnTask,
    redo: bool = False,
    save: str | None = None,
    found_level: int = logging.INFO,
    log_step: Log = lambda values, step: None,
) -> Row:
    """The cell's row: found if finished before, else computed and written. A failure is written too, then raised.

    Raises Taken where another process computes it just now.
    """
    done = None if redo or save is not None else rows.find(folder, cell.run_id)
    if done is not None:
        where = folder / f"{cell.run_id}.json"
        log.log(found_level, "%s: found in %s (redo=true computes it again)", cell.label, where)
        return done
    with claim(folder, cell.run_id):
        try:
            row = cell.compute(on_task, save, log_step)
        except Exception as error:
            if rows.find(folder, cell.run_id) is None:  # a failed redo does not replace a good row
                rows.write(replace(cell.row(), status="error", error=f"{type(error).__name__}: {error}"), folder)
            raise
        rows.write(row, folder)
        cell.journal.close()
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
