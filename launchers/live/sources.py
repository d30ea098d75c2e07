"""What the files of a sweep, or of a results folder, say while somebody computes."""

import contextlib
import json
import time
from dataclasses import replace
from pathlib import Path

import yaml
from omegaconf import DictConfig, OmegaConf

from launchers import rows
from launchers.claims import clock, owner
from launchers.live import ENDED, LISTED
from launchers.live.view import DONE, Job, Overrides, Plan, View, planned
from launchers.rows import Row

NEWEST = 20  # runs and sweeps in which the overrides of a claimed cell are looked for


class Sweep:
    """The jobs of a sweep's folder since `started`, by the folder's clock, which is `skew` seconds ahead of ours."""

    def __init__(self, folder: Path, plan: Plan, started: float, skew: float = 0.0):
        self._folder, self._plan, self._started, self._skew = folder, plan, started, skew
        self._jobs: dict[Path, Job] = {}
        self._rows: dict[Path, Row] = {}

    def look(self) -> View:
        """The sweep as it is now; what is done is not read again."""
        now = time.time() + self._skew
        begun = [path.parents[1] for path in self._folder.rglob(".hydra/overrides.yaml") if self._changed(path)]
        for path in sorted(begun, key=lambda path: (len(path.name), path.name)):
            if path not in self._jobs or self._jobs[path].state not in DONE:
                with contextlib.suppress(OSError, ValueError, yaml.YAMLError):  # half written: whole at the next look
                    self._jobs[path] = self._job(path, now)
        return View(self._plan, tuple(self._jobs.values()), tuple(self._rows.values()), self._started, now)

    def _job(self, folder: Path, now: float) -> Job:
        file = folder / ".hydra" / "overrides.yaml"
        values = dict(override.split("=", 1) for override in yaml.safe_load(file.read_text()) or [])
        swept = tuple(f"{axis}={values[axis]}" for axis in self._plan.axes if axis in values)
        job = Job(swept, "preparing", file.stat().st_mtime)
        ended, files = self._changed(folder / ENDED), listed(folder / LISTED)
        for path in files:
            if path.exists() and (path == files[0] or path not in self._rows):
                self._rows |= zip([path], rows.read(path), strict=False)  # none of a damaged file
        row, new = (self._rows.get(files[0]), self._changed(files[0])) if files else (None, False)
        if row is not None and (new or (ended and row.status == "ok")):
            state = "failed" if row.status != "ok" else "computed" if new else "found"
            return replace(job, state=state, ended=files[0].stat().st_mtime)
        claimed = next((by for path in files if (by := owner(path.parent, path.stem)) is not None), None)
        if claimed is not None:
            return replace(job, state="running", owner=claimed)
        return replace(job, state="failed", ended=now) if ended else job

    def _changed(self, file: Path) -> bool:
        """Whether the file is there and was written since the sweep started."""
        return file.exists() and file.stat().st_mtime >= self._started


class Results:
    """The rows and claims of a results folder, whichever sweeps they belong to."""

    def __init__(self, folder: Path):
        self._folder, self._started = folder, time.time()
        self._read: dict[Path, tuple[float, list[Row]]] = {}  # files as they were at their last change

    def look(self) -> View:
        """The folder as it is now."""
        for file in self._folder.glob("*.json"):
            if self._read.get(file, (0.0,))[0] != (time_of_change := file.stat().st_mtime):
                self._read[file] = time_of_change, rows.read(file)
        known = [row for _, (_, content) in sorted(self._read.items()) for row in content]
        done = [Job((), "computed" if row.status == "ok" else "failed", 0.0, 0.0) for row in known]
        owners = {claim.stem: owner(self._folder, claim.stem) for claim in sorted(self._folder.glob("*.claim"))}
        running = [Job(self._overrides(run_id), "running", None, owner=by) for run_id, by in owners.items() if by]
        return View(Plan(), (*done, *running), tuple(known), self._started, time.time())

    def _overrides(self, run_id: str) -> Overrides:
        """Those of the newest job that computes a cell; its id where there is none."""
        runs = self._folder.parent / "runs"
        newest = sorted(runs.glob("*"), key=lambda run: run.stat().st_mtime, reverse=True)[:NEWEST]
        for file in (file for run in newest for file in run.rglob(LISTED)):
            ids = [path.stem for path in listed(file)]
            if run_id in ids:
                overrides = yaml.safe_load((file.parent / ".hydra" / "overrides.yaml").read_text()) or ()
                return (*["base or expert, for"] * (run_id != ids[0]), *overrides)
        return (run_id,)


def source_of(folder: Path) -> Sweep | Results:
    """What there is to look at in a sweep's folder or a results folder."""
    record = folder / "multirun.yaml"
    if not record.exists():
        return Results(folder)
    config = OmegaConf.load(record)
    plan = planned(config) if isinstance(config, DictConfig) else Plan()
    return Sweep(folder, plan, record.stat().st_mtime, clock(folder) - time.time())


def listed(file: Path) -> list[Path]:
    """The row files of a job, its own first; none where it has not named them yet."""
    return [Path(row) for row in json.loads(file.read_text())] if file.exists() else []
