"""What a results folder tells while somebody writes to it: rows and claims, whichever sweeps they belong to."""

import itertools
import json
import time
from datetime import datetime, timezone
from pathlib import Path

import yaml

from launchers import rows
from launchers.claims import owner
from launchers.live.jobs import LISTED, Job, View, job_folders, time_of_change
from launchers.live.plan import Choices, Plan
from launchers.rows import Row

NEWEST = 20  # runs and sweeps in which the name of a claimed cell is looked for


class Results:
    """The rows and claims of a results folder. `look` reads what has changed since the last look."""

    def __init__(self, folder: Path):
        self._folder, self._started = folder, time.time()
        self._files: dict[Path, tuple[int, Row | None]] = {}
        self._names: dict[str, Choices] = {}

    def look(self) -> View:
        """The folder as it is now."""
        there = {file: time_of_change(file) for file in self._folder.glob("*.json")}
        self._files = {file: self._row(file, changed) for file, changed in there.items() if changed is not None}
        found = tuple(row for _, row in self._files.values() if row is not None)
        done = [Job((), "computed" if row.status == "ok" else "failed", 0.0, 0.0) for row in found]
        claimed = (self._job(claim) for claim in sorted(self._folder.glob("*.claim")))
        jobs = (*done, *(job for job in claimed if job is not None))
        return View(Plan(), jobs, found, self._started, time.time())

    def _row(self, file: Path, changed: int) -> tuple[int, Row | None]:
        if self._files.get(file, (None,))[0] == changed:
            return self._files[file]
        return changed, next(iter(rows.read(file) if file.exists() else []), None)

    def _job(self, claim: Path) -> Job | None:
        by = owner(self._folder, claim.stem)
        if by is None:
            return None
        if claim.stem not in self._names:
            self._names[claim.stem] = named(self._folder.parent / "runs", claim.stem) or (claim.stem,)
        return Job(self._names[claim.stem], "running", _since(by), owner=by)


def named(runs: Path, run_id: str) -> Choices:
    """The overrides of the newest job under `runs` that computes a cell; empty where there is none."""
    ran = sorted(runs.iterdir() if runs.exists() else [], key=lambda each: each.stat().st_mtime, reverse=True)
    for job in itertools.chain.from_iterable(map(_jobs, ran[:NEWEST])):
        listed, overrides = job / LISTED, job / ".hydra" / "overrides.yaml"
        if listed.exists() and overrides.exists():
            ids = [Path(file).stem for file in json.loads(listed.read_text())]
            if run_id in ids[:1]:
                return tuple(yaml.safe_load(overrides.read_text()) or ())
            if run_id in ids:
                return ("base or expert, for", *(yaml.safe_load(overrides.read_text()) or ()))
    return ()


def _jobs(run: Path) -> list[Path]:
    """The jobs of a sweep, or the one of a run."""
    return [run] if (run / ".hydra").exists() else list(job_folders(run))


def _since(by: str) -> float:
    """When the claim was taken, from what `owner` says; now where it does not say."""
    try:
        taken = datetime.strptime(by.rpartition("since ")[2], "%Y-%m-%d %H:%M UTC")
    except ValueError:
        return time.time()
    return taken.replace(tzinfo=timezone.utc).timestamp()
