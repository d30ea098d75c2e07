"""Figures made of coloured cells: methods x tasks, energy captured per layer."""

import re
from collections.abc import Collection, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from launchers.results.frame import Line, Summary, Value
from launchers.results.notes import first_line
from launchers.results.plots import COLOURS, SPAN, ink
from launchers.results.report.style import MISSING, PAGE, TEXT, Drawn, named, styled

NAMES = 1.9  # inches for the names of lines
ROW = 0.2  # inches a line is high
WIDEST = 0.55  # inches a cell is wide at most
LONG = 25  # lines from which on columns are named at both ends
COLUMNS = 24  # of the map of energies at most
OUTSIDE = "other"  # column of what lies in no layer
READABLE = 0.2  # narrower cells carry no number


@styled
def score_map(summary: Summary) -> Drawn:
    """Methods x tasks: percent of the expert, plain accuracy where a line has no expert."""
    scored = [line for line in summary.lines if not line.failed]
    relative = bool(scored) and all(line.normalised for line in scored)
    only_experts = all(line.kind == "expert" for line in summary.lines)
    lines = [line for line in summary.lines if not relative or only_experts or line.kind != "expert"]
    columns = [*summary.tasks, "norm" if relative else "mean"]
    values = np.array([_shares(line, summary.tasks, relative) for line in lines])
    figure, ax = cells(values, [named(summary, line) for line in lines], columns, SPAN, 1)
    if len(lines) > LONG:
        top = ax.secondary_xaxis("top")
        top.set_xticks(ax.get_xticks(), columns, rotation=40, ha="left", rotation_mode="anchor")
        top.tick_params(length=0)
        top.spines[:].set_visible(False)
    for index, line in enumerate(lines):
        if line.failed:
            _strike(ax, index, len(columns), f"failed: {first_line(line.rows[0].error)}")
    ax.set_xlabel("task; last the mean over tasks", loc="left")
    unit = "accuracy, % of the expert's" if relative else "accuracy, %"
    return Drawn("heatmap", f"Methods x tasks: {unit}", figure, "One line a method, mean over its seeds.", PAGE)


def _shares(line: Line, tasks: Sequence[str], relative: bool) -> list[float]:
    shares = line.normalised if relative else line.accuracy
    values: list[Value | None] = [*(shares.get(task) for task in tasks), line.norm if relative else line.mean]
    return [np.nan if value is None else 100 * value.mean for value in values]


def cells(
    values: np.ndarray, lines: Sequence[str], columns: Sequence[str], span: float, digits: int
) -> tuple[Figure, Axes]:
    """A page-wide map; colours cover at least `span` percent, and numbers are left out where they do not fit."""
    wide = min(WIDEST, (PAGE - NAMES) / len(columns))
    slanted = 0.045 * max(map(len, columns))  # inches that the names of columns take
    figure = Figure(figsize=(PAGE, 0.5 + slanted + ROW * len(lines)), layout="constrained")
    ax = figure.subplots()
    known = values[np.isfinite(values)]
    lowest, highest = (known.min(), known.max()) if known.size else (0, 100)
    scale = Normalize(lowest, max(highest, lowest + span))
    paint(ax, values, scale, digits if wide >= READABLE else None, TEXT if wide > 0.33 else TEXT - 2)
    ax.set_xticks(np.arange(len(columns)) + 0.5, columns, rotation=40, ha="right", rotation_mode="anchor")
    ax.set_yticks(np.arange(len(lines)) + 0.5, lines)
    ax.set_xlim(0, max(len(columns), (PAGE - NAMES) / WIDEST))  # few columns do not become bars
    if wide < READABLE:
        figure.colorbar(ax.collections[0], ax=ax, label="%", shrink=0.6)
    return figure, ax


def paint(ax: Axes, values: np.ndarray, scale: Normalize, digits: int | None, size: float) -> None:
    """Coloured cells, from the top left, with numbers of so many digits; None for none."""
    ax.pcolormesh(np.ma.masked_invalid(values), cmap=COLOURS, norm=scale, edgecolors=MISSING, linewidth=0.8)
    for row, column in np.ndindex(values.shape) if digits is not None else ():
        number = values[row, column]
        if np.isfinite(number):
            colour = ink(COLOURS(scale(number)))
            ax.text(column + 0.5, row + 0.5, f"{number:.{digits}f}", color=colour, ha="center", va="center", size=size,
                    in_layout=False)  # fmt: skip
    ax.set_ylim(len(values), 0)
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)


def _strike(ax: Axes, row: int, columns: int, text: str) -> None:
    room = 14 * columns
    shown = text if len(text) <= room else text[: room - 3] + "..."
    ax.text(0.1, row + 0.5, shown, va="center", style="italic")


@styled
def energy_map(summary: Summary) -> Drawn | None:
    """Per layer, the share of the task vectors' energy that the routed parts hold; None where no row knows it."""
    known = _unlike(summary)
    parts = _parts(list(dict.fromkeys(key for line, _ in known for row in line.rows for key in row.energy)))
    if not parts:
        return None
    values = np.array([[_captured(line, keys) for keys in parts.values()] for line, _ in known])
    names = [named(summary, line, f" (+{more})" if more else "") for line, more in known]
    figure, ax = cells(values, names, list(parts), SPAN, 0)
    ax.set_xlabel("layer and what in it", loc="left")
    told = "Share of the squared norm of the task vectors, mean over tasks, seeds and a layer's matrices."
    told += " (+n): n more lines hold the same parts." if any(more for _, more in known) else ""
    return Drawn("energy", "Energy captured per layer, %", figure, told, PAGE)


def _unlike(summary: Summary) -> list[tuple[Line, int]]:
    """Lines with energies, one of those that hold the same parts under other gates, and how many more there are."""
    found: dict[str, list[Line]] = {}
    for line in summary.lines:
        if line.energy is not None:
            found.setdefault(str([row.energy for row in line.rows]), []).append(line)
    return [(lines[0], len(lines) - 1) for lines in found.values()]


def _captured(line: Line, keys: Collection[str]) -> float:
    shares = [share for row in line.rows for key in keys for share in row.energy.get(key, ())]
    return 100 * float(np.mean(shares)) if shares else np.nan


def _parts(keys: Sequence[str]) -> dict[str, list[str]]:
    """Parameters by their column: one a matrix while those fit, else one a kind of matrix, else one a layer."""
    found: dict[str, list[str]] = {}
    for cut in (None, 1, 0):
        found = {}
        for key in keys:
            found.setdefault(_column(key, cut), []).append(key)
        if len(found) <= COLUMNS:
            break
    return dict(sorted(found.items(), key=lambda each: each[0] == OUTSIDE))


def _column(key: str, cut: int | None) -> str:
    """ "visual.transformer.resblocks.3.mlp.c_fc.weight" is "3 mlp.c_fc", or with one name behind the layer "3 mlp"."""
    inside = re.search(r"\.(\d+)\.(.+)", key)
    if inside is None:
        return key.removesuffix(".weight") if cut is None else OUTSIDE
    return " ".join([inside[1], ".".join(inside[2].removesuffix(".weight").split(".")[:cut])]).strip()
