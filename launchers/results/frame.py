"""Rows as one DataFrame: a record per run and task, and from it the lines that tables, figures and pages show."""

import json
import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from typing import TYPE_CHECKING, Any

from launchers.results.labels import identity, labels
from launchers.rows import Row, read
from merging.errors import UserError
from tasks.score import Score

if TYPE_CHECKING:
    from pandas import DataFrame

RESULTS = "outputs/results"
KINDS = ("base", "static", "routed", "oracle", "failed", "multitask", "expert")
REFERENCES = ("base", "multitask", "expert")  # no merges
MERGES = ("static", "routed", "oracle")


@dataclass(frozen=True)
class Summary:
    """The lines of one suite, numbered from 1, in the order of KINDS and by rising mean within a kind.

    `lines` has a column for each fact of `_facts` and, in percent, for each quantity: "task <task>", "unseen <task>",
    "norm <task>" (percent of the expert's score), their means "mean", "unseen", "norm"; "routing_accuracy", "energy".
    A quantity is a mean over seeds; "<quantity> sd" is the sample standard deviation, NaN for a single seed.
    """

    suite: str
    tasks: tuple[str, ...]
    unseen: tuple[str, ...]  # tasks whose experts were left out
    lines: "DataFrame"

    @property
    def rows(self) -> list[Row]:
        """All rows behind the lines, in their order."""
        return [row for rows in self.lines["rows"] for row in rows]

    @property
    def scored(self) -> "DataFrame":
        """The lines that did not fail."""
        return self.lines[self.lines["kind"] != "failed"]

    @property
    def title(self) -> str:
        """Suite and, where its name is another, the family of the experts."""
        family = ", ".join(sorted(set(self.lines["family"])))
        return self.suite if family in ("", self.suite) else f"{self.suite} ({family})"

    @property
    def metrics(self) -> dict[str, str]:
        """The metric of every task that was scored."""
        scores = {task: score for row in self.rows for task, score in row.scores.items()}
        return {task: scores[task].metric for task in self.tasks if task in scores}

    @property
    def breaks(self) -> list[int]:
        """Positions of the lines after which routed or oracle lines begin or end."""
        return [place for place, pair in enumerate(pairwise(self.lines["kind"]))
                if pair[0] != pair[1] and {*pair} & {"routed", "oracle"}]  # fmt: skip


def of_rows(rows: Iterable[Row]) -> "DataFrame":
    """A record per run and task, the held-out tasks included; scores in the unit of their metric, NaN for none.

    `normalised`: the score divided by the expert's of the same seed, checkpoints, heads and split; NaN where the
    expert's is not above 0 or lower is better.
    """
    from pandas import DataFrame

    listed = list(rows)
    experts = {same_experts(row): row for row in listed if row.method == "expert" and row.status == "ok"}
    return DataFrame([record for row in listed for record in _records(row, experts.get(same_experts(row)))])


def _records(row: Row, expert: Row | None) -> list[dict[str, Any]]:
    facts = {"run_id": row.run_id, "suite": row.suite, "method": row.method, "kind": kind_of(row), "seed": row.seed}
    right, experts = row.routing.get("accuracy", {}), expert.scores if expert is not None else {}
    tasks = [(task, False, row.scores.get(task)) for task in row.tasks]
    return [{**facts, "task": task, "unseen": unseen, "routing_accuracy": right.get(task),
             "normalised": None if unseen else _ratio(score, experts.get(task)), **_score(score)}
            for task, unseen, score in [*tasks, *((task, True, score) for task, score in row.unseen.items())]
            ]  # fmt: skip


def _score(score: Score | None) -> dict[str, Any]:
    names = {"metric": "metric", "score": "value", "count": "count", "standard_error": "standard_error"}
    return {name: getattr(score, attribute, None) for name, attribute in names.items()}


def _ratio(score: Score | None, expert: Score | None) -> float | None:
    if score is None or expert is None or score.metric != expert.metric:
        return None
    return score.value / expert.value if score.higher_is_better and expert.value > 0 else None


def rows_of(paths: Sequence[str]) -> list[Row]:
    """All rows under `paths`; raises UserError when there is not one."""
    rows = read(paths)
    if not rows:
        raise UserError(
            f"No result rows in {', '.join(map(str, paths))}. A run writes them: try `duet method=ties suite=mini8`, "
            "or name the folder that holds your rows."
        )
    return rows


def summarise(rows: Iterable[Row]) -> list[Summary]:
    """One summary per suite, merged and unseen tasks, and split, in order of first appearance.

    The same run twice counts once.
    """
    unique = {row.run_id: row for row in sorted(rows, key=lambda row: row.created)}
    suites: dict[tuple, list[Row]] = defaultdict(list)
    for row in unique.values():
        suites[row.suite, frozenset(row.tasks), frozenset(row.unseen), row.config.get("split")].append(row)
    return [_summary(members) for members in suites.values()]


def _summary(rows: Sequence[Row]) -> Summary:
    from pandas import DataFrame, RangeIndex, concat

    groups = _by_line(rows)
    names = labels([identity(group[0]) for group in groups])
    tasks, unseen = tuple(rows[0].tasks), tuple(rows[0].unseen)
    facts = DataFrame([_facts(label, group) for label, group in zip(names, groups, strict=True)])
    facts["work"] = _work(groups)
    quantities = _over_seeds(_quantities(rows, tasks, unseen), groups)
    lines = concat([facts, quantities], axis=1)
    order = lines["kind"].map(KINDS.index).rename("order")
    lines = lines.assign(order=order).sort_values(["order", "mean"], kind="stable").drop(columns="order")
    lines.index = RangeIndex(1, len(lines) + 1)
    split = rows[0].config.get("split")
    title = rows[0].suite + (f" without {', '.join(unseen)}" if unseen else "")
    return Summary(title + ("" if split is None else f" ({split} split)"), tasks, unseen, lines)


def _by_line(rows: Sequence[Row]) -> list[list[Row]]:
    """Rows that differ in their seed only; the same seed again (other checkpoints) opens another line."""
    groups: dict[tuple, list[Row]] = defaultdict(list)
    seen: dict[tuple, int] = defaultdict(int)
    for row in rows:
        method = json.dumps([row.status, identity(row)], sort_keys=True)
        groups[method, seen[method, row.seed]].append(row)
        seen[method, row.seed] += 1
    return list(groups.values())


def _quantities(rows: Sequence[Row], tasks: Sequence[str], unseen: Sequence[str]) -> "DataFrame":
    """Run x quantity, in percent; see Summary."""
    from pandas import DataFrame

    records = of_rows(rows)
    merged, held_out = records[~records["unseen"]], records[records["unseen"]]
    scores = merged.pivot(index="run_id", columns="task", values="score")[list(tasks)].astype(float)
    ratios = merged.pivot(index="run_id", columns="task", values="normalised")[list(tasks)].astype(float)
    others = held_out.pivot(index="run_id", columns="task", values="score").reindex(scores.index, columns=list(unseen))
    right = merged.pivot(index="run_id", columns="task", values="routing_accuracy").astype(float)
    kept = {row.run_id: statistics.fmean(chain(*row.energy.values())) for row in rows if any(row.energy.values())}
    means = DataFrame({"mean": scores.mean(axis=1, skipna=False), "norm": ratios.mean(axis=1),
                       "unseen": others.astype(float).mean(axis=1, skipna=False),
                       "routing_accuracy": right.mean(axis=1), "energy": scores.index.map(kept.get)})  # fmt: skip
    named = scores.add_prefix("task ").join(means).join(others.add_prefix("unseen ")).join(ratios.add_prefix("norm "))
    return 100 * named.astype(float)


def _over_seeds(runs: "DataFrame", groups: Sequence[Sequence[Row]]) -> "DataFrame":
    """Line x quantity and its deviation: NaN unless every seed has the score; gates and energies, of those that do."""
    from pandas import Series

    lines = Series({row.run_id: number for number, group in enumerate(groups) for row in group})
    seeds = runs.groupby(lines)
    whole = seeds.count().eq(seeds.size(), axis=0)
    whole[["routing_accuracy", "energy"]] = True
    both = seeds.mean().where(whole).join(seeds.std().where(whole).add_suffix(" sd"))
    return both[[name for quantity in runs for name in (quantity, f"{quantity} sd")]]


def _facts(label: str, rows: Sequence[Row]) -> dict[str, Any]:
    """What is known of a line beside its scores."""
    row, searched = rows[0], rows[0].search
    transductive, by_batch = any(map(is_transductive, rows)), any(row.granularity == "batch" for row in rows)
    return {
        "suite": row.suite, "label": label, "method": row.method, "kind": kind_of(row), "status": row.status,
        "n": len(rows), "rows": tuple(rows), "transductive": transductive, "by_batch": by_batch,
        "fair": not (transductive or by_batch),  # whether it may be the best of its kind
        "scale": _joined([seed.scale for seed in rows]), "scale_source": row.scale_source,
        "scale_criterion": searched.get("criterion"), "scales_scored": searched.get("scored"),
        "needs": row.needs, "router": row.router, "granularity": row.granularity, "adaptation": row.adaptation,
        "opened": "; ".join(f"{split}: {', '.join(who)}" for split, who in row.opened.items()) or None,
        "collapsed": " ".join(dict.fromkeys(task for seed in rows for task in seed.collapsed)) or None,
        "family": row.family, "params": row.params,
        "stored_bytes": statistics.mean(seed.stored_bytes for seed in rows),
        "macs": statistics.mean(seed.macs for seed in rows),
        **{f"{phase}_seconds": _mean(seed.seconds.get(phase) for seed in rows) for phase in ("merge", "router")},
        "seconds": statistics.fmean(sum(seed.seconds.values()) for seed in rows),
        "seeds": _joined([seed.seed for seed in rows]),
        "code": " ".join(dict.fromkeys(seed.code for seed in rows)),
        "run_ids": " ".join(seed.run_id for seed in rows),
        "error": first_line(row.error) if row.status == "error" else None,
    }  # fmt: skip


def _work(groups: Sequence[Sequence[Row]]) -> list[float | None]:
    """Multiply-accumulates relative to the static forward of the same backbone, None where no line has that."""
    rows = list(chain(*groups))

    def ratio(row: Row) -> float | None:
        backbone = row.config.get("backbone")
        alike = (other for other in rows if other.config.get("backbone") == backbone)
        static = min((other.macs for other in alike if other.router in ("none", "oracle")), default=0)
        return row.macs / static if static else None

    return [_mean(map(ratio, group)) for group in groups]


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def _joined(values: Sequence[Any]) -> Any:
    """The one value of all seeds, or all of them in a text."""
    return values[0] if len(set(values)) == 1 else " ".join(map(str, values))


def kind_of(row: Row) -> str:
    """What a row may be compared with: "static", "routed" per input, "oracle", "failed", or one of REFERENCES."""
    if row.status == "error":
        return "failed"
    return row.method if row.method in REFERENCES else {"none": "static", "oracle": "oracle"}.get(row.router, "routed")


def is_transductive(row: Row) -> bool:
    """Whether it adapted to the test images, or to those of another split that it is scored on."""
    return row.adaptation in {"test", *(split.get("name") for split in row.splits.values())}


def same_experts(row: Row) -> str:
    """What must agree before a row may be divided by an expert row."""
    heads = {task: ids.get("head") for task, ids in row.contents.items()}
    ids = {name: row.checkpoints.get(name) for name in ("base", *row.tasks, *row.unseen)}
    return json.dumps([row.suite, row.seed, ids, row.splits, heads], sort_keys=True)


def first_line(error: str | None) -> str:
    """The first line of an error that says something."""
    return next((line.strip() for line in (error or "").splitlines() if line.strip()), "no message")
