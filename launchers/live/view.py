"""A sweep at a moment: its cells, what became of them, how long the rest takes."""

import math
import statistics
from dataclasses import dataclass

from omegaconf import DictConfig

from launchers.rows import Row
from launchers.sweeps.axes import axes_of, parsed, values_of

DONE = ("computed", "found", "failed")
Overrides = tuple[str, ...]  # the swept ones of a cell: ("seed=0", "method=ties")


@dataclass(frozen=True)
class Plan:
    """The cells of a sweep: how many (None: not known), and what is swept."""

    total: int | None = None
    axes: tuple[str, ...] = ()


def planned(config: DictConfig) -> Plan:
    """The cells of Hydra's configuration of a sweep; of a search its trials."""
    sweeper = config.hydra.sweeper
    axes = axes_of(sweeper.get("params"), parsed(config.hydra.overrides.task))
    axes = {key: override for key, override in axes.items() if override.is_sweep_override()}
    trials = sweeper.get("n_trials")
    if trials is None and all(override.is_discrete_sweep() for override in axes.values()):
        trials = math.prod(len(values_of(override)) for override in axes.values())
    return Plan(trials, tuple(axes))


@dataclass(frozen=True)
class Job:
    """A cell that has begun. `state`: preparing | running | one of DONE."""

    overrides: Overrides
    state: str
    began: float | None  # None where only its owner knows
    ended: float | None = None
    owner: str = ""

    def age(self, now: float) -> float:
        """Seconds that it has taken so far, or took."""
        end = now if self.ended is None else self.ended
        return 0.0 if self.began is None else end - self.began


@dataclass(frozen=True)
class View:
    """The jobs and rows of a sweep at the time `now`."""

    plan: Plan
    jobs: tuple[Job, ...]
    rows: tuple[Row, ...]
    started: float
    now: float

    @property
    def done(self) -> int:
        """How many cells are done, well or not."""
        return sum(job.state in DONE for job in self.jobs)

    @property
    def running(self) -> list[Job]:
        """The jobs that go on, the oldest first."""
        return sorted((job for job in self.jobs if job.state not in DONE), key=lambda job: job.began or 0.0)

    @property
    def left(self) -> float | None:
        """Estimated seconds to the end; None where the number of cells is unknown or none has been computed.

        A cell is expected to take as long as the mean of the computed ones, and cells run side by side as so far.
        Cells found from before count for nothing, so the estimate is too high where more of them will be found.
        """
        if self.plan.total is None or (cells := self.plan.total - self.done) <= 0:
            return None if self.plan.total is None else 0.0
        spans = [job.age(self.now) for job in self.jobs if job.state == "computed"]
        if not spans:
            return None
        usual, ages = statistics.fmean(spans), [job.age(self.now) for job in self.running]
        work = usual * cells - sum(min(age, usual) for age in ages)
        side_by_side = max(1.0, sum(spans + ages) / max(1e-9, self.now - self.started))
        return work / min(side_by_side, cells)
