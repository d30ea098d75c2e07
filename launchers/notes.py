"""What stands below a table: units, split and sizes, where scales came from, failures, mixed origins."""

from collections import Counter, defaultdict
from collections.abc import Sequence

from launchers.rows import Row
from launchers.summary import Line, Summary


def notes(summary: Summary) -> list[str]:
    """What a reader must know to trust the table, a sentence or two each."""
    rows = [row for line in summary.lines for row in line.rows]
    said = [
        f"Accuracy in percent on {_splits(rows, summary.tasks)}.",
        "norm: mean over tasks of accuracy / expert accuracy, in percent; mean: plain accuracy."
        + _without_expert(summary.lines),
        _scales(summary.lines),
    ]
    if any(len(line.rows) > 1 and not line.failed for line in summary.lines):
        said.append("±: sample standard deviation over n seeds.")
    failures = [(line.label, row) for line in summary.lines if line.failed for row in line.rows]
    said += [f"{label} failed (seed {row.seed}): {first_line(row.error)}" for label, row in failures]
    return said + _mixtures(summary.lines, rows)


def _mixtures(lines: Sequence[Line], rows: Sequence[Row]) -> list[str]:
    said = []
    for what, values in (("code versions", {row.code for row in rows}), ("families", {row.family for row in rows})):
        if len(values) > 1:
            said.append(f"Rows come from different {what}: {', '.join(sorted(values))}.")
    twice = Counter((line.label, row.seed) for line in lines if not line.failed for row in line.rows)
    if any(count > 1 for count in twice.values()):
        said.append("Lines of the same name were merged from different checkpoints.")
    return said


def first_line(error: str | None) -> str:
    """The first line of an error that says something."""
    return next((line.strip() for line in (error or "").splitlines() if line.strip()), "no message")


def _splits(rows: Sequence[Row], tasks: Sequence[str]) -> str:
    seen = {task: {(row.splits[task].get("name"), row.splits[task].get("size"), row.splits[task].get("id"))
                   for row in rows if task in row.splits} for task in tasks}  # fmt: skip
    names = sorted({str(name) for found in seen.values() for name, _, _ in found})
    sizes = [sorted({size for _, size, _ in found if size is not None}) for found in seen.values()]
    text = f"the {' and '.join(names) or 'unknown'} split"
    flat = sorted({size for found in sizes for size in found})
    if len(flat) == 1:
        text += f" ({flat[0]} images a task)"
    elif flat:
        text += f" ({', '.join(f'{task} {max(found)}' for task, found in zip(tasks, sizes, strict=True) if found)})"
    mixed = [task for task, found in seen.items() if len(found) > 1]
    return text + (f"; rows were scored on different splits of {', '.join(mixed)}" if mixed else "")


def _without_expert(lines: Sequence[Line]) -> str:
    bare = any(line.norm is None and not line.failed for line in lines)
    return ' "-": no expert row of the same suite, seed, checkpoints and split.' if bare else ""


def _scales(lines: Sequence[Line]) -> str:
    sources: dict[str, list[str]] = defaultdict(list)
    for line in lines:
        for source in dict.fromkeys(row.scale_source for row in line.rows if not line.failed):
            if source != "-":
                sources[source].append(line.label)
    told = [f"{_source(source)} for {', '.join(labels)}" for source, labels in sources.items()]
    return f"scale: {'; '.join(told) or 'none was chosen'}."


def _source(source: str) -> str:
    kind, _, split = source.partition(":")
    return f"picked by {kind} on the {split} split" if split else kind
