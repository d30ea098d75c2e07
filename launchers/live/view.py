"""A sweep at a moment: its cells, what became of them, how long the rest takes."""

import itertools
import math
import statistics
from collections import Counter, defaultdict
from dataclasses import dataclass

from omegaconf import DictConfig

from launchers.rows import Row
from launchers.sweeps.axes import axes_of, parsed

MANY = 100_000  # cells that are listed one by one
DONE = ("computed", "found", "failed")
Overrides = tuple[str, ...]  # the swept ones of a cell: ("seed=0", "method=ties")


@dataclass(frozen=True)
class Plan:
    """The cells of a sweep: how many (None: not known), what is swept, and what each is where that is known."""

    total: int | None = None
    axes: tuple[str, ...] = ()
    cells: tuple[Overrides, ...] = ()


def planned(config: DictConfig) -> Plan:
    """The cells of Hydra's configuration of a sweep, in its order: the last axis is the fastest."""
    sweeper = config.hydra.sweeper
    axes = axes_of(sweeper.get("params"), parsed(config.hydra.overrides.task))
    axes = {key: override for key, override in axes.items() if override.is_sweep_override()}
    trials = sweeper.get("n_trials")
    if trials is not None or not all(override.is_discrete_sweep() for override in axes.values()):
        return Plan(trials, tuple(axes))
    values = [[f"{key}={value}" for value in override.sweep_string_iterator()] for key, override in axes.items()]
    total = math.prod(map(len, values))
    return Plan(total, tuple(axes), tuple(itertools.product(*values)) if total <= MANY else ())


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
    def waiting(self) -> list[Overrides]:
        """The cells that have not begun."""
        count = max(0, (self.plan.total or 0) - len(self.jobs))
        rest = [*(Counter(self.plan.cells) - Counter(job.overrides for job in self.jobs)).elements()]
        return rest[len(rest) - count :] if len(rest) >= count else [()] * count

    @property
    def left(self) -> float | None:
        """Estimated seconds to the end; None where the number of cells is unknown or none has been computed.

        A cell is expected to take as long as the same cell of other seeds (their mean), else as the median of all
        computed ones, and cells run side by side as so far. Cells found from before count for nothing, so the estimate
        is too high where more of them will be found.
        """
        spans: dict[Overrides, list[float]] = defaultdict(list)
        for job in self.jobs:
            if job.state == "computed":
                spans[without_seed(job.overrides)].append(job.age(self.now))
        cells = len(self.running) + len(self.waiting)
        if self.plan.total is None or not (cells and spans):
            return None if self.plan.total is None or cells else 0.0
        computed = [*itertools.chain(*spans.values())]
        expected = {cell: statistics.fmean(seconds) for cell, seconds in spans.items()}
        usual = statistics.median(computed)
        ages = [job.age(self.now) for job in self.running]
        rests = [abs(expected.get(without_seed(job.overrides), usual) - age)
                 for job, age in zip(self.running, ages, strict=True)]  # fmt: skip
        work = sum(rests) + sum(expected.get(without_seed(cell), usual) for cell in self.waiting)
        side_by_side = max(1.0, sum(computed + ages) / max(1e-9, self.now - self.started))
        return max([work / min(side_by_side, cells), *rests])


def without_seed(overrides: Overrides) -> Overrides:
    """What tells the cost of a cell."""
    return tuple(override for override in overrides if not override.startswith("seed="))
