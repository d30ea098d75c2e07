"""What stands below a table and above it in a report: the facts for page/notes.txt and page/warnings.txt."""

import re
from collections import Counter, defaultdict
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from launchers.results.frame import Summary, first_line, is_transductive
from launchers.results.writers import render
from launchers.rows import Row

if TYPE_CHECKING:
    from pandas import DataFrame

FEW = 12  # lines whose names `numbered` notes repeat; of longer tables they give the numbers


def notes(summary: Summary) -> list[str]:
    """What a reader must know to trust the table, a sentence or two each."""
    scored = _runs(summary.scored)
    adapted: dict[tuple[str, bool], list[str]] = defaultdict(list)
    scales: dict[str, list[str]] = defaultdict(list)
    for label, row in scored:
        if row.adaptation != "none" and row.method != "multitask":
            adapted[row.adaptation, is_transductive(row)].append(label)
        if (source := scale_source(row)) != "-":
            scales[source].append(label)
    metrics = summary.metrics
    plain = {*metrics.values()} <= {"accuracy"}
    listed = ", ".join(f"{task}: {metric}" for task, metric in metrics.items())
    text = render(
        "notes.txt", summary=summary, scored=summary.scored, runs=_runs(summary.lines), splits=_splits(summary),
        what="Accuracy" if plain else f"Scores ({listed})", unit="accuracy" if plain else "score",
        undefined=_undefined(summary), scales=scales, adapted=sorted(adapted.items()), origins=_origins(summary),
        twice=max(Counter((label, row.seed) for label, row in scored).values(), default=0) > 1, first_line=first_line,
    )  # fmt: skip
    return [line for line in text.splitlines() if line]


def numbered(summary: Summary) -> list[str]:
    """The same; below a long table with the numbers of lines in place of their names, without routing accuracies."""
    if len(summary.lines) <= FEW:
        return notes(summary)
    lines = summary.lines.assign(label=[f"#{number}" for number in summary.lines.index], routing_accuracy=float("nan"))
    repeated = notes(Summary(summary.suite, summary.tasks, summary.unseen, lines))
    return [re.sub(r"#\d+(, #\d+)*", lambda listed: _ranges(listed[0]), note) for note in repeated]


def _ranges(listed: str) -> str:
    """ "#1, #2, #3, #5" is "lines 1-3, 5"."""
    runs: list[list[str]] = []
    for number in re.findall(r"\d+", listed):
        if runs and int(number) == int(runs[-1][-1]) + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    joined = ", ".join("-".join(dict.fromkeys((run[0], run[-1]))) for run in runs)
    return f"{'lines' if ',' in listed else 'line'} {joined}"


def warnings(summary: Summary) -> list[str]:
    """What makes lines of one table doubtful to compare, or worth a second look."""
    rows = summary.rows
    mixed = [task for task in summary.tasks if len({str(row.splits[task]) for row in rows if task in row.splits}) > 1]
    text = render("warnings.txt", summary=summary, origins=_origins(summary), mixed=mixed)
    return [line for line in text.splitlines() if line]


def _runs(lines: "DataFrame") -> list[tuple[str, Row]]:
    """Every run with the name of its line."""
    return [(line.label, row) for line in lines.itertuples() for row in line.rows]


def _origins(summary: Summary) -> list[tuple[str, list[str]]]:
    """The code versions and families of the rows, where they are several."""
    seen = {what: sorted({getattr(row, name) for row in summary.rows})
            for what, name in (("code versions", "code"), ("families", "family"))}  # fmt: skip
    return [(what, values) for what, values in seen.items() if len(values) > 1]


def _undefined(summary: Summary) -> list[str]:
    """Tasks that no normalised mean contains although others are there."""
    scored = summary.scored[summary.scored["norm"].notna()]
    return [task for task in summary.tasks if len(scored) and scored[f"norm {task}"].isna().all()]


def _splits(summary: Summary) -> str:
    splits = [(task, row.splits[task]) for task in summary.tasks for row in summary.rows if task in row.splits]
    names = sorted({str(split.get("name")) for _, split in splits})
    text = f"the {' and '.join(names) or 'unknown'} split"
    sizes = {task: split["size"] for task, split in splits if split.get("size") is not None}
    if sizes:
        ((common, _),) = Counter(sizes.values()).most_common(1)
        odd = [f"{task} {size}" for task, size in sizes.items() if size != common]
        text += f" ({', '.join([f'{common} images a task', *odd])})"
    unlike = {(task, *(split.get(name) for name in ("name", "size", "id"))) for task, split in splits}
    mixed = [task for task, count in Counter(task for task, *_ in unlike).items() if count > 1]
    ordered = [task for task in summary.tasks if task in mixed]
    return text + (f"; rows were scored on different splits of {', '.join(ordered)}" if mixed else "")


def scale_source(row: Row) -> str:
    """Where the scale of a row comes from, in words; "-" for a method without one."""
    kind, _, split = row.scale_source.partition(":")
    return f"picked by {kind} on the {split} split{_searched(row.search)}" if split else kind


def _searched(search: Mapping[str, Any]) -> str:
    """By what a search chose, and among what; nothing for a row of an older version."""
    if not search:
        return ""
    scales, scored = search["scales"], search["scored"]
    what = {"norm": "best norm", "mean": "best mean"}.get(search["criterion"], search["criterion"])
    among = f"{len(scales)} scales from {min(scales):.3g} to {max(scales):.3g}"
    return f" ({what} of {among})" if scored == len(scales) else f" ({what} of {scored} scored of {among}: not of all)"
