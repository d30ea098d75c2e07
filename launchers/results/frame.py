"""Rows as one DataFrame: a record per run and task, and from it the lines that tables, figures and pages show."""

import json
import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from typing import TYPE_CHECKING, Any

from launchers.results.labels import identity, labels
from launchers.rows import Row, read
from merging.errors import UserError
from merging.needs import NEEDS
from tasks.score import Score

if TYPE_CHECKING:  # every run has a summary of its rows; pandas is loaded when it is made
    from pandas import DataFrame

RESULTS = "outputs/results"
KINDS = ("base", "linear_probe", "static", "routed", "oracle", "failed", "multitask", "expert")
PROBE = "linear_probe"
REFERENCES = ("base", PROBE, "multitask", "expert")  # no merges
MERGES = ("static", "routed", "oracle")
COMPETE = ("static", "routed")  # kinds of lines that are judged among themselves, where they are fair
COPIED = ("method", "status", "scale_source", "needs", "router", "granularity", "adaptation", "family", "owned",
          "params")  # fmt: skip
NO_SCORES = ("routing_accuracy", "probe", "energy")  # quantities that not every run of a line needs to have


@dataclass(frozen=True)
class Summary:
    """The lines of one suite, numbered from 1, in the order of KINDS and by rising mean within a kind.

    `lines` has a column for each fact of `_facts` and `_costs` and, in percent, for each quantity: "task <task>",
    "unseen <task>", "norm <task>" (percent of the expert's score), their means "mean", "unseen", "norm";
    "routing_accuracy", "probe", "energy". A quantity is a mean over seeds; "<quantity> sd" is the sample standard
    deviation, NaN for a single seed.
    """

    suite: str
    tasks: tuple[str, ...]
    unseen: tuple[str, ...]  # tasks whose experts were left out
    lines: "DataFrame"

    @property
    def rows(self) -> list[Row]:
        """All rows behind the lines, in their order."""
        return list(chain(*self.lines["rows"]))

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
        return [position for position, pair in enumerate(pairwise(self.lines["kind"]))
                if pair[0] != pair[1] and {*pair} & {"routed", "oracle"}]  # fmt: skip

    @property
    def level(self) -> str:
        """The score that lines are compared by: "norm" where every line has one, else "mean"."""
        return level_of(self.scored)

    @property
    def merges_level(self) -> str:
        """The score that merges are compared by, whatever the lines beside them have."""
        return level_of(self.scored[self.scored["kind"].isin(MERGES)])

    def front(self, cost: str = "stored_bytes") -> "DataFrame":
        """The fair merges that no other beats in score and a cost, a column of `_costs`, by rising cost."""
        lines = self.scored
        known = (lines[cost] > 0) & lines[self.merges_level].notna()
        return pareto(lines[lines["kind"].isin(COMPETE) & lines["fair"] & known], cost, self.merges_level)


def level_of(lines: "DataFrame") -> str:
    """ "norm" where every line has one, else "mean"."""
    return "norm" if len(lines) and lines["norm"].notna().all() else "mean"


def pareto(frame: "DataFrame", cost: str, gain: str) -> "DataFrame":
    """The records of rising cost whose gain exceeds that of everything cheaper; of equal records the first."""
    ordered = frame.sort_values([cost, gain], ascending=[True, False], kind="stable")
    return ordered[ordered[gain] > ordered[gain].cummax().shift(fill_value=-math.inf)]


def of_rows(rows: Iterable[Row]) -> "DataFrame":
    """A record per run and task, the held-out tasks included; scores in the unit of their metric, NaN for none.

    `normalised`: the score divided by the expert's of the same seed, checkpoints, heads and split; NaN where the
    expert's is not above 0 or lower is better.
    """
    from pandas import DataFrame

    rows = list(rows)
    experts = {same_experts(row): row.scores for row in rows if row.method == "expert" and row.status == "ok"}
    return DataFrame([record for row in rows for record in _records(row, _experts_of(row, experts))])


def _experts_of(row: Row, experts: Mapping[tuple[str, str], Mapping[str, Score]]) -> Mapping[str, Score]:
    """The scores that a row is divided by; a probe has heads of its own, so that any heads of the experts will do."""
    key = same_experts(row)
    if row.method != PROBE:
        return experts.get(key, {})
    matching = [scores for (checkpoints, _), scores in experts.items() if checkpoints == key[0]]
    return matching[0] if len(matching) == 1 else {}


def _records(row: Row, experts: Mapping[str, Score]) -> Iterator[dict[str, Any]]:
    facts = {"run_id": row.run_id, "suite": row.suite, "method": row.method, "kind": kind_of(row), "seed": row.seed}
    merged = [(task, False, row.scores.get(task)) for task in row.tasks]
    for task, unseen, score in [*merged, *((task, True, score) for task, score in row.unseen.items())]:
        record = facts | {"task": task, "unseen": unseen, "normalised": None, "metric": None, "score": None}
        record |= {"routing_accuracy": row.routing.get("accuracy", {}).get(task)}
        record |= {"probe": _ratio(row.probe[task], experts.get(task)) if task in row.probe else None}
        if score is not None:
            record |= {"metric": score.metric, "score": score.value, "count": score.count}
            record |= {"standard_error": score.standard_error}
            record["normalised"] = None if unseen else _ratio(score, experts.get(task))
        yield record


def _ratio(score: Score, expert: Score | None) -> float | None:
    if expert is None or score.metric != expert.metric or not score.higher_is_better or expert.value <= 0:
        return None
    return score.value / expert.value


def rows_of(paths: Sequence[str]) -> list[Row]:
    """All rows under `paths`; raises UserError when there is not one."""
    rows = read(paths)
    if not rows:
        raise UserError(
            f"No result rows in {', '.join(map(str, paths))}. A run writes them: try `duet method=ties suite=mini8`, "
            "or name the folder that holds your rows."
        )
    return rows


def summarise(rows: Iterable[Row], by_needs: bool = False) -> list[Summary]:
    """One summary per suite, merged and unseen tasks, and split, in order of first appearance.

    The same run twice counts once. by_needs: within a kind those that need nothing first, then inputs, then labels.
    """
    unique = {row.run_id: row for row in sorted(rows, key=lambda row: row.created)}
    suites: dict[tuple, list[Row]] = defaultdict(list)
    for row in unique.values():
        suites[row.suite, frozenset(row.tasks), frozenset(row.unseen), row.config.get("split")].append(row)
    return [_summary(members, by_needs) for members in suites.values()]


def _summary(rows: Sequence[Row], by_needs: bool) -> Summary:
    from pandas import DataFrame, RangeIndex, Series, concat

    groups = _by_line(rows)
    names = labels([identity(group[0]) for group in groups])
    tasks, unseen = tuple(rows[0].tasks), tuple(rows[0].unseen)
    facts = DataFrame([_facts(label, group) for label, group in zip(names, groups, strict=True)])
    line_of = Series({row.run_id: number for number, group in enumerate(groups) for row in group})
    lines = concat([facts, _costs(rows, line_of), _over_seeds(_quantities(rows, tasks, unseen), line_of)], axis=1)
    lines["order"] = lines["kind"].map(KINDS.index)
    lines["needed"] = lines["needs"].map(NEEDS.index) if by_needs else 0
    lines = lines.sort_values(["order", "needed", "mean"], kind="stable").drop(columns=["order", "needed"])
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
    runs = [row.run_id for row in rows]
    scores, ratios, right, probes = (
        records[~records["unseen"]].pivot(index="run_id", columns="task", values=value).loc[runs, list(tasks)]
        .astype(float) for value in ("score", "normalised", "routing_accuracy", "probe")
    )  # fmt: skip
    others = records[records["unseen"]].pivot(index="run_id", columns="task", values="score")
    others = others.reindex(runs, columns=list(unseen)).astype(float)
    energy = {row.run_id: statistics.fmean(chain(*row.energy.values())) for row in rows if any(row.energy.values())}
    kept = [energy.get(run, math.nan) for run in runs]
    means = DataFrame({"mean": scores.mean(axis=1, skipna=False), "norm": ratios.mean(axis=1),
                       "unseen": others.mean(axis=1, skipna=False), "routing_accuracy": right.mean(axis=1),
                       "probe": probes.mean(axis=1), "energy": kept})  # fmt: skip
    return 100 * scores.add_prefix("task ").join([means, others.add_prefix("unseen "), ratios.add_prefix("norm ")])


def _over_seeds(runs: "DataFrame", line_of: Any) -> "DataFrame":
    """Line x quantity and its deviation: NaN unless every seed has the score."""
    seeds = runs.groupby(line_of)
    complete = seeds.count().eq(seeds.size(), axis=0)
    complete[list(NO_SCORES)] = True
    both = seeds.mean().where(complete).join(seeds.std().where(complete).add_suffix(" sd"))
    return both[[name for quantity in runs for name in (quantity, f"{quantity} sd")]]


def _costs(rows: Sequence[Row], line_of: Any) -> "DataFrame":
    """Line x cost, means over seeds. `work`: multiply-accumulates over those of its backbone's static forward."""
    from pandas import DataFrame

    costs = DataFrame([{
        "run_id": row.run_id, "stored_bytes": row.stored_bytes, "macs": row.macs,
        "backbone": str(row.config.get("backbone")),
        "static": row.macs if row.router in ("none", "oracle") and row.macs else math.nan,
        **{f"{phase}_seconds": row.seconds.get(phase, math.nan) for phase in ("merge", "router")},
        "ready_seconds": row.seconds.get("merge", math.nan) + row.seconds.get("router", 0.0),
        "seconds": sum(row.seconds.values()),
    } for row in rows]).set_index("run_id")  # fmt: skip
    costs["work"] = costs["macs"] / costs.groupby("backbone")["static"].transform("min")
    means = costs.drop(columns=["backbone", "static"]).groupby(line_of).mean()
    return means.astype({"stored_bytes": "int64", "macs": "int64"})


def _facts(label: str, rows: Sequence[Row]) -> dict[str, Any]:
    """What is known of a line beside its scores and costs."""
    row, searched = rows[0], rows[0].search
    transductive, by_batch = any(map(is_transductive, rows)), any(row.granularity == "batch" for row in rows)
    scales = list(dict.fromkeys(row.scale for row in rows if row.scale is not None))
    ends = [f"{end(scales):.3g}" for end in (min, max) if scales]
    return {
        **{name: getattr(row, name) for name in COPIED}, "suite": row.suite, "label": label, "kind": kind_of(row),
        "n": len(rows), "rows": tuple(rows), "transductive": transductive, "by_batch": by_batch,
        "fair": not (transductive or by_batch),  # whether it may be the best of its kind
        "scale": scales[0] if len(scales) == 1 else " ".join(map(str, scales)) or None,
        "scale_range": "..".join(dict.fromkeys(ends)) or None,
        "scale_criterion": searched.get("criterion"), "scales_scored": searched.get("scored"),
        "opened": "; ".join(f"{split}: {', '.join(names)}" for split, names in row.opened.items()) or None,
        "collapsed": " ".join(dict.fromkeys(task for seed in rows for task in seed.collapsed)) or None,
        "seeds": " ".join(str(seed.seed) for seed in rows),
        "code": " ".join(dict.fromkeys(seed.code for seed in rows)),
        "run_ids": " ".join(seed.run_id for seed in rows),
        "error": first_line(row.error) if row.status == "error" else None,
    }  # fmt: skip


def kind_of(row: Row) -> str:
    """What a row may be compared with: "static", "routed" per input, "oracle", "failed", or one of REFERENCES."""
    if row.status == "error":
        return "failed"
    return row.method if row.method in REFERENCES else {"none": "static", "oracle": "oracle"}.get(row.router, "routed")


def is_transductive(row: Row) -> bool:
    """Whether it adapted to the test samples, or to those of another split that it is scored on."""
    return row.adaptation in {"test", *(split.get("name") for split in row.splits.values())}


def same_experts(row: Row) -> tuple[str, str]:
    """What must agree before a row may be divided by an expert row: checkpoints and splits, and heads."""
    heads = {task: ids.get("head") for task, ids in row.contents.items()}
    ids = {name: row.checkpoints.get(name) for name in ("base", *row.tasks, *row.unseen)}
    return json.dumps([row.suite, row.seed, ids, row.splits], sort_keys=True), json.dumps(heads, sort_keys=True)


def first_line(error: str | None) -> str:
    """The first line of an error that says something."""
    return next((line.strip() for line in (error or "").splitlines() if line.strip()), "no message")
