"""How long the rest of a sweep takes, estimated from what it has taken so far."""

import statistics
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass

Kinds = tuple[
    Hashable, ...
]  # what a cell costs like, the most telling first: the same cell of another seed, its method
EVERY = "every cell"


@dataclass(frozen=True)
class Computed:
    """A cell that this sweep has computed: when its job began and its row appeared, and the seconds the row tells."""

    kinds: Kinds
    group: Hashable  # cells that share experts
    began: float
    ended: float
    seconds: float

    @property
    def overhead(self) -> float:
        """What its job took beside the cell itself: reading or training experts, scoring base and experts."""
        return max(0.0, self.ended - self.began - self.seconds)


@dataclass(frozen=True)
class Running:
    """A cell that is being computed, or prepared."""

    kinds: Kinds
    group: Hashable
    began: float


@dataclass(frozen=True)
class Waiting:
    """A cell whose job has not begun."""

    kinds: Kinds
    group: Hashable


def left(
    computed: Sequence[Computed], running: Sequence[Running], waiting: Sequence[Waiting], now: float
) -> float | None:
    """Seconds until the last cell is done; None as long as no cell has been computed.

    A cell is expected to take as long as the computed ones of its kind did on average (the same cell of other seeds;
    else its method; else all), and what a job takes around its cell. Where experts are new (another seed or suite) the
    first cell also takes the mean time that the first cells before it took beyond that. All of it is divided by the
    number of cells that were in progress at a time so far. A cell that overruns is expected to overrun by as much
    again. Cells found from before count for nothing, so the estimate is too high where more of them will be found.
    """
    if not running and not waiting:
        return 0.0
    if not computed:
        return None
    firsts, means = _first_of_groups(computed), _means(computed)
    around = statistics.median([each.overhead for each in computed if each not in firsts] or [0.0])
    preparation = statistics.fmean(max(0.0, each.overhead - around) for each in firsts)
    known = {each.group for each in computed}
    rests = []
    for each in sorted(running, key=lambda cell: cell.began):
        expected = _expected(each.kinds, means) + around + preparation * (each.group not in known)
        known.add(each.group)
        rests.append(abs(expected - (now - each.began)))
    work = sum(rests) + sum(_expected(each.kinds, means) + around for each in waiting)
    side_by_side = min(at_a_time(computed, running, now), len(running) + len(waiting))
    return max(work / side_by_side, *rests, 0.0) + preparation * len({each.group for each in waiting} - known)


def at_a_time(computed: Iterable[Computed], running: Iterable[Running], now: float) -> float:
    """How many cells were in progress at a time, on average over the time in which any was; at least 1."""
    spans = [(min(each.began, each.ended - each.seconds), each.ended) for each in computed]
    spans += [(min(each.began, now), now) for each in running]
    covered, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        covered += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return max(1.0, sum(end - start for start, end in spans) / covered) if covered > 0 else 1.0


def _first_of_groups(computed: Iterable[Computed]) -> set[Computed]:
    first: dict[Hashable, Computed] = {}
    for each in sorted(computed, key=lambda cell: cell.began):
        first.setdefault(each.group, each)
    return set(first.values())


def _means(computed: Iterable[Computed]) -> dict[Hashable, float]:
    """Mean seconds of the cells of every kind, and of all as EVERY."""
    found: dict[Hashable, list[float]] = {}
    for each in computed:
        for kind in {*each.kinds, EVERY}:
            found.setdefault(kind, []).append(each.seconds)
    return {kind: statistics.fmean(seconds) for kind, seconds in found.items()}


def _expected(kinds: Kinds, means: Mapping[Hashable, float]) -> float:
    return next(means[kind] for kind in (*kinds, EVERY) if kind in means)


def about(seconds: float) -> str:
    """A rough duration: "40 s", "4 min", "2.5 h"."""
    if seconds < 90:
        return f"{max(5, 5 * round(seconds / 5))} s"
    if seconds < 90 * 60:
        return f"{round(seconds / 60)} min"
    return f"{seconds / 3600:.1f} h" if seconds < 36 * 3600 else f"{seconds / 86400:.1f} days"


def clock(seconds: float) -> str:
    """An exact duration: "0:23", "1:02:03"."""
    minutes, rest = divmod(max(0, int(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
