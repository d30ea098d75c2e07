"""The lines of a suite as a table: which columns it has, and what its cells say."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

from launchers.results.frame import COMPETE, REFERENCES, Summary, summarise
from launchers.results.notes import notes
from launchers.results.writers import Cell, Column, Sheet
from launchers.rows import Row

if TYPE_CHECKING:
    from pandas import DataFrame, Series

FIRST = ("suite", "label", "status", "n")  # columns of CSV
INSIDE = ("method", "kind", "rows", "transductive", "by_batch", "fair", "scale_range", "work", "seconds",
          "ready_seconds", "unseen", "unseen sd")  # fmt: skip


class Fact(NamedTuple):
    """A column behind the scores. It is left out where no merge has anything but `dull` there."""

    header: str
    name: str  # of the column of Summary.lines
    form: str = "{}"
    unit: float = 1
    dull: tuple[str, ...] = ()
    wide: bool = False  # only where there is room


FACTS = (
    Fact("scale", "scale_range"),
    Fact("needs", "needs"),
    Fact("router", "router", dull=("none",)),
    Fact("granularity", "granularity", dull=("none",), wide=True),
    Fact("adapt", "adaptation", dull=("none", "calibration")),
    Fact("MB", "stored_bytes", "{:.1f}", 1e6),
    Fact("MMACs", "macs", "{:.1f}", 1e6, wide=True),
    Fact("MACs", "work", "x{:.2f}", dull=("x1.00", "-")),
    Fact("merge s", "merge_seconds", "{:.2f}"),
    Fact("router s", "router_seconds", "{:.2f}", dull=("-",)),
    Fact("total s", "seconds", "{:.1f}", wide=True),
)


def sheets(rows: Iterable[Row], by_needs: bool = False) -> list[Sheet]:
    """Every suite of `rows` as a formatted table with its notes; references are grey. by_needs: see summarise."""
    return [
        Sheet(summary.title, columns(summary), notes(summary), references(summary.lines), frozenset(summary.breaks))
        for summary in summarise(rows, by_needs)
    ]


def references(lines: "DataFrame") -> frozenset[int]:
    """The positions of lines that are no merges."""
    return frozenset(position for position, kind in enumerate(lines["kind"]) if kind in REFERENCES)


def columns(summary: Summary, wide: bool = False) -> list[Column]:
    """The printed columns, scores in percent, the best of each kind in COMPETE in bold.

    `wide` adds what a page has room for: kind, routing accuracy, energy, granularity, all work and all time.
    """
    lines = summary.lines
    named = {task: "" if metric == "accuracy" else f" ({metric})" for task, metric in summary.metrics.items()}
    scores = {f"{task}{named.get(task, '')}": f"task {task}" for task in summary.tasks}
    scores |= {f"{task} unseen": f"unseen {task}" for task in summary.unseen}
    scores |= {name: name for name in ("mean", "norm", *["unseen"] * bool(summary.unseen))}
    more = {"probe": "probe"} | ({"routing accuracy": "routing_accuracy", "energy kept": "energy"} if wide else {})
    return [
        _plain("method", lines["label"]),
        *([_plain("kind", lines["kind"])] if wide else []),
        *([_plain("n", lines["n"])] if (lines["n"] > 1).any() else []),
        *(_percents(header, name, lines) for header, name in scores.items()),
        *(_percents(header, name, lines, best=False) for header, name in more.items() if lines[name].notna().any()),
        *_facts(lines, wide),
    ]


def _plain(header: str, values: Iterable[Any]) -> Column:
    return Column(header, tuple(Cell(str(value)) for value in values))


def _facts(lines: "DataFrame", wide: bool) -> list[Column]:
    merges = ~lines["kind"].isin([*REFERENCES, "failed"])
    shown = []
    for fact in FACTS:
        texts = lines[fact.name].map(lambda value, fact=fact: _printed(value, fact))
        texts = texts.mask(lines["kind"] == "failed", "-")
        if (wide or not fact.wide) and not (fact.dull and texts[merges].isin(fact.dull).all()):
            shown.append(_plain(fact.header, texts))
    return shown


def _printed(value: Any, fact: Fact) -> str:
    if value is None or value != value:  # NaN is no equal of itself
        return "-"
    return value if isinstance(value, str) else fact.form.format(value / fact.unit)


def _percents(header: str, name: str, lines: "DataFrame", best: bool = True) -> Column:
    texts = lines[name].map("{:.1f}".format).replace("nan", "-")
    deviations = lines[f"{name} sd"].map("±{:.1f}".format).replace("±nan", "")
    rivals = [texts[(lines["kind"] == kind) & lines["fair"]] for kind in COMPETE if best]
    bold = {number for kind in rivals for number in _best(kind)}
    if header == "mean":
        texts = texts.mask(lines["kind"] == "failed", "failed")
    return Column(header, tuple(Cell(texts[number], deviations[number], number in bold) for number in lines.index))


def _best(texts: "Series") -> list[int]:
    """The lines that print the highest number; none where a line has no rival."""
    numbers = texts[texts != "-"].astype(float)
    return list(numbers.index[numbers == numbers.max()]) if len(texts) > 1 else []


def records(rows: Iterable[Row]) -> "DataFrame":
    """The lines of all tables as one frame of numbers and text: what CSV and the experiment tracker get."""
    from pandas import DataFrame, concat

    return concat([DataFrame(), *map(_record, summarise(rows))], ignore_index=True)


def _record(summary: Summary) -> "DataFrame":
    lines = summary.lines
    tasks, unseen = ([f"{kind} {task}" for task in names]
                     for kind, names in (("task", summary.tasks), ("unseen", summary.unseen)))  # fmt: skip
    scores = [name for quantity in (*tasks, "mean", "norm", *unseen) for name in (quantity, f"{quantity} sd")]
    normalised = {f"norm {task}{more}" for task in summary.tasks for more in ("", " sd")}  # their mean is shown
    facts = [name for name in lines if name not in {*INSIDE, *FIRST, *scores, *normalised}]
    frame = lines[[*FIRST, *scores, *facts]]
    return frame.rename(columns=lambda name: "method" if name == "label" else name.removeprefix("task "))
