"""What stands below a table and above it in a report: the facts for page/notes.txt and page/warnings.txt."""

from collections import Counter, defaultdict
from collections.abc import Mapping
from typing import Any

from launchers.results.frame import Summary, first_line, is_transductive
from launchers.results.writers import render
from launchers.rows import Row
from merging.needs import LABELS


def notes(summary: Summary, best: str = "bold") -> list[str]:
    """What a reader must know to trust the table, a sentence or two each; `best` is how the best score is printed."""
    runs = _runs(summary)
    scored = [(label, row) for label, row in runs if row.status == "ok"]
    adapted: dict[tuple[str, bool, bool], list[str]] = defaultdict(list)
    scales: dict[str, list[str]] = defaultdict(list)
    for label, row in scored:
        if row.adaptation != "none" and row.method != "multitask":
            learned = (who for who in row.opened.get(row.adaptation, ()) if who.startswith(("method=", "router=")))
            with_labels = any(who.endswith(LABELS) for who in learned)
            adapted[row.adaptation, is_transductive(row), with_labels].append(label)
        if (source := scale_source(row)) != "-":
            scales[source].append(label)
    plain = {*summary.metrics.values()} <= {"accuracy"}
    metrics = ", ".join(f"{task}: {metric}" for task, metric in summary.metrics.items())
    twice = max(Counter((label, row.seed) for label, row in scored).values(), default=0) > 1
    return _lines(
        "notes.txt", summary=summary, scored=summary.scored, runs=runs, splits=_splits(summary), twice=twice,
        what="Accuracy" if plain else f"Scores ({metrics})", unit="accuracy" if plain else "score",
        undefined=_undefined(summary), scales=scales, at_end=[label for label, row in scored if _at_end(row)],
        adapted=sorted(adapted.items()), origins=_origins(summary), first_line=first_line, best=best,
    )  # fmt: skip


def warnings(summary: Summary) -> list[str]:
    """What makes lines of one table doubtful to compare, or worth a second look."""
    return _lines("warnings.txt", summary=summary, origins=_origins(summary), mixed=_mixed(summary))


def _lines(template: str, **facts: Any) -> list[str]:
    return [line for line in render(template, **facts).splitlines() if line]


def _runs(summary: Summary) -> list[tuple[str, Row]]:
    """Every run with the name of its line."""
    return [(line.label, row) for line in summary.lines.itertuples() for row in line.rows]


def _origins(summary: Summary) -> dict[str, list[str]]:
    """The code versions and families of the rows, where they are several."""
    origins = {"code versions": {row.code for row in summary.rows}, "families": {row.family for row in summary.rows}}
    return {name: sorted(values) for name, values in origins.items() if len(values) > 1}


def _undefined(summary: Summary) -> list[str]:
    """Tasks that no normalised mean contains although others are there."""
    scored = summary.scored[summary.scored["norm"].notna()]
    return [task for task in summary.tasks if len(scored) and scored[f"norm {task}"].isna().all()]


def _mixed(summary: Summary) -> list[str]:
    """Tasks that not all rows were scored on the same samples of."""
    return [task for task in summary.tasks
            if len({str(row.splits[task]) for row in summary.rows if task in row.splits}) > 1]  # fmt: skip


def _splits(summary: Summary) -> str:
    """What was scored: "the test split (400 samples a task, digits 397)"."""
    splits = [(task, row.splits[task]) for task in summary.tasks for row in summary.rows if task in row.splits]
    names = sorted({str(split.get("name")) for _, split in splits})
    text = f"the {' and '.join(names) or 'unknown'} split"
    if sizes := {task: split["size"] for task, split in splits if split.get("size") is not None}:
        ((common, _),) = Counter(sizes.values()).most_common(1)
        odd = [f"{task} {size}" for task, size in sizes.items() if size != common]
        text += f" ({', '.join([f'{common} samples a task', *odd])})"
    mixed = _mixed(summary)
    return text + (f"; rows were scored on different splits of {', '.join(mixed)}" if mixed else "")


def scale_source(row: Row) -> str:
    """Where the scale of a row comes from, in words; "-" for a method without one."""
    kind, _, split = row.scale_source.partition(":")
    return f"picked by {kind} on the {split} split{_searched(row.search)}" if split else kind


def _at_end(row: Row) -> bool:
    """Whether the best of several scales was the least or the greatest, so that a better one may lie beyond."""
    scales = row.search.get("scales", ())
    return len(scales) > 1 and row.scale in (min(scales), max(scales))


def _searched(search: Mapping[str, Any]) -> str:
    """By what a search chose, and among what; nothing for a row of an older version."""
    if not search:
        return ""
    scales, scored = search["scales"], search["scored"]
    what = {"norm": "best norm", "mean": "best mean"}.get(search["criterion"], search["criterion"])
    among = f"{len(scales)} scales from {min(scales):.3g} to {max(scales):.3g}"
    return f" ({what} of {among})" if scored == len(scales) else f" ({what} of {scored} scored of {among}: not of all)"
