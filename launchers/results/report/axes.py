"""What was varied: lines that differ in one number alone, that fill a grid of numbers, that differ in one choice."""

import json
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from launchers.results.frame import REFERENCES, Line, Summary
from launchers.results.labels import KINDS, identity, labels

Run = list[tuple[float, Line]]  # by rising value
FULL = 0.75  # of a grid more than this is there, else it is lines crossing in a point
LONG = 3  # from so many points on, a run is a curve that needs no bars beside it
LED_TO = ("row.needs", "row.router", "row.granularity")  # what follows from the choice of a router
FOLLOWS = {"router": ["engine.batch"], "router.gate.granularity": ["engine.batch"]}  # absent from rows for most choices
ROOTS = ("method", "router", "scale", "engine")


@dataclass(frozen=True)
class Grid:
    """Lines that differ in several numbers alone; the last of `knobs` has the most values."""

    knobs: tuple[str, ...]
    cells: Mapping[tuple[float, ...], Line]

    @property
    def columns(self) -> list[float]:
        return sorted({place[-1] for place in self.cells})

    @property
    def lines(self) -> list[tuple[float, ...]]:
        return sorted({place[:-1] for place in self.cells})


@dataclass(frozen=True)
class Choice:
    """Lines that differ in one choice: of a word, or of a part with knobs of its own."""

    knob: str
    names: tuple[str, ...]
    lines: tuple[Line, ...]


def runs(summary: Summary) -> dict[str, list[Run]]:
    """Dotted knob -> runs of lines that differ in that number alone, longest first."""
    found: dict[str, dict[str, Run]] = defaultdict(lambda: defaultdict(list))
    for line, own in _known(summary):
        for knob, value in own.items():
            if _is_number(value) and not knob.startswith("row."):
                found[knob][_rest(own, [knob])].append((value, line))
    several = {knob: [run for run in each.values() if len({at for at, _ in run}) > 1] for knob, each in found.items()}
    by_value = {knob: [sorted(run, key=lambda each: each[0]) for run in each] for knob, each in several.items() if each}
    return {knob: sorted(each, key=len, reverse=True) for knob, each in by_value.items()}


def grids(summary: Summary) -> list[Grid]:
    """Grids of three or two numbers that are filled, none inside another."""
    knobs, known = list(runs(summary)), _known(summary)
    found: list[Grid] = []
    for chosen in (each for size in (3, 2) for each in combinations(knobs, size)):
        groups: dict[str, dict[tuple[float, ...], Line]] = defaultdict(dict)
        for line, own in known:
            if all(_is_number(own.get(knob)) for knob in chosen):
                groups[_rest(own, chosen)][tuple(own[knob] for knob in chosen)] = line
        filled = [_sorted(chosen, cells) for cells in groups.values() if _fills(cells)]
        found += [grid for grid in filled if not _inside(grid.cells.values(), [each.cells.values() for each in found])]
    return found


def _fills(cells: Mapping[tuple[float, ...], Line]) -> bool:
    sizes = [len(set(values)) for values in zip(*cells, strict=True)]
    return min(sizes) > 1 and len(cells) > FULL * math.prod(sizes)


def _sorted(knobs: Sequence[str], cells: Mapping[tuple[float, ...], Line]) -> Grid:
    """With the longest axis last."""
    order = sorted(range(len(knobs)), key=lambda axis: len({place[axis] for place in cells}))
    places = {tuple(place[axis] for axis in order): line for place, line in cells.items()}
    return Grid(tuple(knobs[axis] for axis in order), places)


def choices(summary: Summary) -> dict[str, list[Choice]]:
    """Dotted knob or part -> groups of lines that differ in it alone, the largest first; what `grids` and long runs
    show is left out."""
    known = _known(summary)
    shown = [line for grid in grids(summary) for line in grid.cells.values()]
    shown += [line for each in runs(summary).values() for run in each if len(run) >= LONG for _, line in run]
    found: dict[str, list[Choice]] = {}
    drawn: list[Iterable[Line]] = []
    for knob in _choosable([own for _, own in known]):
        groups: dict[str, list[Line]] = defaultdict(list)
        for line, own in known:
            if line.kind not in REFERENCES and any(_under(key, knob) for key in own):
                groups[_rest(own, [*_all_under(own, knob), *LED_TO, *FOLLOWS.get(knob, [])])].append(line)
        kept = [lines for lines in groups.values() if _differ(lines, knob) and not _inside(lines, [shown, *drawn])]
        drawn += kept
        if kept:
            found[knob] = [_choice(knob, lines) for lines in sorted(kept, key=len, reverse=True)]
    return found


def _differ(lines: Sequence[Line], knob: str) -> bool:
    """Whether they hold unlike words, or parts of unlike kind wherever those kinds are defined."""
    known = [identity(line.rows[0]) for line in lines]
    words = [tuple(str(own.get(key)).rpartition(".")[2] for key in (knob, *(f"{knob}.{kind}" for kind in KINDS)))
             for own in known]  # fmt: skip
    return len(set(words)) > 1


def _choice(knob: str, lines: Sequence[Line]) -> Choice:
    ordered = sorted(lines, key=lambda line: line.mean.mean if line.mean else 0.0)
    values = [identity(line.rows[0]).get(knob) for line in ordered]
    if all(value is not None for value in values) and len(set(map(str, values))) == len(values):
        return Choice(knob, tuple(map(str, values)), tuple(ordered))
    told = [label.partition(" ")[2] for label in labels([line.rows[0] for line in ordered])]
    return Choice(knob, tuple(each.removeprefix(f"{knob.rpartition('.')[2]}=") for each in told), tuple(ordered))


def _choosable(known: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Knobs that hold unlike words, then parts of unlike kind."""
    values: dict[str, set[str]] = defaultdict(set)
    for own in known:
        for key, value in own.items():
            if key.split(".")[0] in ROOTS and not _is_number(value):
                values[key].add(str(value))
    varied = [key for key, each in values.items() if len(each) > 1]
    yield from (key for key in varied if key.rpartition(".")[2] not in KINDS)
    kinds = (key.rpartition(".")[0] for key in varied if key.rpartition(".")[2] in KINDS)
    yield from dict.fromkeys(part for part in kinds if part != "method")


def _known(summary: Summary) -> list[tuple[Line, dict[str, Any]]]:
    return [(line, identity(line.rows[0])) for line in summary.lines if not line.failed]


def _rest(own: Mapping[str, Any], without: Iterable[str]) -> str:
    left = set(without)
    return json.dumps({key: value for key, value in own.items() if key not in left}, sort_keys=True)


def _under(key: str, knob: str) -> bool:
    return key == knob or key.startswith(f"{knob}.")


def _all_under(own: Mapping[str, Any], knob: str) -> list[str]:
    return [key for key in own if _under(key, knob)]


def _inside(lines: Iterable[Line], others: Iterable[Iterable[Line]]) -> bool:
    own = {id(line) for line in lines}
    return any(own <= {id(line) for line in other} for other in others)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
