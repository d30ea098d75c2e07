"""A sweep on SLURM waits for all its jobs and reports those that died, whether or not the cluster keeps accounts."""

import logging
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn, JobStatus, filter_overrides
from hydra.errors import CompactHydraException
from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from launchers import claims
from merging.errors import UserError

log = logging.getLogger(__name__)
ENDED = {"BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "TIMEOUT", "GONE"}
ADVICE = {"OUT_OF_MEMORY": " Give it more with hydra.launcher.mem_gb.", "TIMEOUT": " See hydra.launcher.timeout_min."}
OFTEN, SELDOM = 2.0, 30.0  # seconds between two questions to the scheduler, in the first minute and later
GRACE = 10.0  # seconds from the end of a job to its report
SAYS_ALL = (UserError, CompactHydraException)  # errors whose text is a paragraph for the user
FAILED: list[str] = []  # jobs of this process's sweep that made no row


class Slurm(Callback):
    """Hydra's plugin asks sacct alone, waits for ever where that knows nothing, and stops at the first failure."""

    def on_run_start(self, config: DictConfig, **_: Any) -> None:
        FAILED.clear()

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        FAILED.clear()
        if not str(config.hydra.launcher.get("_target_")).endswith(".SlurmLauncher"):
            return
        from submitit.slurm.slurm import SlurmJob

        if (missing := no_accounting()) is not None:
            log.info("no accounting on this cluster (%s): the state of jobs comes from squeue alone", missing)
        folder = Path(config.output) / "results"
        watched: Any = SlurmJob
        watched.watcher = Watcher(accounting=missing is None)
        watched.results = lambda job: [outcome(job.task(task), folder) for task in range(job.num_tasks)]


def outcome(job: Any, folder: Path) -> JobReturn:
    """What a job returned, at its end; nothing for one that failed or died, which is reported and counted."""
    from submitit.core.core import Job
    from submitit.core.utils import FailedJobError

    try:
        job.wait()
        if job.paths.result_pickle.exists():
            (returned,) = Job.results(job)
            if returned.status == JobStatus.COMPLETED:
                return returned
            error = returned._return_value  # asking Hydra for it would raise it
            problem = f"failed: {'' if isinstance(error, SAYS_ALL) else f'{type(error).__name__}: '}{error}"
        else:
            state = job.watcher.get_state(job.job_id, mode="cache")
            problem = f"died without a result, its state is {state}.{ADVICE.get(state, '')}"
            claims.release(folder, job.job_id)
    except KeyboardInterrupt:
        array = job.job_id.partition("_")[0]
        print(f"\nThe jobs of {array} stay in SLURM's queue; `scancel {array}` ends them.", file=sys.stderr)
        raise
    except FailedJobError:
        problem = "did not get as far as the experiment"
    written = [path for path in (job.paths.stderr, job.paths.stdout) if path.exists()]
    logged = f"Its log is {written[0]}." if written else "It wrote no log."
    overrides = " ".join(filter_overrides(job.submission().args[0]))
    log.error("SLURM job %s (%s) %s. %s The same command computes what is missing.", job.job_id, overrides,
              problem.rstrip("."), logged)  # fmt: skip
    FAILED.append(job.job_id)
    return JobReturn(status=JobStatus.COMPLETED)  # returned nothing: the sweep goes on to its table


class Watcher:
    """The state of the jobs of this process, by squeue, instead of submitit's own watcher."""

    def __init__(self, accounting: bool):
        self.accounting = accounting
        self.states: dict[str, str] = {}
        self._ended: dict[str, float] = {}  # since when a job is seen as ended
        self._began, self._asked, self._silent = time.monotonic(), 0.0, False

    def register_job(self, job_id: str) -> None:
        self.states.setdefault(job_id, "UNKNOWN")

    def is_done(self, job_id: str, mode: str = "standard") -> bool:
        """Whether the job has ended for good: it was not put back into the queue, and its result, if there is one, had
        the time to cross a network file system."""
        self.get_state(job_id, mode)
        return job_id in self._ended and time.monotonic() - self._ended[job_id] >= GRACE

    def get_state(self, job_id: str, mode: str = "standard") -> str:
        """SLURM's word for the state, GONE where no one remembers the job. mode: force | standard | cache."""
        now = time.monotonic()
        due = now - self._asked >= (OFTEN if now - self._began < 60 else SELDOM)
        if mode == "force" or (mode == "standard" and due):
            self._asked = now
            self._ask()
        return self.states.get(job_id, "UNKNOWN")

    def _ask(self) -> None:
        arrays = {job.partition("_")[0] for job in self.states}
        lines = answer("squeue", "-h", "-r", "-t", "all", "-j", ",".join(arrays), "-o", "%i|%T")
        lost = isinstance(lines, str) and "Invalid job id" not in lines
        if lost and not self._silent:
            log.warning("the scheduler does not answer (%s); waiting for it", lines)
        self._silent = lost
        if not lost:
            self._note(dict(line.split("|") for line in lines) if isinstance(lines, list) else {})

    def _note(self, known: dict[str, str]) -> None:
        now = time.monotonic()
        for job, state in self.states.items():
            if job in known or state not in ENDED:
                self.states[job] = known.get(job) or self._remembered(job)
            if self.states[job] in ENDED:
                self._ended.setdefault(job, now)
            else:
                self._ended.pop(job, None)

    def _remembered(self, job: str) -> str:
        """squeue forgets a job some minutes after its end; accounting does not."""
        lines = answer("sacct", "-X", "-n", "-P", "-o", "State", "-j", job) if self.accounting else []
        state = lines[0].split()[0] if lines and isinstance(lines, list) else ""
        return state if state in ENDED else "GONE"


def no_accounting() -> str | None:
    """Why sacct does not answer; None if it does."""
    lines = answer("sacct", "-X", "-n", "-P", "-o", "JobID")
    return lines if isinstance(lines, str) else None


def answer(*command: str) -> list[str] | str:
    """The lines that a command prints, or why it failed."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except FileNotFoundError:
        return f"there is no {command[0]}"
    except subprocess.TimeoutExpired:
        return f"{command[0]} does not answer"
    errors = done.stderr.split("\n")[0].strip() or f"{command[0]} failed"
    return [line for line in done.stdout.splitlines() if line] if done.returncode == 0 else errors
