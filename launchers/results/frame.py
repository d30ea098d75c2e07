"""From rows to the lines of a table: normalise by the experts, average over seeds, order and name."""

import json
import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise

from launchers.results.labels import identity, labels
from launchers.rows import Row, value

KINDS = ("base", "static", "routed", "oracle", "failed", "multitask", "expert")
REFERENCES = ("base", "multitask", "expert")  # no merges


@dataclass(frozen=True)
class Value:
    """A mean over seeds and their sample standard deviation, None for a single seed."""

    mean: float
    deviation: float | None = None


@dataclass(frozen=True)
class Line:
    """One method on one suite, over one or several seeds; fractions, not percent; None where nothing is known."""

    label: str
    rows: tuple[Row, ...]
    accuracy: dict[str, Value]  # task -> accuracy; empty when failed
    normalised: dict[str, Value]  # task -> accuracy / the expert's accuracy; empty without expert rows
    mean: Value | None
    norm: Value | None  # mean over tasks of the normalised accuracies

    @property
    def failed(self) -> bool:
        return self.rows[0].status == "error"

    @property
    def kind(self) -> str:
        """What it may be compared with: "static", "routed" per input, "oracle", "failed", or one of REFERENCES."""
        row = self.rows[0]
        if row.method in REFERENCES:
            return row.method
        if self.failed:
            return "failed"
        return {"none": "static", "oracle": "oracle"}.get(row.router, "routed")

    @property
    def transductive(self) -> bool:
        """It saw unlabelled images that it is scored on, or of the test split."""
        return any(is_transductive(row) for row in self.rows)

    @property
    def by_batch(self) -> bool:
        """One set of weights served a batch of one task, which tells the task."""
        return any(row.granularity == "batch" for row in self.rows)

    @property
    def fair(self) -> bool:
        """Whether it may be the best of its kind: it knew nothing that its rivals do not."""
        return not (self.transductive or self.by_batch)

    @property
    def routed_right(self) -> Value | None:
        """Mean over tasks of the share of images whose largest weight is their own task's; None without gates."""
        shares = [statistics.fmean(row.routing["accuracy"].values()) for row in self.rows if row.routing]
        return over_seeds(shares) if shares else None

    @property
    def unseen(self) -> dict[str, Value]:
        """Held-out task -> accuracy; empty for lines that are told the true task."""
        scores = {task: [value(row.unseen.get(task)) for row in self.rows] for task in self.rows[0].unseen}
        return {task: over_seeds(found) for task, each in scores.items()
                if len(found := [score for score in each if score is not None]) == len(self.rows)}  # fmt: skip

    @property
    def unseen_mean(self) -> Value | None:
        """Mean over the held-out tasks, None where one has no score."""
        if not self.unseen or len(self.unseen) < len(self.rows[0].unseen):
            return None
        return over_seeds(
            [statistics.fmean(value(row.unseen[task]) or 0.0 for task in self.unseen) for row in self.rows]
        )

    @property
    def energy(self) -> Value | None:
        """Mean over parameters and tasks of the energy that the routed parts hold; None where it is unknown."""
        shares = [statistics.fmean(chain(*row.energy.values())) for row in self.rows if any(row.energy.values())]
        return over_seeds(shares) if shares else None


@dataclass(frozen=True)
class Summary:
    """The lines of one suite in the order of KINDS, by rising mean within a kind."""

    suite: str
    tasks: tuple[str, ...]
    lines: tuple[Line, ...]
    unseen: tuple[str, ...] = ()  # tasks whose experts were left out

    @property
    def breaks(self) -> list[int]:
        """The lines after which routed or oracle lines begin or end."""
        kinds = [line.kind for line in self.lines]
        return [index for index, (one, next_one) in enumerate(pairwise(kinds))
                if one != next_one and {one, next_one} & {"routed", "oracle"}]  # fmt: skip


def is_transductive(row: Row) -> bool:
    """Whether it adapted to the test images, or to those of another split that it is scored on."""
    return row.adaptation in {"test", *(split.get("name") for split in row.splits.values())}


def summarise(rows: Iterable[Row]) -> list[Summary]:
    """One summary per suite, merged and unseen tasks, and split, in order of first appearance.

    The same run twice counts once.
    """
    unique = list({row.run_id: row for row in sorted(rows, key=lambda row: row.created)}.values())
    suites: dict[tuple, list[Row]] = defaultdict(list)
    for row in unique:
        suites[row.suite, frozenset(row.tasks), frozenset(row.unseen), row.config.get("split")].append(row)
    return [_summarise_suite(members) for members in suites.values()]


def _summarise_suite(rows: Sequence[Row]) -> Summary:
    groups = _group(rows)
    names = labels([group[0] for group in groups])
    experts = {same_experts(row): row for row in rows if row.method == "expert" and row.status == "ok"}
    lines = [_line(label, group, experts) for label, group in zip(names, groups, strict=True)]
    split = rows[0].config.get("split")
    title = rows[0].suite + (f" without {', '.join(rows[0].unseen)}" if rows[0].unseen else "")
    title += "" if split is None else f" ({split} split)"
    return Summary(title, tuple(rows[0].tasks), tuple(sorted(lines, key=_place)), tuple(rows[0].unseen))


def _group(rows: Sequence[Row]) -> list[list[Row]]:
    """Rows that differ in their seed only; the same seed again (other checkpoints) opens another group."""
    groups: dict[tuple, list[Row]] = defaultdict(list)
    seen: dict[tuple, int] = defaultdict(int)
    for row in rows:
        kind = json.dumps([row.status, identity(row)], sort_keys=True)
        groups[kind, seen[kind, row.seed]].append(row)
        seen[kind, row.seed] += 1
    return list(groups.values())


def same_experts(row: Row) -> str:
    """What must agree before a row may be divided by an expert row."""
    heads = {task: ids.get("head") for task, ids in row.contents.items()}
    ids = {name: row.checkpoints.get(name) for name in ("base", *row.tasks, *row.unseen)}
    return json.dumps([row.suite, row.seed, ids, row.splits, heads], sort_keys=True)


def _line(label: str, rows: Sequence[Row], experts: Mapping[str, Row]) -> Line:
    if rows[0].status == "error":
        return Line(label, tuple(rows), {}, {}, None, None)
    ratios = [_ratios(row, experts.get(same_experts(row))) for row in rows]
    whole = all(ratios)
    return Line(
        label=label,
        rows=tuple(rows),
        accuracy={task: over_seeds([row.accuracy[task] for row in rows]) for task in rows[0].tasks},
        normalised={task: over_seeds([each[task] for each in ratios]) for task in rows[0].tasks} if whole else {},
        mean=over_seeds([statistics.fmean(row.accuracy[task] for task in row.tasks) for row in rows]),
        norm=over_seeds([statistics.fmean(each.values()) for each in ratios]) if whole else None,
    )


def _ratios(row: Row, expert: Row | None) -> dict[str, float]:
    if expert is None or not all(expert.accuracy[task] for task in row.tasks):
        return {}
    return {task: row.accuracy[task] / expert.accuracy[task] for task in row.tasks}


def over_seeds(values: Sequence[float]) -> Value:
    """Mean and sample standard deviation of at least one value."""
    return Value(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None)


def _place(line: Line) -> tuple[int, float]:
    return KINDS.index(line.kind), line.mean.mean if line.mean else math.inf
