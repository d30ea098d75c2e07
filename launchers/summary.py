"""From rows to the lines of a table: normalise by the experts, average over seeds, order and name."""

import json
import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from launchers.rows import Row


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
    def static(self) -> bool:
        """A merged model without a router: what competes for the bold figures."""
        return not self.failed and self.rows[0].method not in ("base", "expert") and self.rows[0].router == "none"


@dataclass(frozen=True)
class Summary:
    """The lines of one suite in print order: base, methods by rising mean, failures, expert."""

    suite: str
    tasks: tuple[str, ...]
    lines: tuple[Line, ...]


def summarise(rows: Iterable[Row]) -> list[Summary]:
    """One summary per suite and set of tasks, in order of first appearance. The same run twice counts once."""
    unique = list({row.run_id: row for row in sorted(rows, key=lambda row: row.created)}.values())
    suites: dict[tuple, list[Row]] = defaultdict(list)
    for row in unique:
        suites[row.suite, frozenset(row.tasks)].append(row)
    return [_summarise_suite(members) for members in suites.values()]


def _summarise_suite(rows: Sequence[Row]) -> Summary:
    groups = _group(rows)
    experts = {_reference(row): row for row in rows if row.method == "expert" and row.status == "ok"}
    lines = [_line(label, group, experts) for label, group in zip(_labels(groups), groups, strict=True)]
    return Summary(rows[0].suite, tuple(rows[0].tasks), tuple(sorted(lines, key=_place)))


def _group(rows: Sequence[Row]) -> list[list[Row]]:
    """Rows that differ in their seed only; the same seed again (other checkpoints) opens another group."""
    groups: dict[tuple, list[Row]] = defaultdict(list)
    seen: dict[tuple, int] = defaultdict(int)
    for row in rows:
        kind = json.dumps([row.status, _identity(row)], sort_keys=True)
        groups[kind, seen[kind, row.seed]].append(row)
        seen[kind, row.seed] += 1
    return list(groups.values())


def _identity(row: Row) -> dict[str, Any]:
    told = {name: getattr(row, name) for name in ("method", "family", "needs", "router", "granularity")}
    return {**_flat(row.config), **{f"row.{name}": value for name, value in told.items()}}


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested config as dotted names, without its seeds."""
    flat: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{name}.")
        elif name != "seed":
            flat[prefix + name] = value
    return flat


def _reference(row: Row) -> str:
    """What must agree before a row may be divided by an expert row."""
    return json.dumps([row.suite, row.seed, row.checkpoints, row.splits], sort_keys=True)


def _line(label: str, rows: Sequence[Row], experts: Mapping[str, Row]) -> Line:
    if rows[0].status == "error":
        return Line(label, tuple(rows), {}, {}, None, None)
    ratios = [_ratios(row, experts.get(_reference(row))) for row in rows]
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
    method = line.rows[0].method
    rank = 0 if method == "base" else 3 if method == "expert" else 2 if line.failed else 1
    return rank, line.mean.mean if line.mean else math.inf


def _labels(groups: Sequence[Sequence[Row]]) -> list[str]:
    """The method names; where one stands for several configs, followed by the knobs that tell them apart."""
    same: dict[str, list[dict[str, Any]]] = defaultdict(list)
    identities = [_identity(group[0]) for group in groups]
    for identity in identities:
        same[identity["row.method"]].append(identity)
    labels = []
    for identity in identities:
        rivals = same[identity["row.method"]]
        knobs = [key for key in identity if any(rival.get(key) != identity[key] for rival in rivals)]
        told = {key.rpartition(".")[2]: f"{key.rpartition('.')[2]}={_short(identity[key])}" for key in knobs}
        labels.append(" ".join([identity["row.method"], *told.values()]))
    return labels


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
