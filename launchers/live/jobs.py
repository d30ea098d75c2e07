"""What the files of a sweep tell while it runs, whoever computes it: jobs, their rows, claims."""

import json
import os
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from launchers import rows
from launchers.claims import owner
from launchers.live.eta import Computed, Running, Waiting, left
from launchers.live.plan import Choices, Plan, group, kinds
from launchers.rows import Row
from merging.errors import UserError

LISTED = "rows.json"  # in a job's folder: the row files it makes or finds, its own first
ENDED = "ended"  # in a job's folder: the job is over, however it went
STATES = ("preparing", "running", "computed", "found", "failed")
OVER = STATES[2:]


@dataclass(frozen=True)
class Job:
    """A cell that has begun."""

    choices: Choices
    state: str  # one of STATES
    began: float
    ended: float | None = None
    seconds: float = 0.0
    owner: str = ""


@dataclass(frozen=True)
class View:
    """A sweep at a moment."""

    plan: Plan
    jobs: tuple[Job, ...]
    rows: tuple[Row, ...]
    started: float
    now: float

    def count(self, *states: str) -> int:
        """How many cells are in these states."""
        return sum(job.state in states for job in self.jobs)

    @property
    def over(self) -> int:
        """How many cells are done, well or not."""
        return self.count(*OVER)

    @property
    def left(self) -> float | None:
        """Estimated seconds to the end; None where nothing is known."""
        if self.plan.total is None:
            return None
        computed = [Computed(kinds(job.choices), group(job.choices), job.began, job.ended or self.now, job.seconds)
                    for job in self.jobs if job.state == "computed"]  # fmt: skip
        running = [Running(kinds(job.choices), group(job.choices), job.began)
                   for job in self.jobs if job.state in ("preparing", "running")]  # fmt: skip
        return left(computed, running, [Waiting(kinds(each), group(each)) for each in self.waiting], self.now)

    @property
    def waiting(self) -> list[Choices]:
        """The cells that have not begun."""
        count = max(0, (self.plan.total or 0) - len(self.jobs))
        rest = [*(Counter(self.plan.cells) - Counter(job.choices for job in self.jobs)).elements()]
        return rest[len(rest) - count :] if len(rest) >= count else [()] * count


class Jobs:
    """The jobs of a sweep's folder. `look` reads what has changed since the last look, and nothing else."""

    def __init__(self, folder: Path, plan: Plan, started: float, skew: float = 0.0, owners: bool = True):
        """`skew`: how far the folder's clock is ahead; without `owners` nobody asks whether jobs that run are alive."""
        self._folder, self._plan, self._started, self._skew, self._owners = folder, plan, started, skew, owners
        self._jobs: dict[Path, Job] = {}
        self._files: dict[Path, tuple[int, Any]] = {}  # content of files by their time of change
        self._listed: dict[str, None] = {}  # row files of this sweep

    def look(self) -> View:
        now = time.time() + self._skew
        for job in job_folders(self._folder, {path for path, job in self._jobs.items() if job.state in OVER}):
            if self._changed(job / ".hydra" / "overrides.yaml") >= self._started:
                self._jobs[job] = self._job(job, now)
        found = (self._row(Path(file)) for file in self._listed)
        return View(self._plan, tuple(self._jobs.values()), tuple(row for row in found if row), self._started, now)

    def _job(self, folder: Path, now: float) -> Job:
        file = folder / ".hydra" / "overrides.yaml"
        overrides = self._content(file, lambda: yaml.safe_load(file.read_text()) or [])
        chosen = dict(each.split("=", 1) for each in overrides)
        job = Job(tuple(f"{axis}={chosen[axis]}" for axis in self._plan.axes if axis in chosen), "preparing",
                  self._changed(file))  # fmt: skip
        over, listed = self._changed(folder / ENDED) >= self._started, folder / LISTED
        files = self._content(listed, lambda: json.loads(listed.read_text())) or []
        if not files:
            return replace(job, state="failed", ended=now) if over else job
        self._listed |= dict.fromkeys(files)
        done = self._finished(job, Path(files[0]), over)
        if done is not None:
            return done
        if not over and not self._owners:
            return replace(job, state="running")
        owners = [by for file in files if (by := owner(Path(file).parent, Path(file).stem)) is not None]
        if owners:
            return replace(job, state="running", owner=owners[0])
        return replace(job, state="failed", ended=now) if over else job

    def _finished(self, job: Job, file: Path, over: bool) -> Job | None:
        """The job if its row is there: made since the sweep started, or found by a job that is over."""
        row, made = self._row(file), self._changed(file)
        if row is None or (made < self._started and not over):
            return None
        if row.status != "ok":
            return replace(job, state="failed", ended=made) if made >= self._started else None
        state = "computed" if made >= self._started else "found"
        return replace(job, state=state, ended=made, seconds=sum(row.seconds.values()))

    def _row(self, file: Path) -> Row | None:
        return self._content(file, lambda: next(iter(rows.read(file)), None))

    def _content(self, file: Path, read: Callable[[], Any]) -> Any:
        """What `read` gives, read again only where the file has changed; None where there is none, or half of one."""
        changed = time_of_change(file)
        if changed is None:
            return None
        if self._files.get(file, (None,))[0] != changed:
            try:
                self._files[file] = changed, read()
            except (OSError, ValueError, UserError, yaml.YAMLError):  # whole at the next look
                return None
        return self._files[file][1]

    def _changed(self, file: Path) -> float:
        return (time_of_change(file) or 0) / 1e9


def job_folders(folder: Path, known: Collection[Path] = ()) -> Iterator[Path]:
    """The folders of jobs under `folder`, but for those `known`."""
    try:
        inner = [Path(entry.path) for entry in os.scandir(folder) if entry.is_dir(follow_symlinks=False)]
    except FileNotFoundError:
        return
    for each in sorted(set(inner) - {*known}, key=lambda path: (len(path.name), path.name)):
        if (each / ".hydra").exists():
            yield each
        else:
            yield from job_folders(each, known)


def time_of_change(file: Path) -> int | None:
    """In nanoseconds by the clock of the file's folder; None where there is no such file."""
    try:
        return file.stat().st_mtime_ns
    except FileNotFoundError:
        return None


def clock_of(folder: Path) -> float:
    """The time by the folder's own clock, which may be another machine's."""
    try:
        with tempfile.TemporaryFile(dir=folder) as probe:
            return os.fstat(probe.fileno()).st_mtime
    except OSError:
        return time.time()
