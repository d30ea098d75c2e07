"""Measured lines beside their published counterparts: differences, and why a counterpart may not be compared."""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, groupby
from typing import Any

from launchers.results.frame import Summary, summarise
from launchers.results.labels import value_at
from launchers.results.published import UNKNOWN, Published, method_of, published
from launchers.results.writers import Cell, Column, Sheet
from launchers.rows import Row

CELL_FACTOR = 10  # a single task may be off by this many tolerances of the mean
CELL_LEAST = 1.0  # points that a single task may always be off
MEANS = ("mean", "norm")
TUNED = "tuned on validation"  # by labelled samples
PRECISION = "fp32"  # of all published scores
LEGEND = (
    "Percent and points. within, outside: of so many points of the mean, every task within ten times that; differs: "
    "another experiment, no repetition, whatever the numbers."
)


@dataclass(frozen=True)
class Comparison:
    """A measured line beside one published row, or beside none; reasons say why the two are no repetition."""

    summary: Summary
    line: dict[str, Any]  # of its lines
    measured: dict[str, float]  # task, "mean" or "norm" -> percent
    published: Published | None = None
    reasons: tuple[str, ...] = ()

    @property
    def gaps(self) -> dict[str, float]:
        """Task, "mean" or "norm" -> measured - published, points."""
        known = self.published.scores if self.published is not None else {}
        return {name: self.measured[name] - value for name, value in known.items() if name in self.measured}

    @property
    def within(self) -> bool:
        """Whether every task and the mean (the normalised one, where only that is published) lie within tolerance."""
        if self.published is None or self.reasons:
            return False
        gaps, limit = self.gaps, max(CELL_FACTOR * self.published.tolerance, CELL_LEAST)
        close = abs(gaps.get("mean", gaps.get("norm", math.inf))) <= self.published.tolerance
        return close and all(abs(gaps[task]) <= limit for task in self.published.accuracy)

    @property
    def verdict(self) -> str:
        """ "within" or "outside" the tolerance; "differs" where the two must not be compared; "" beside nothing."""
        if self.published is None:
            return ""
        return "differs" if self.reasons else "within" if self.within else "outside" if self.gaps else "unknown"


def compare(rows: Iterable[Row]) -> list[Comparison]:
    """All measured lines with their counterparts, suite by suite, backbone by backbone and line by line."""
    comparisons = []
    for summary in chain(*map(_by_backbone, summarise(rows))):
        for line in summary.lines.to_dict("records"):
            scores = {task: line[f"task {task}"] for task in summary.tasks} | {name: line[name] for name in MEANS}
            measured = {name: value for name, value in scores.items() if not math.isnan(value)}
            known = counterparts(line["rows"]) or [(None, ())]
            comparisons += [Comparison(summary, line, measured, there, reasons) for there, reasons in known]
    return comparisons


def _by_backbone(suite: Summary) -> list[Summary]:
    backbones = dict.fromkeys(map(backbone_of, suite.rows))
    if len(backbones) == 1:
        return [suite]
    return [
        summary for name in backbones for summary in summarise(row for row in suite.rows if backbone_of(row) == name)
    ]


def backbone_of(row: Row) -> str:
    """The name of a row's backbone, "unknown" where its configuration does not tell."""
    return value_at(row.config, "backbone.name") or UNKNOWN


def counterparts(rows: Sequence[Row]) -> list[tuple[Published, tuple[str, ...]]]:
    """Of every published table the row nearest in its settings, and why it differs; those that do not come first."""
    row, tables = rows[0], defaultdict(list)
    for known in published() if row.status == "ok" else ():
        there = known.on(row.suite, row.tasks)
        if there is not None and (known.method, known.backbone) == (method_of(row.method), backbone_of(row)):
            tables[there.table, there.source].append(there)
    nearest = [min(rivals, key=lambda there: (len(_settings(row, there)), _gap_of_scales(row, there)))
               for rivals in tables.values()]  # fmt: skip
    reasons = [tuple(dict.fromkeys(reason for seed in rows for reason in _reasons(seed, there))) for there in nearest]
    return sorted(zip(nearest, reasons, strict=True), key=lambda pair: len(pair[1]))


def _gap_of_scales(row: Row, there: Published) -> float:
    expected = there.settings.get("scale")
    return abs(expected - row.scale) if isinstance(expected, float) and row.scale is not None else 0.0


def _reasons(row: Row, there: Published) -> list[str]:
    """What makes the published row another experiment than this one."""
    variant, limit = (value_at(row.config, f"suite.{name}") for name in ("variant", "limit"))
    names = sorted({str(split.get("name")) for split in row.splits.values()} - {"test"})
    here = {task: row.splits.get(task, {}).get("size", "?") for task in row.tasks if task in there.test_images}
    sizes = [f"{task} {there.test_images[task]} / {size}" for task, size in here.items()
             if size != there.test_images[task]]  # fmt: skip
    settings = _settings(row, there)
    reasons = {
        f"experts of {there.family} there, of {row.family} here": not _same_family(row, there),
        f"prompts and test sets of {there.variant} there, of {variant or 'an unknown code base'} here":
            variant != there.variant,
        f"scored on the {' and '.join(names)} split here": names,
        f"at most {limit} samples per split here": limit is not None,
        f"other test samples (there / here): {', '.join(sizes)}": sizes,
        f"other settings (there / here): {', '.join(settings)}": settings,
    }  # fmt: skip
    return [reason for reason, holds in reasons.items() if holds]


def _same_family(row: Row, there: Published) -> bool:
    return row.family in (there.family, there.also)


def _settings(row: Row, there: Published) -> list[str]:
    """The published settings that the row does not share; how the experts are read is no matter among families."""
    searched = row.scale_source.startswith("search")
    reasons = []
    for name, expected in there.settings.items():
        if name.startswith("experts.") and not _same_family(row, there):
            continue
        if name.startswith("search.") and not searched:
            continue  # a method without a scale, or whose scale was not searched
        here = _here(row, name)
        if name == "scale":
            agrees = searched if expected == "search" else expected == row.scale and not searched
            expected = {"search": TUNED, UNKNOWN: UNKNOWN}.get(expected, f"{_short(expected)} fixed")
        else:
            agrees = here == expected
        reasons += [] if agrees else [f"{name} {_short(expected)} / {_short(here)}"]
    if (scored := row.search.get("scored", 0)) < (listed := len(row.search.get("scales", ()))):
        reasons.append(f"all scales scored / {scored} of {listed}")
    precision = value_at(row.config, "engine.precision")
    return reasons if precision in (None, PRECISION) else [*reasons, f"precision {PRECISION} / {precision}"]


def _here(row: Row, name: str) -> Any:
    """A setting of a row, as published rows tell it."""
    scales = row.search.get("scales")
    settings = {
        "scale": f"{_short(row.scale)} {TUNED if row.scale_source.startswith('search') else 'fixed'}",
        "router": routed_by(row), "adaptation": row.adaptation, "granularity": row.granularity,
        "search.criterion": row.search.get("criterion"),
        "search.scales": scales and f"{len(scales)} from {min(scales):g} to {max(scales):g}",
    }  # fmt: skip
    return settings[name] if name in settings else value_at(row.config, name)


def _short(value: Any) -> str:
    return "not set" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def routed_by(row: Row) -> str:
    """What chooses the weights, as published rows tell it: how gates learned, not what their file is called."""
    train = value_at(row.config, "router.train")
    if row.router in ("none", "oracle", "subspace") or not isinstance(train, Mapping) or "_target_" not in train:
        return row.router
    if str(train["_target_"]).endswith(("TaskId", "Discriminant")):
        return "task_id"
    if str(train["_target_"]).endswith("Retrieval"):
        return "retrieval + metric" if train.get("rank") else "retrieval"
    terms = ["task_id"] if train.get("warm_up") else []
    return " + ".join([*terms, *(name for name, term in (train.get("objectives") or {}).items() if term["weight"])])


def sheets(rows: Iterable[Row]) -> list[Sheet]:
    """Every suite and backbone of `rows` as a table: measured, published, difference and what it means."""
    return [_sheet(list(members)) for _, members in groupby(compare(rows), lambda comparison: id(comparison.summary))]


def _sheet(comparisons: Sequence[Comparison]) -> Sheet:
    summary = comparisons[0].summary
    known = [(comparison, there) for comparison in comparisons if (there := comparison.published) is not None]
    footnotes: dict[str, int] = {}
    lines: list[dict[str, Cell]] = []
    dim, breaks = set(), set()
    for _, members in groupby(known, lambda pair: pair[0].line["run_ids"]):
        compared = list(members)
        first, norm = compared[0][0], any("norm" in comparison.gaps for comparison, _ in compared)
        measured = {name: value for name, value in first.measured.items() if name != "norm" or norm}
        breaks.add(len(lines) - 1)
        lines.append(_line(first.line["label"], measured, "{:.1f}", Cell("measured")))
        for comparison, there in compared:
            verdict = comparison.verdict
            dim |= {len(lines), len(lines) + 1}
            verdict += f" {there.tolerance:g}" if verdict in ("within", "outside") else ""
            verdict = f"{verdict} {_marks(comparison.reasons, footnotes)}".strip()
            lines.append(_line(f"  {there.table}", there.scores, "{:.1f}", Cell(_marks(there.notes, footnotes))))
            lines.append(_line("    difference", comparison.gaps, "{:+.1f}", Cell(verdict, bold=comparison.within)))
    norm = ["norm"] if any("norm" in line for line in lines) else []
    columns = [Column(header, tuple(line.get(header, Cell()) for line in lines))
               for header in ("method", *summary.tasks, "mean", *norm, "verdict")]  # fmt: skip
    family = ", ".join(sorted(set(summary.lines["family"])))
    backbone = backbone_of(summary.rows[0])
    title = f"{summary.suite}, {backbone}{f' ({family})' if family else ''}, against published numbers"
    return Sheet(title, columns, _notes(comparisons, footnotes), frozenset(dim), frozenset(breaks))


def _line(method: str, scores: Mapping[str, float], form: str, verdict: Cell) -> dict[str, Cell]:
    rounded = {name: round(value, 1) + 0.0 for name, value in scores.items()}  # no negative zeros
    cells = {name: Cell(form.format(value).replace("+0.0", "0.0")) for name, value in rounded.items()}
    return {"method": Cell(method), **cells, "verdict": verdict}


def _marks(texts: Iterable[str], footnotes: dict[str, int]) -> str:
    """The marks of these texts, "[1 3]", or nothing; each text is numbered where it first appears."""
    numbers = sorted({footnotes.setdefault(text, len(footnotes) + 1) for text in texts})
    return f"[{' '.join(map(str, numbers))}]" if numbers else ""


def _notes(comparisons: Sequence[Comparison], footnotes: Mapping[str, int]) -> list[str]:
    sources = {there.table: there.source for comparison in comparisons if (there := comparison.published) is not None}
    alone = [comparison.line for comparison in comparisons if comparison.published is None]
    failed, nothing = ([line["label"] for line in alone if (line["kind"] == "failed") == fails]
                       for fails in (True, False))  # fmt: skip
    return [
        *[LEGEND] * bool(sources),
        *(f"[{number}] {text}" for text, number in footnotes.items()),
        *(f"{table}: {source}" for table, source in sources.items() if table not in source),
        *[f"Nothing published for {', '.join(nothing)}."] * bool(nothing),
        *[f"Failed, nothing to compare: {', '.join(failed)}."] * bool(failed),
    ]
