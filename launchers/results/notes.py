"""What stands below a table: units, split and sizes, where scales came from, failures, mixed origins."""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from launchers.results.frame import Line, Summary, is_transductive
from launchers.rows import Row

TOGETHER = {"mixed": "shuffled batch of all tasks", "group": "group of similar images of the whole split"}


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
    if summary.unseen:
        said.append(
            f"unseen: mean accuracy on {', '.join(summary.unseen)}, whose experts are not merged and whose images no "
            "router saw; not in mean and norm. The expert row has their own experts there, if any; "
            '"-": told the true task, for which it has no part.'
        )
    said += _routed(summary.lines)
    failures = [(line.label, row) for line in summary.lines if line.failed for row in line.rows]
    said += [f"{label} failed (seed {row.seed}): {first_line(row.error)}" for label, row in failures]
    said += sorted({remark for row in rows for remark in row.remarks})
    return said + _mixtures(summary.lines, rows)


def _routed(lines: Sequence[Line]) -> list[str]:
    """What must be said as soon as a line depends on the input, or learned from images."""
    scored = [line for line in lines if not line.failed]
    oracle, routed = ([line.label for line in scored if line.kind == kind] for kind in ("oracle", "routed"))
    said = []
    if oracle or routed:
        apart = " Bold: best static and best routed line." if routed else " Bold: best static line."
        said.append("MACs: work per image relative to the static forward." + apart)
    if oracle:
        said.append(f"Told the true task of every image (oracle; no fair rival, never bold): {', '.join(oracle)}.")
    if batches := [line.label for line in scored if line.by_batch]:
        who = ", ".join(batches)
        said.append(f"One set of weights per batch of one task, which tells it (no fair rival, never bold): {who}.")
    for granularity, what in TOGETHER.items():
        if who := ", ".join(line.label for line in scored if line.rows[0].granularity == granularity):
            said.append(f"One set of weights per {what}, so that an image's result depends on the others: {who}.")
    if right := [f"{line.label} {100 * line.routed_right.mean:.1f}" for line in scored if line.routed_right]:
        said.append(f"Routed right (largest weight on the own task), in percent: {', '.join(right)}.")
    if trained := [line.label for line in scored if line.kind == "multitask"]:
        said.append(f"No merge, but trained on the labelled train images of all tasks together: {', '.join(trained)}.")
    adapted = [(row.adaptation, is_transductive(row), line.label) for line in scored if line.kind != "multitask"
               for row in line.rows]  # fmt: skip
    for split, leaks in sorted({(split, leaks) for split, leaks, _ in adapted if split != "none"}):
        who = ", ".join(dict.fromkeys(label for *seen, label in adapted if seen == [split, leaks]))
        kind = " (transductive; no fair rival, never bold)" if leaks else ""
        said.append(f"Saw the unlabelled {split} images{kind}: {who}.")
    return said + [
        f"Suspected of collapse: {', '.join(row.collapsed)} in {line.label} (seed {row.seed})."
        for line in scored for row in line.rows if row.collapsed
    ]  # fmt: skip


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
    text = f"the {' and '.join(names) or 'unknown'} split"
    sizes = {task: [size for _, size, _ in found if size is not None] for task, found in seen.items()}
    known = {task: max(found) for task, found in sizes.items() if found}
    if known:
        ((common, _),) = Counter(known.values()).most_common(1)
        odd = [f"{task} {size}" for task, size in known.items() if size != common]
        text += f" ({', '.join([f'{common} images a task', *odd])})"
    mixed = [task for task, found in seen.items() if len(found) > 1]
    return text + (f"; rows were scored on different splits of {', '.join(mixed)}" if mixed else "")


def _without_expert(lines: Sequence[Line]) -> str:
    bare = any(line.norm is None and not line.failed for line in lines)
    why = "no expert row of the same suite, seed, checkpoints and split, or an expert that gets nothing right"
    return f' "-": {why}.' if bare else ""


def _scales(lines: Sequence[Line]) -> str:
    sources: dict[str, list[str]] = defaultdict(list)
    for line in lines:
        for source in dict.fromkeys(scale_source(row) for row in line.rows if not line.failed):
            if source != "-":
                sources[source].append(line.label)
    told = [f"{source} for {', '.join(dict.fromkeys(names))}" for source, names in sources.items()]
    return f"scale: {'; '.join(told) or 'none was chosen'}."


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
