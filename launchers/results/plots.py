"""Rows as a picture: a heat map of methods x tasks."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from textwrap import fill
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from launchers.results.frame import Line, Summary, Value, summarise
from launchers.results.notes import first_line
from launchers.rows import Row
from merging.errors import UserError
from merging.files import write_atomically

COLOURS = colormaps["cividis"]  # reads the same with every common colour vision, and in grey
GAP = 0.25  # between the tasks and their mean and between kinds of lines, in cells
SPAN = 10  # percent the colours cover at least, so that noise does not look like a difference
MARKED = {"routed": "routed\nper input", "oracle": "told the\ntrue task"}  # kinds of lines that are named at the side
DARK, LIGHT, EMPTY = "#000000", "#ffffff", "#e4e4e4"


def heatmap(rows: Iterable[Row], path: str | Path) -> Path:
    """Draw methods x tasks as a PNG, one panel a suite: percent of the expert, plain accuracy without expert rows.

    Raises UserError when there is no row or the file cannot be written.
    """
    summaries = summarise(rows)
    if not summaries:
        raise UserError(f"There is nothing to draw in {path}: no rows were given. Run a method first.")
    heights = [1.1 + 0.4 * _tops(_shown(summary)[0])[-1] for summary in summaries]
    width = 2.6 + 0.82 * (max(len(summary.tasks) for summary in summaries) + 1 + GAP)
    figure = Figure(figsize=(width, sum(heights)), layout="constrained")
    axes = figure.subplots(len(summaries), 1, squeeze=False, height_ratios=heights)[:, 0]
    for summary, ax in zip(summaries, axes, strict=True):
        _panel(ax, summary)
    return write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=160))


def _shown(summary: Summary) -> tuple[list[Line], bool]:
    """The lines of a panel and whether they are normalised: then the expert is the unit and needs no line."""
    scored = [line for line in summary.lines if not line.failed]
    relative = bool(scored) and all(line.normalised for line in scored)
    drop = relative and any(line.rows[0].method != "expert" for line in summary.lines)
    return [line for line in summary.lines if not (drop and line.rows[0].method == "expert")], relative


def _panel(ax: Axes, summary: Summary) -> None:
    lines, relative = _shown(summary)
    values = np.array([_percents(line, summary.tasks, relative) for line in lines])
    lefts = [*range(len(summary.tasks)), len(summary.tasks) + GAP]
    known = values[np.isfinite(values)]
    lowest, highest = (known.min(), known.max()) if known.size else (0, 100)
    scale = Normalize(lowest, max(highest, lowest + SPAN))
    tops = _tops(lines)
    for top, line, numbers in zip(tops, lines, values, strict=False):
        if line.failed:
            _bar(ax, top, lefts[-1] + 1, f"failed: {first_line(line.rows[0].error)}")
            continue
        for left, number in zip(lefts, numbers, strict=True):
            _cell(ax, left, top, number, COLOURS(scale(number)))
    _frame(ax, summary, lines, lefts, relative)
    if {line.kind for line in lines} & {"routed", "oracle"}:
        _name_kinds(ax, lines, tops, lefts[-1] + 1)


def _tops(lines: Sequence[Line]) -> list[float]:
    """Where each line begins, and the end of the last: lines of unlike kind stand apart."""
    tops = [0.0]
    for line, following in zip(lines, [*lines[1:], None], strict=True):
        apart = following is not None and line.kind != following.kind and {line.kind, following.kind} & MARKED.keys()
        tops.append(tops[-1] + 1 + GAP * bool(apart))
    return tops


def _name_kinds(ax: Axes, lines: Sequence[Line], tops: Sequence[float], right: float) -> None:
    """Beside routed and oracle lines what they are."""
    for kind, name in MARKED.items():
        members = [top for line, top in zip(lines, tops, strict=False) if line.kind == kind]
        if members:
            middle = (members[0] + members[-1] + 1) / 2
            ax.text(right + 0.1, middle, name, va="center", fontsize=8, style="italic")


def _percents(line: Line, tasks: Sequence[str], relative: bool) -> list[float]:
    """Percent per task and, last, their mean; NaN where a failed line has none."""
    shares = line.normalised if relative else line.accuracy
    values: list[Value | None] = [*(shares.get(task) for task in tasks), line.norm if relative else line.mean]
    return [np.nan if value is None else 100 * value.mean for value in values]


def _cell(ax: Axes, left: float, top: float, number: float, colour: tuple[Any, ...]) -> None:
    ax.add_patch(Rectangle((left, top), 1, 1, facecolor=colour, edgecolor="white", linewidth=1.5))
    ax.text(left + 0.5, top + 0.5, f"{number:.1f}", color=ink(colour), ha="center", va="center", fontsize=9)


def ink(colour: Any) -> str:
    """Black or white, whichever contrasts more with a colour."""
    luminance = np.dot(np.array(colour[:3]) ** 2.2, (0.2126, 0.7152, 0.0722))
    return DARK if luminance > 0.18 else LIGHT  # where both contrast equally


def _bar(ax: Axes, top: float, right: float, text: str) -> None:
    ax.add_patch(Rectangle((0, top), right, 1, facecolor=EMPTY, edgecolor="white", linewidth=1.5))
    room = int(right * 10)
    text = text if len(text) <= room else text[: room - 3] + "..."
    ax.text(right / 2, top + 0.5, text, color=DARK, ha="center", va="center", fontsize=9, style="italic")


def _frame(ax: Axes, summary: Summary, lines: Sequence[Line], lefts: Sequence[float], relative: bool) -> None:
    """Names on the axes; under a task of a normalised panel the accuracy that counts as 100."""
    experts = [line for line in summary.lines if line.rows[0].method == "expert" and not line.failed]
    units = [""] * len(lefts)
    if relative and len(experts) == 1 and experts[0].mean:
        ends = [*(experts[0].accuracy[task] for task in summary.tasks), experts[0].mean]
        units = [f"\nexpert {100 * value.mean:.1f}" for value in ends]
    names = [name.replace("_", "\n").replace("-", "\n") for name in [*summary.tasks, "mean"]]
    tops = _tops(lines)
    ax.set(xlim=(0, lefts[-1] + 1), ylim=(tops[-1], 0))
    ax.set_xticks([left + 0.5 for left in lefts], [a + b for a, b in zip(names, units, strict=True)], fontsize=8)
    ax.set_yticks([top + 0.5 for top in tops[:-1]], [fill(line.label, 28) for line in lines], fontsize=9)
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    unit = "accuracy in percent of the expert's" if relative else "accuracy in percent"
    ax.set_title(f"{summary.suite}: {unit}", fontsize=11, loc="left")
