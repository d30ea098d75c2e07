"""Measured lines beside their published counterparts: differences, and why a counterpart may not be compared."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from launchers.results.frame import Line, Summary, summarise
from launchers.results.published import UNKNOWN, Published, method_of, published
from launchers.rows import Row

CELL_FACTOR = 10  # a single task may be off by this many tolerances of the mean
PRECISION = "fp32"  # of all published scores
CELL_LEAST = 1.0  # points that a single task may always be off


@dataclass(frozen=True)
class Comparison:
    """One published row beside a measured line; reasons say why the two are no repetition of each other."""

    published: Published
    accuracy: dict[str, float]  # task -> measured - published, points
    mean: float | None
    norm: float | None
    reasons: tuple[str, ...]

    @property
    def comparable(self) -> bool:
        return not self.reasons

    @property
    def within(self) -> bool:
        """Whether the mean (where none is published, the normalised mean) and every task lie within tolerance."""
        decisive = self.norm if self.mean is None else self.mean
        limit = max(CELL_FACTOR * self.published.tolerance, CELL_LEAST)
        return (
            self.comparable
            and decisive is not None
            and abs(decisive) <= self.published.tolerance
            and all(abs(gap) <= limit for gap in self.accuracy.values())
        )


@dataclass(frozen=True)
class Compared:
    """A measured line and its counterparts, those that may be compared first; none for a method nobody published."""

    line: Line
    counterparts: tuple[Comparison, ...]


@dataclass(frozen=True)
class Section:
    """The lines of one suite on one backbone."""

    summary: Summary
    backbone: str
    lines: tuple[Compared, ...]

    @property
    def name(self) -> str:
        family = ", ".join(sorted({each.line.rows[0].family for each in self.lines}))
        return f"{self.summary.suite}, {self.backbone}" + (f" ({family})" if family else "")


def sections(rows: Iterable[Row]) -> list[Section]:
    """All measured lines with their counterparts, suite by suite and backbone by backbone."""
    found = []
    for summary in summarise(rows):
        backbones: dict[str, list[Compared]] = {}
        for line in summary.lines:
            backbones.setdefault(backbone_of(line.rows[0]), []).append(Compared(line, counterparts(line)))
        found += [Section(summary, backbone, tuple(lines)) for backbone, lines in backbones.items()]
    return found


def counterparts(line: Line) -> tuple[Comparison, ...]:
    """Of every published table the row nearest in its settings, those without a reason against them first."""
    row = line.rows[0]
    if line.failed:
        return ()
    nearest: dict[str, tuple[tuple[float, ...], Comparison]] = {}
    for known in published():
        if known.method != method_of(row.method) or known.backbone != backbone_of(row):
            continue
        there = known.on(row.suite, row.tasks)
        if there is None:
            continue
        rank = (float(len(_settings(row, there))), _gap_of_scales(row, there))
        key = f"{there.table} {there.source}"
        if key not in nearest or rank < nearest[key][0]:
            nearest[key] = rank, _compare(line, there)
    return tuple(sorted((each for _, each in nearest.values()), key=lambda each: len(each.reasons)))


def _compare(line: Line, there: Published) -> Comparison:
    def gap(measured: float | None, known: float | None) -> float | None:
        return None if measured is None or known is None else 100 * measured - known

    return Comparison(
        published=there,
        accuracy={task: 100 * line.accuracy[task].mean - value for task, value in there.accuracy.items()},
        mean=gap(line.mean.mean if line.mean else None, there.mean),
        norm=gap(line.norm.mean if line.norm else None, there.norm),
        reasons=tuple(dict.fromkeys(reason for row in line.rows for reason in _reasons(row, there))),
    )


def _reasons(row: Row, there: Published) -> list[str]:
    """What makes the published row another experiment than this one."""
    said = []
    if not _same_family(row, there):
        said.append(f"experts of {there.family} there, of {row.family} here")
    variant = _look(row.config, "suite.variant")
    if variant != there.variant:
        said.append(f"prompts and test sets of {there.variant} there, of {variant or 'an unknown code base'} here")
    if names := sorted({str(split.get("name")) for split in row.splits.values()} - {"test"}):
        said.append(f"scored on the {' and '.join(names)} split here")
    if (limit := _look(row.config, "suite.limit")) is not None:
        said.append(f"at most {limit} images per split here")
    if sizes := _sizes(row, there):
        said.append(f"other test images (there / here): {', '.join(sizes)}")
    if settings := _settings(row, there):
        said.append(f"other settings (there / here): {', '.join(settings)}")
    return said


def _same_family(row: Row, there: Published) -> bool:
    return row.family in (there.family, there.also)


def _sizes(row: Row, there: Published) -> list[str]:
    here = {task: row.splits.get(task, {}).get("size") for task in row.tasks}
    return [
        f"{task} {there.test_images[task]} / {'?' if here[task] is None else here[task]}"
        for task in row.tasks
        if task in there.test_images and here[task] != there.test_images[task]
    ]


def _settings(row: Row, there: Published) -> list[str]:
    """The published settings that the row does not share; how the experts are read is no matter among families."""
    said = []
    for name, wanted in there.settings.items():
        if name.startswith("experts.") and not _same_family(row, there):
            continue
        if name.startswith("search.") and not row.scale_source.startswith("search"):
            continue  # a method without a scale, or told as a scale that was not searched
        if name == "scale":
            said += _scale(row, wanted)
        elif (here := _here(row, name)) != wanted:
            said.append(f"{name} {_short(wanted)} / {_short(here)}")
    if (scored := row.search.get("scored", 0)) < (listed := len(row.search.get("scales", ()))):
        said.append(f"all scales scored / {scored} of {listed}")
    precision = _look(row.config, "engine.precision")
    return said if precision in (None, PRECISION) else [*said, f"precision {PRECISION} / {precision}"]


def _scale(row: Row, wanted: Any) -> list[str]:
    """What differs in the coefficient and in who chose it: nobody, or labelled validation images."""
    searched = row.scale_source.startswith("search")
    here = f"{_short(row.scale)} {'tuned on validation' if searched else 'fixed'}"
    if wanted == UNKNOWN:
        return [f"scale {UNKNOWN} / {here}"]
    if wanted == "search":
        return [] if searched else [f"scale tuned on validation / {here}"]
    if searched:
        return [f"scale {_short(wanted)} fixed / {here}"]
    return [] if row.scale == wanted else [f"scale {_short(wanted)} / {_short(row.scale)}"]


def _here(row: Row, name: str) -> Any:
    if name == "router":
        return _routed_by(row)
    if name == "search.scales":
        scales = row.search.get("scales")
        return scales and f"{len(scales)} from {min(scales):g} to {max(scales):g}"
    if name == "search.criterion":
        return row.search.get("criterion")
    return getattr(row, name) if name in ("adaptation", "granularity") else _look(row.config, name)


def _routed_by(row: Row) -> str:
    """What chooses the weights, as published rows tell it: how gates learned, not what their file is called."""
    train = _look(row.config, "router.train")
    if row.router in ("none", "oracle", "subspace") or not isinstance(train, Mapping) or "_target_" not in train:
        return row.router
    if str(train["_target_"]).endswith("TaskId"):
        return "task_id"
    terms = ["task_id"] if train.get("warm_up") else []
    return " + ".join([*terms, *(term for term in ("entropy", "marginal", "distillation") if train.get(term))])


def _look(config: Any, name: str) -> Any:
    """The value at a dotted place of a configuration, None where there is no such place."""
    for part in name.split("."):
        config = config.get(part) if isinstance(config, Mapping) else None
    return config


def _gap_of_scales(row: Row, there: Published) -> float:
    wanted = there.settings.get("scale")
    return abs(wanted - row.scale) if isinstance(wanted, float) and row.scale is not None else 0.0


def _short(value: Any) -> str:
    return "not set" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def backbone_of(row: Row) -> str:
    """The name of a row's backbone, "unknown" where its configuration does not tell."""
    return _look(row.config, "backbone.name") or "unknown"
