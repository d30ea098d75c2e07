"""What stands below a table (units, splits, where scales came from, what is no fair rival) and above it: warnings."""

import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from launchers.results.frame import Summary, first_line, is_transductive
from launchers.rows import Row

if TYPE_CHECKING:
    from pandas import DataFrame

TOGETHER = {"mixed": "shuffled batch of all tasks", "group": "group of similar images of the whole split"}
UNFAIR = "no fair rival, never bold"
FEW = 12  # lines whose names `numbered` notes repeat; of longer tables they give the numbers


def notes(summary: Summary) -> list[str]:
    """What a reader must know to trust the table, a sentence or two each."""
    scored = summary.scored
    bare = ' "-": no expert row of the same suite, seed, checkpoints and split, or an expert that gets nothing right.'
    bare *= bool(scored["norm"].isna().any())
    said = [
        f"Accuracy in percent on {_splits(summary.rows, summary.tasks)}.",
        f"norm: mean over tasks of accuracy / expert accuracy, in percent; mean: plain accuracy.{bare}",
        _scales(scored),
    ]
    if (scored["n"] > 1).any():
        said.append("±: sample standard deviation over n seeds.")
    if summary.unseen:
        said.append(
            f"unseen: mean accuracy on {', '.join(summary.unseen)}, whose experts are not merged and whose images no "
            "router saw; not in mean and norm. The expert row has their own experts there, if any; "
            '"-": told the true task, for which it has no part.'
        )
    said += _routed(scored)
    said += [f"{label} failed (seed {row.seed}): {first_line(row.error)}"
             for label, row in _runs(summary.lines) if row.status == "error"]  # fmt: skip
    said += sorted({remark for row in summary.rows for remark in row.remarks})
    return [*said, *_mixtures(summary)]


def numbered(summary: Summary) -> list[str]:
    """The same; below a long table with the numbers of lines in place of their names, without routing accuracies."""
    if len(summary.lines) <= FEW:
        return notes(summary)
    lines = summary.lines.assign(label=[f"#{number}" for number in summary.lines.index], routed_right=float("nan"))
    said = notes(Summary(summary.suite, summary.tasks, summary.unseen, lines))
    return [re.sub(r"#\d+(, #\d+)*", lambda listed: _ranges(listed[0]), note) for note in said]


def _ranges(listed: str) -> str:
    """ "#1, #2, #3, #5" is "lines 1-3, 5"."""
    numbers = [int(number) for number in re.findall(r"\d+", listed)]
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    told = ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
    return f"{'line' if len(numbers) == 1 else 'lines'} {told}"


def _routed(scored: "DataFrame") -> list[str]:
    """What must be said as soon as a line depends on the input, or learned from images."""

    def who(chosen: "Any") -> str:
        return ", ".join(scored["label"][chosen])

    kinds = {kind: who(scored["kind"] == kind) for kind in ("oracle", "routed", "multitask")}
    right = scored[scored["routed_right"].notna()]
    dynamic = bool(kinds["oracle"] or kinds["routed"])
    best = "best static and best routed line" if kinds["routed"] else "best static line"
    sentences = {
        f"MACs: work per image relative to the static forward. Bold: {best}.": dynamic and "-",
        f"Told the true task of every image (oracle; {UNFAIR}): {{who}}.": kinds["oracle"],
        f"One set of weights per batch of one task, which tells it ({UNFAIR}): {{who}}.": who(scored["by_batch"]),
        **{f"One set of weights per {what}, so that an image's result depends on the others: {{who}}.":
           who(scored["granularity"] == granularity) for granularity, what in TOGETHER.items()},
        "Routed right (largest weight on the own task), in percent: {who}.":
            ", ".join(f"{line.label} {line.routed_right:.1f}" for line in right.itertuples()),
        "No merge, but trained on the labelled train images of all tasks together: {who}.": kinds["multitask"],
    }  # fmt: skip
    said = [sentence.format(who=names) for sentence, names in sentences.items() if names]
    return [*said, *_adapted(scored), *(
        f"Suspected of collapse: {', '.join(row.collapsed)} in {label} (seed {row.seed})."
        for label, row in _runs(scored) if row.collapsed
    )]  # fmt: skip


def _adapted(scored: "DataFrame") -> list[str]:
    """Who learned from the images of which split."""
    seen: dict[tuple[str, bool], list[str]] = defaultdict(list)
    for label, row in _runs(scored[scored["kind"] != "multitask"]):
        if row.adaptation != "none":
            seen[row.adaptation, is_transductive(row)].append(label)
    return [f"Saw the unlabelled {split} images{f' (transductive; {UNFAIR})' if leaks else ''}: "
            f"{', '.join(dict.fromkeys(names))}." for (split, leaks), names in sorted(seen.items())]  # fmt: skip


def _runs(lines: "DataFrame") -> list[tuple[str, Row]]:
    """Every run with the name of its line."""
    return [(line.label, row) for line in lines.itertuples() for row in line.rows]


def _mixtures(summary: Summary) -> list[str]:
    said = [f"Rows come from different {what}: {', '.join(values)}." for what, values in _origins(summary)]
    twice = Counter((label, row.seed) for label, row in _runs(summary.scored))
    if any(count > 1 for count in twice.values()):
        said.append("Lines of the same name were merged from different checkpoints.")
    return said


def _origins(summary: Summary) -> list[tuple[str, list[str]]]:
    """The code versions and families of the rows, where they are several."""
    seen = {what: sorted({getattr(row, name) for row in summary.rows})
            for what, name in (("code versions", "code"), ("families", "family"))}  # fmt: skip
    return [(what, values) for what, values in seen.items() if len(values) > 1]


def warnings(summary: Summary) -> list[str]:
    """What makes lines of one table doubtful to compare, or worth a second look."""
    said = [f"Rows of this table come from {len(values)} {what}: {', '.join(values[:8])}"
            f"{', ...' * (len(values) > 8)}. Differences between lines need not be the methods'."
            for what, values in _origins(summary)]  # fmt: skip
    rows, lines = summary.rows, summary.lines
    mixed = [task for task in summary.tasks if len({str(row.splits[task]) for row in rows if task in row.splits}) > 1]
    if mixed:
        said.append(f"Rows were scored on different splits of {', '.join(mixed)}.")
    failed = list(lines["label"][lines["kind"] == "failed"])
    if failed:
        said.append(f"{len(failed)} of {len(lines)} lines failed: {', '.join(failed)}. Their errors are below.")
    if collapsed := list(lines["label"][lines["collapsed"].notna()]):
        said.append(f"Gates are suspected of collapse in {', '.join(collapsed)}; the notes name the tasks.")
    return said


def _splits(rows: Sequence[Row], tasks: Sequence[str]) -> str:
    seen = {task: {(row.splits[task].get("name"), row.splits[task].get("size"), row.splits[task].get("id"))
                   for row in rows if task in row.splits} for task in tasks}  # fmt: skip
    names = sorted({str(name) for splits in seen.values() for name, _, _ in splits})
    text = f"the {' and '.join(names) or 'unknown'} split"
    sizes = {task: [size for _, size, _ in splits if size is not None] for task, splits in seen.items()}
    known = {task: max(found) for task, found in sizes.items() if found}
    if known:
        ((common, _),) = Counter(known.values()).most_common(1)
        odd = [f"{task} {size}" for task, size in known.items() if size != common]
        text += f" ({', '.join([f'{common} images a task', *odd])})"
    mixed = [task for task, splits in seen.items() if len(splits) > 1]
    return text + (f"; rows were scored on different splits of {', '.join(mixed)}" if mixed else "")


def _scales(scored: "DataFrame") -> str:
    sources: dict[str, list[str]] = defaultdict(list)
    for label, row in _runs(scored):
        if (source := scale_source(row)) != "-":
            sources[source].append(label)
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
