"""The figure that an experiment declares (`plot:` in conf/experiment), drawn from any rows that fill its axes."""

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import yaml
from pydantic import ConfigDict, ValidationError
from pydantic.dataclasses import dataclass as checked

import conf
from launchers.results.frame import REFERENCES, Summary
from launchers.results.labels import Identity, identity, labels
from launchers.results.pareto import level
from merging.errors import UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame

    from launchers.results.style import Drawn

Names = tuple[str, ...]
FOLLOWS = ("row.needs", "row.router", "row.granularity")  # what rows say of the choice of a router
BATCH = "engine.batch"  # named by rows for gates that see a batch alone
OF_TASKS = ("suite.tasks", "suite.sources", "order", "count")  # what differs between sets of tasks
MOST = 6  # curves, or groups of bars, in a figure


@checked(frozen=True, config=ConfigDict(extra="forbid"))
class Plot:
    """What is drawn: lines alike in everything but the options of x, hue, facet and along make one figure.

    x: an option such as method.keep, "stored_mb", or "tasks" (how many were merged; sets of as many are averaged).
    y: a panel each of score (norm, without experts mean), routed_right, energy.
    hue: options, or parts such as method, that tell curves apart or make the rows of a grid.
    facet: an option whose values have a panel each. along: the option along which a curve is joined, if it is not x.
    """

    kind: Literal["curve", "grid", "bars", "scores", "levels", "pareto"]
    x: str = ""
    y: Names = ("score",)
    hue: Names = ()
    facet: str = ""
    along: str = ""


@dataclass(frozen=True)
class Place:
    """A line of a table with where it is drawn."""

    summary: Summary
    line: Any
    own: Identity
    x: Any
    facet: str


def declared(text: Mapping[str, Any] | str, where: str) -> Plot:
    """The plot of a mapping or of its YAML. Raises UserError naming `where`."""
    try:
        values = dict(yaml.safe_load(text) if isinstance(text, str) else text)
        names = {name: values[name] for name in ("y", "hue") if name in values}
        lists = {name: (value,) if isinstance(value, str) else tuple(value) for name, value in names.items()}
        plot = Plot(**(values | lists))
    except (yaml.YAMLError, ValidationError, ValueError, TypeError) as error:
        problems = error.errors() if isinstance(error, ValidationError) else []
        told = "; ".join(f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in problems) or str(error)
        raise UserError(
            f"The plot of {where} cannot be drawn: {told}. Write e.g. {{kind: curve, x: method.keep}}."
        ) from error
    if not plot.x and plot.kind in ("curve", "grid", "bars"):
        raise UserError(f"The plot of {where} has no x. Name an option, as in {{kind: {plot.kind}, x: method.keep}}.")
    return plot


def of_experiments(folder: Path | None = None) -> dict[Plot, str]:
    """The plots of all prepared experiments with the names of those that declare them."""
    names: dict[Plot, list[str]] = defaultdict(list)
    for path in sorted((folder or Path(conf.__path__[0]) / "experiment").glob("*.yaml")):
        if (values := yaml.safe_load(path.read_text("utf-8")).get("plot")) is not None:
            names[declared(values, str(path))].append(path.stem)
    return {plot: ", ".join(listed) for plot, listed in names.items()}


def drawings(plot: Plot, name: str, summaries: Sequence[Summary]) -> list["Drawn"]:
    """Every figure that these tables fill; none where x has a single value."""
    from launchers.results import curves, heat

    if plot.kind == "scores":
        return [heat.score_map([summary]) for summary in summaries]
    if plot.kind in ("levels", "pareto"):
        draw = curves.level_figure if plot.kind == "levels" else curves.bytes_figure
        return [drawn for summary in summaries if (drawn := draw(summary)) is not None]
    groups = [group for group in _figures(plot, summaries) if len({str(place.x) for place in group}) > 1]
    return [_drawn(plot, name, group, str(number) if len(groups) > 1 else "") for number, group in enumerate(groups, 1)]


def _drawn(plot: Plot, name: str, places: Sequence[Place], number: str) -> "Drawn":
    from launchers.results.style import Drawn

    measures = _measures(plot, places)
    figure, more = {"curve": _curves, "grid": _grid, "bars": _bars}[plot.kind](plot, places, measures)
    sds = [place.summary.lines.loc[place.line.Index, f"{measure} sd"] for place in places for measure in measures]
    told = ["Deviations over seeds."] if any(sd == sd for sd in sds) else []
    (suite, *others) = dict.fromkeys(place.summary.title for place in places)
    what = f"{'Accuracy by' if plot.kind != 'curve' else 'Accuracy against'} {LABELS.get(plot.x, plot.x)}"
    title = f"{what} ({name}): {suite.partition(' without ')[0] if not others else places[0].line.suite}"
    return Drawn(f"plot-{name.partition(',')[0]}{number}", title, figure, " ".join([*told, *more]))


LABELS = {"stored_mb": "stored bytes", "tasks": "the number of tasks"}


def _figures(plot: Plot, summaries: Sequence[Summary]) -> list[list[Place]]:
    """The lines of each figure, figures with the most lines first."""
    figures: dict[str, list[Place]] = defaultdict(list)
    for place in _places(plot, summaries):
        free = [plot.x, plot.along, plot.facet, *plot.hue]
        suite = place.line.suite if plot.x == "tasks" else place.summary.title
        figures[json.dumps([suite, _rest(place.own, free)], sort_keys=True)].append(place)
    return sorted(figures.values(), key=len, reverse=True)


def _places(plot: Plot, summaries: Sequence[Summary]) -> Iterator[Place]:
    for summary in summaries:
        for line in summary.scored.itertuples():
            own = identity(line.rows[0])
            x = {"stored_mb": line.stored_bytes / 1e6, "tasks": len(summary.tasks)}.get(plot.x, own.get(plot.x))
            if x is None and plot.kind == "bars":
                x = _part(own, plot.x)
            numeric = isinstance(x, int | float) and not isinstance(x, bool)
            reference = line.kind in REFERENCES and not (plot.x == "tasks" and line.kind == "base")
            fits = x is not None and not reference and (numeric or plot.kind == "bars")
            if fits and (not plot.along or _under(own, plot.along)):
                yield Place(summary, line, own, x, str(own.get(plot.facet, "")) if plot.facet else "")


def _part(own: Identity, name: str) -> str | None:
    """A part of the configuration as one text: methods, routers and such that were chosen by their name."""
    inside = {key: own[key] for key in _under(own, name)}
    return json.dumps(inside, sort_keys=True) if inside else None


def _under(own: Identity, name: str) -> list[str]:
    return [key for key in own if key == name or key.startswith(f"{name}.") or key == f"row.{name}"]


def _rest(own: Identity, without: Iterable[str]) -> Identity:
    """What is left of an identity, without what follows from the options that may differ."""
    free = [name for name in without if name]
    left = {*FOLLOWS, *(key for name in free for key in _under(own, name))}
    left |= {BATCH} if any(name.startswith("router") for name in free) else set()
    left |= {*OF_TASKS, *_under(own, "orders"), *_under(own, "suite.sources")} if "tasks" in free else set()
    return {key: value for key, value in own.items() if key not in left}


def _measures(plot: Plot, places: Sequence[Place]) -> list[str]:
    """The columns of `y`; a score is normalised where every line has its experts."""
    levels = {level(place.summary) for place in places}
    score = levels.pop() if len(levels) == 1 else "mean"
    return [score if name == "score" else name for name in plot.y]


def _points(plot: Plot, places: Sequence[Place], measures: Sequence[str]) -> "DataFrame":
    """A record for every curve, facet and x: mean and deviation of the line, or over lines where several meet there."""
    from pandas import DataFrame

    runs = [json.dumps(_rest(place.own, [plot.x, plot.along, plot.facet]), sort_keys=True) for place in places]
    first = dict(zip(reversed(runs), (place.own for place in reversed(places)), strict=True))
    told = labels([_rest(own, [plot.x, plot.along, plot.facet]) for own in first.values()])
    names = dict(zip(first, told, strict=True))
    records = [{"curve": names[run] + " (told the true task)" * (place.line.kind == "oracle"), "facet": place.facet,
                "x": place.x, **_values(place, measures)} for run, place in zip(runs, places, strict=True)]  # fmt: skip
    frame = DataFrame(records)
    merged = frame.groupby(["curve", "facet", "x"], sort=True)
    means, across = merged.mean(), merged.std()
    for measure in measures:
        means[f"{measure} sd"] = means[f"{measure} sd"].where(merged.size() == 1, across[measure])
    return means.reset_index()


def _values(place: Place, measures: Sequence[str]) -> dict[str, float]:
    values = place.summary.lines.loc[place.line.Index]
    return {name: float(values[name]) for measure in measures for name in (measure, f"{measure} sd")}


def _panels(plot: Plot, points: "DataFrame") -> list[tuple[str, "DataFrame"]]:
    last = plot.facet.rpartition(".")[2]
    return [(f"{last}={value}" if plot.facet else "", frame) for value, frame in points.groupby("facet")]


def _curves(plot: Plot, places: Sequence[Place], measures: Sequence[str]) -> tuple["Figure", list[str]]:
    from launchers.results.curves import curves
    from launchers.results.style import MEASURES

    points = _points(plot, places, measures)
    if plot.along:
        points = points.sort_values(["curve", "x"])
    lengths = points.groupby("curve").size().sort_values(ascending=False, kind="stable")
    lengths = lengths[lengths > 1]
    kept = points[points["curve"].isin(lengths.index[:MOST])]
    more = [f"The {MOST} longest of {len(lengths)} curves; the others are in the table."] if len(lengths) > MOST else []
    xlabel = {"stored_mb": MEASURES["stored_mb"], "tasks": "number of tasks"}.get(plot.x, plot.x)
    return curves(_panels(plot, kept), measures, xlabel, at_values=plot.x != "stored_mb"), more


def _grid(plot: Plot, places: Sequence[Place], measures: Sequence[str]) -> tuple["Figure", list[str]]:
    """The values of x across, those of hue down; a panel a facet and measure."""
    from pandas import DataFrame

    from launchers.results.heat import grids

    records = [{**_values(place, measures), "facet": place.facet, "x": place.x,
                "hue": ", ".join(f"{place.own[name]:g}" for name in plot.hue)} for place in places]  # fmt: skip
    return grids(_panels(plot, DataFrame(records)), measures, plot.x, ",\n".join(plot.hue)), []


def _bars(plot: Plot, places: Sequence[Place], measures: Sequence[str]) -> tuple["Figure", list[str]]:
    """Groups by what lines share, their lines by rising score; beside a part what it gives alone."""
    from pandas import DataFrame

    from launchers.results.curves import bars

    groups: dict[str, list[Place]] = defaultdict(list)
    for place in places:
        groups[json.dumps(_rest(place.own, [plot.x]), sort_keys=True)].append(place)
    several = [group for group in groups.values() if len(group) > 1]
    headings = labels([_rest(group[0].own, [plot.x]) for group in several])
    made, last = [], plot.x.rpartition(".")[2]
    for heading, group in list(zip(headings, several, strict=True))[:MOST]:
        told = labels([place.own for place in group])
        parts = [name.partition(" ")[2].removeprefix(f"{last}=") for name in told]
        words = [str(place.own.get(plot.x, part)) for part, place in zip(parts, group, strict=True)]
        lines = list(zip(words if len({*words}) == len(words) else parts, group, strict=True))
        lines.sort(key=lambda line: line[1].line.mean)
        records = [{"name": shown, "kind": place.line.kind, **_values(place, measures)}
                   for name, own in lines for shown, place in ((name, own), *_alone(plot, own))]  # fmt: skip
        made.append((heading, DataFrame(records)))
    alone = any(name.startswith("alone: ") for _, frame in made for name in frame["name"])
    return bars(made, measures), ["Alone: what the part gives by itself."] if alone else []


def _alone(plot: Plot, own: Place) -> list[tuple[str, Place]]:
    """The line of the method that is a part of another, at the scale it has there."""
    part: Any = own.line.rows[0].config
    for name in plot.x.split("."):
        part = part.get(name) if isinstance(part, Mapping) else None
    if not isinstance(part, Mapping):
        return []
    return [(f"alone: {line.method}", Place(own.summary, line, {}, None, ""))
            for line in own.summary.lines.itertuples() if line.kind == "static"
            and line.rows[0].config.get("method") == part and line.rows[0].scale == part.get("scale")][:1]  # fmt: skip
