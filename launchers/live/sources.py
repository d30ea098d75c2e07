"""What the files of a sweep, or of a results folder, say while somebody computes."""

import contextlib
import json
import time
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path

import yaml
from omegaconf import DictConfig, OmegaConf

from launchers import rows
from launchers.claims import about, clock, owner
from launchers.live import ENDED, LISTED
from launchers.live.view import Job, Plan, View, planned
from launchers.rows import Row


@dataclass(frozen=True)
class Sweep:
    """The jobs of a sweep's folder since `started`, by the folder's clock, which is `skew` seconds ahead of ours."""

    folder: Path
    plan: Plan
    started: float
    skew: float = 0.0

    def look(self) -> View:
        """The sweep as it is now."""
        now, jobs = time.time() + self.skew, []
        begun = [path.parents[1] for path in self.folder.rglob(".hydra/overrides.yaml") if self._changed(path)]
        for folder in sorted(begun, key=lambda folder: (len(folder.name), folder.name)):
            with contextlib.suppress(OSError, ValueError, yaml.YAMLError):  # half written: whole at the next look
                jobs.append(self._job(folder, now))
        files = dict.fromkeys(file for folder in begun for file in listed(folder))
        known = tuple(row for file in files for row in content(file))
        return View(self.plan, tuple(jobs), known, self.started, now)

    def _job(self, folder: Path, now: float) -> Job:
        written = yaml.safe_load((folder / ".hydra" / "overrides.yaml").read_text()) or []
        values = dict(override.split("=", 1) for override in written)
        swept = tuple(f"{axis}={values[axis]}" for axis in self.plan.axes if axis in values)
        job = Job(swept, "preparing", (folder / ".hydra" / "overrides.yaml").stat().st_mtime)
        ended, files = self._changed(folder / ENDED), listed(folder)
        (row, *_), new = (content(files[0]) or [None], self._changed(files[0])) if files else ([None], False)
        if row is not None and (new or (ended and row.status == "ok")):
            state = "failed" if row.status != "ok" else "computed" if new else "found"
            return replace(job, state=state, ended=files[0].stat().st_mtime)
        claimed = next((by for file in files if (by := owner(file.parent, file.stem)) is not None), None)
        if claimed is not None:
            return replace(job, state="running", owner=claimed)
        return replace(job, state="failed", ended=now) if ended else job

    def _changed(self, file: Path) -> bool:
        """Whether the file is there and was written since the sweep started."""
        return file.exists() and file.stat().st_mtime >= self.started


@dataclass(frozen=True)
class Results:
    """The rows and claims of a results folder, whichever sweeps they belong to."""

    folder: Path
    started: float = field(default_factory=time.time)

    def look(self) -> View:
        """The folder as it is now."""
        known = tuple(row for file in sorted(self.folder.glob("*.json")) for row in content(file))
        done = [Job((), "computed" if row.status == "ok" else "failed", 0.0, 0.0) for row in known]
        ids = [claim.stem for claim in sorted(self.folder.glob("*.claim"))]
        running = [Job((about(self.folder, run_id),), "running", None, owner=by)
                   for run_id in ids if (by := owner(self.folder, run_id))]  # fmt: skip
        return View(Plan(), (*done, *running), known, self.started, time.time())


def source_of(folder: Path) -> Sweep | Results:
    """What there is to look at in a sweep's folder or a results folder."""
    record = folder / "multirun.yaml"
    if not record.exists():
        return Results(folder)
    config = OmegaConf.load(record)
    plan = planned(config) if isinstance(config, DictConfig) else Plan()
    return Sweep(folder, plan, record.stat().st_mtime, clock(folder) - time.time())


def listed(job: Path) -> list[Path]:
    """The row files of a job, its own first; none where it has not named them yet."""
    try:
        return [Path(file) for file in json.loads((job / LISTED).read_text())]
    except (OSError, ValueError):
        return []


def content(file: Path) -> list[Row]:
    """The rows of a file; none where it is missing or damaged."""
    return _content(file, file.stat().st_mtime) if file.exists() else []


@cache
def _content(file: Path, changed: float) -> list[Row]:
    """Read once after every change."""
    return rows.read(file)
