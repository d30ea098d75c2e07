"""The figure that an experiment declares (`plot:` in conf/experiment), drawn from any rows that fill its axes."""

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import starmap
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import yaml

import conf
from launchers.results.frame import REFERENCES, Summary
from launchers.results.labels import Identity, identity, labels
from launchers.rows import first_problem
from merging.errors import UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame

    from launchers.results.style import Drawn

FOLLOWS = ("row.needs", "row.router", "row.granularity")  # what rows say of the choice of a router
BATCH = "engine.batch"  # named by rows for gates that see a batch alone
OF_TASKS = ("suite.tasks", "suite.sources", "order", "orders", "count")  # what differs between sets of tasks
X = {"stored_mb": "stored, MB (base included)", "tasks": "number of tasks"}  # what is no option
MOST = 6  # curves, or groups of bars, in a figure
OVER_X = ("curve", "grid", "bars")


@dataclass(frozen=True)
class Plot:
    """What is drawn: lines alike in everything but the options of x, hue, facet and along make one figure.

    x: an option such as method.keep, "stored_mb", or "tasks" (how many were merged; sets of as many are averaged).
    y: a panel each of score (norm, without experts mean), routing_accuracy, energy.
    hue: options, or parts such as method, that tell curves apart or make the rows of a grid.
    facet: an option whose values have a panel each. along: the option along which a curve is joined, if it is not x.
    costs: of pareto, a figure each of score against bytes, macs, seconds of merging.
    """

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    kind: Literal["curve", "grid", "bars", "scores", "levels", "pareto"]
    x: str = ""
    y: tuple[str, ...] = ("score",)
    hue: tuple[str, ...] = ()
    facet: str = ""
    along: str = ""
    costs: tuple[Literal["bytes", "macs", "seconds"], ...] = ("bytes",)

    def __post_init__(self) -> None:
        if not self.x and self.kind in OVER_X:
            raise ValueError("it has no x, the option that is drawn along the axis")

    @property
    def free(self) -> list[str]:
        """The options that differ within a figure."""
        return [name for name in (self.x, self.along, self.facet, *self.hue) if name]


def declared(text: Any, where: str) -> Plot:
    """The plot of a mapping, or of its YAML. Raises UserError naming `where`."""
    from pydantic import TypeAdapter  # not needed by `duet --help`

    try:
        values = yaml.safe_load(text) if isinstance(text, str) else text
        if not isinstance(values, dict):
            raise ValueError(f"{values} is no mapping")
        values = values | {name: (values[name],) for name in ("y", "hue") if isinstance(values.get(name), str)}
        return TypeAdapter(Plot).validate_python(values)
    except (yaml.YAMLError, ValueError) as error:  # of pydantic too
        raise UserError(
            f"The plot of {where} cannot be drawn: {first_problem(error)}. Write e.g. {{kind: curve, x: method.keep}}."
        ) from error


def of_experiments() -> dict[Plot, str]:
    """The plots of all prepared experiments with the names of those that declare them."""
    names: dict[Plot, list[str]] = defaultdict(list)
    for path in sorted((Path(conf.__path__[0]) / "experiment").glob("*.yaml")):
        if (values := yaml.safe_load(path.read_text("utf-8")).get("plot")) is not None:
            names[declared(values, str(path))].append(path.stem)
    return {plot: ", ".join(listed) for plot, listed in names.items()}


def drawings(plot: Plot, name: str, summaries: Sequence[Summary]) -> list["Drawn"]:
    """The figures that these tables fill, those with the most lines first; none where x has a single value."""
    from launchers.results import curves, heat

    if plot.kind == "scores":
        return [heat.score_map([summary]) for summary in summaries]
    if plot.kind not in OVER_X:
        pairs = ((summary, cost) for summary in summaries for cost in plot.costs)
        made = map(curves.level_figure, summaries) if plot.kind == "levels" else starmap(curves.front_figure, pairs)
        return [drawn for drawn in made if drawn is not None]
    lines = _lines(plot, summaries)
    if not len(lines):
        return []
    by = ["figure", "curve"] if plot.kind == "curve" else ["figure"]
    lines = lines[lines.groupby(by)["at"].transform("nunique") > 1]
    figures = sorted((group for _, group in lines.groupby("figure", sort=False)), key=len, reverse=True)[:MOST]
    return [_drawn(plot, f"plot-{name.partition(',')[0]}{number if len(figures) > 1 else ''}", name, group)
            for number, group in enumerate(figures, 1)]  # fmt: skip


def _lines(plot: Plot, summaries: Sequence[Summary]) -> "DataFrame":
    """The lines that have x and hue: figure and curve (what is the same in each), x, facet, hue, and all quantities."""
    from pandas import DataFrame

    records = []
    for summary in summaries:
        for line in summary.scored.to_dict("records"):
            options = identity(line["rows"][0])
            x = {"stored_mb": line["stored_bytes"] / 1e6, "tasks": len(summary.tasks)}.get(plot.x, options.get(plot.x))
            if x is None and plot.kind == "bars" and (part := _part(options, plot.x)):
                x = json.dumps(part, sort_keys=True)  # methods, routers and such that were chosen by their name
            if not _fits(plot, options, x, line["kind"]):
                continue
            title = line["suite"] if plot.x == "tasks" else summary.title
            curve = _rest(options, [plot.x, plot.along, plot.facet])
            records.append({
                **line, "options": options, "x": x, "at": str(x), "title": title,
                "figure": json.dumps([title, _rest(options, plot.free)], sort_keys=True),
                "curve": json.dumps(curve, sort_keys=True), "facet": str(options.get(plot.facet, "")),
                "hue": ", ".join(str(options.get(name)) for name in plot.hue),
            })  # fmt: skip
    return DataFrame(records)


def _fits(plot: Plot, options: Identity, x: Any, kind: str) -> bool:
    """Whether a line has a place in such a figure: references have one only where tasks are counted."""
    known = x is not None if plot.kind == "bars" else isinstance(x, int | float) and not isinstance(x, bool)
    merge = kind not in REFERENCES or (plot.x == "tasks" and kind == "base")
    rows = plot.kind != "grid" or all(name in options for name in plot.hue)
    return known and merge and rows and (not plot.along or bool(_part(options, plot.along)))


def _part(options: Identity, name: str) -> Identity:
    """An option, or a part of the configuration with all that is in it."""
    return {key: value for key, value in options.items() if f"{key}.".startswith((f"{name}.", f"row.{name}."))}


def _rest(options: Identity, without: Sequence[str]) -> Identity:
    """What is left of an identity, without what follows from the options that may differ."""
    names = [*without, *(OF_TASKS if "tasks" in without else ())]
    left = {*FOLLOWS, *(key for name in names if name for key in _part(options, name))}
    left |= {BATCH} if any(name.startswith("router") for name in without) else set()
    return {key: value for key, value in options.items() if key not in left}


def _drawn(plot: Plot, file: str, name: str, lines: "DataFrame") -> "Drawn":
    from launchers.results.style import Drawn

    score = "norm" if lines["norm"].notna().all() else "mean"
    measures = [score if measure == "score" else measure for measure in plot.y]
    figure = {"curve": _curves, "grid": _grid, "bars": _bars}[plot.kind](plot, lines, measures)
    deviate = lines[[f"{measure} sd" for measure in measures]].notna().any(axis=None)
    many = plot.kind != "grid" and lines["curve"].nunique() > MOST
    caption = " ".join([*["Deviations over seeds."] * bool(deviate),
                        *[f"At most {MOST} {plot.kind}s or groups; the others are in the table."] * many])  # fmt: skip
    title = f"Score {'against' if plot.kind == 'curve' else 'by'} {X.get(plot.x, plot.x)} ({name})"
    return Drawn(file, f"{title}: {lines['title'].iloc[0]}", figure, caption)


def _panels(plot: Plot, lines: "DataFrame") -> list[tuple[str, "DataFrame"]]:
    last = plot.facet.rpartition(".")[2]
    return [(f"{last}={value}" if plot.facet else "", frame) for value, frame in lines.groupby("facet")]


def _curves(plot: Plot, lines: "DataFrame", measures: Sequence[str]) -> "Figure":
    """A curve for all lines that differ in x alone; where several lines meet, their mean and deviation."""
    from launchers.results.curves import curves

    first = lines.drop_duplicates("curve")
    shown = labels([_rest(options, [plot.x, plot.along, plot.facet]) for options in first["options"]])
    names = {curve: label + " (oracle)" * (kind == "oracle")
             for curve, label, kind in zip(first["curve"], shown, first["kind"], strict=True)}  # fmt: skip
    meeting = lines.assign(curve=lines["curve"].map(names)).groupby(["curve", "facet", "x"])
    points = meeting[[f"{measure}{what}" for measure in measures for what in ("", " sd")]].mean()
    for measure in measures:
        points[f"{measure} sd"] = points[f"{measure} sd"].mask(meeting.size() > 1, meeting[measure].std())
    points = points.reset_index()
    longest = points["curve"].value_counts().index[:MOST]
    panels = _panels(plot, points[points["curve"].isin(longest)])
    return curves(panels, measures, X.get(plot.x, plot.x), at_values=plot.x != "stored_mb")


def _grid(plot: Plot, lines: "DataFrame", measures: Sequence[str]) -> "Figure":
    """The values of x across, those of hue down; a panel a facet and measure."""
    from launchers.results.heat import grids

    return grids(_panels(plot, lines), measures, plot.x, ",\n".join(plot.hue))


def _bars(plot: Plot, lines: "DataFrame", measures: Sequence[str]) -> "Figure":
    """Groups by what lines share, their lines by rising score."""
    from launchers.results.curves import bars

    groups = [group.sort_values("mean") for _, group in lines.groupby("curve", sort=False) if len(group) > 1][:MOST]
    headings = labels([_rest(group["options"].iloc[0], [plot.x]) for group in groups])
    made, last = [], plot.x.rpartition(".")[2]
    for heading, group in zip(headings, groups, strict=True):
        differing = [label.partition(" ")[2].removeprefix(f"{last}=") for label in labels(list(group["options"]))]
        words = [str(options.get(plot.x, name)) for options, name in zip(group["options"], differing, strict=True)]
        made.append((heading, group.assign(name=words if len({*words}) == len(words) else differing)))
    return bars(made, measures)
