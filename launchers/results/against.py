"""Measured lines beside their published counterparts: differences, and why a counterpart may not be compared."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from launchers.results.frame import Summary, summarise
from launchers.results.published import UNKNOWN, Published, method_of, published
from launchers.results.writers import Cell, Column, Sheet
from launchers.rows import Row

if TYPE_CHECKING:
    from pandas import DataFrame

CELL_FACTOR = 10  # a single task may be off by this many tolerances of the mean
CELL_LEAST = 1.0  # points that a single task may always be off
PRECISION = "fp32"  # of all published scores
LEGEND = (
    "Percent and points. within, outside: of so many points of the mean, every task within ten times that; differs: "
    "another experiment, no repetition, whatever the numbers."
)


@dataclass(frozen=True)
class Comparison:
    """One published row beside a measured line; reasons say why the two are no repetition of each other."""

    published: Published
    gaps: dict[str, float]  # task, "mean" or "norm" -> measured - published, points
    reasons: tuple[str, ...]

    @property
    def comparable(self) -> bool:
        return not self.reasons

    @property
    def decisive(self) -> float | None:
        """The difference of the means, where none is published that of the normalised means."""
        return self.gaps.get("mean", self.gaps.get("norm"))

    @property
    def within(self) -> bool:
        """Whether the decisive difference and every task lie within tolerance."""
        limit = max(CELL_FACTOR * self.published.tolerance, CELL_LEAST)
        cells = (self.gaps[task] for task in self.published.accuracy)
        close = self.decisive is not None and abs(self.decisive) <= self.published.tolerance
        return self.comparable and close and all(abs(gap) <= limit for gap in cells)

    @property
    def verdict(self) -> str:
        """within | outside the tolerance; "differs" where the two must not be compared."""
        if not self.comparable:
            return "differs"
        if self.decisive is None:
            return "unknown"
        return f"{'within' if self.within else 'outside'} {self.published.tolerance:g}"


@dataclass(frozen=True)
class Compared:
    """A measured line and its counterparts, those that may be compared first; none for a method nobody published."""

    line: Any  # of Summary.lines
    measured: dict[str, float]  # task, "mean" or "norm" -> percent
    counterparts: tuple[Comparison, ...]


@dataclass(frozen=True)
class Section:
    """The lines of one suite on one backbone."""

    summary: Summary
    backbone: str
    lines: tuple[Compared, ...]

    @property
    def title(self) -> str:
        family = ", ".join(sorted({compared.line.family for compared in self.lines}))
        return f"{self.summary.suite}, {self.backbone}{f' ({family})' if family else ''}, against published numbers"


def sections(rows: Iterable[Row]) -> list[Section]:
    """All measured lines with their counterparts, suite by suite and backbone by backbone."""
    made = []
    for summary in summarise(rows):
        backbones: dict[str, list[Compared]] = {}
        for line, (_, values) in zip(summary.lines.itertuples(), summary.lines.iterrows(), strict=True):
            names = {**{task: f"task {task}" for task in summary.tasks}, "mean": "mean", "norm": "norm"}
            measured = {
                name: float(values[column]) for name, column in names.items() if values[column] == values[column]
            }
            compared = Compared(line, measured, counterparts(line.rows, measured))
            backbones.setdefault(backbone_of(line.rows[0]), []).append(compared)
        made += [Section(summary, backbone, tuple(lines)) for backbone, lines in backbones.items()]
    return made


def counterparts(rows: tuple[Row, ...], measured: Mapping[str, float]) -> tuple[Comparison, ...]:
    """Of every published table the row nearest in its settings, those without a reason against them first."""
    row = rows[0]
    nearest: dict[tuple[str, str], tuple[tuple[float, ...], Comparison]] = {}
    for known in published() if row.status == "ok" else ():
        there = known.on(row.suite, row.tasks)
        if there is None or known.method != method_of(row.method) or known.backbone != backbone_of(row):
            continue
        rank, key = (float(len(_settings(row, there))), _gap_of_scales(row, there)), (there.table, there.source)
        if key not in nearest or rank < nearest[key][0]:
            reasons = dict.fromkeys(reason for seed in rows for reason in _reasons(seed, there))
            gaps = {name: measured[name] - value for name, value in there.scores.items() if name in measured}
            nearest[key] = rank, Comparison(there, gaps, tuple(reasons))
    return tuple(
        sorted((comparison for _, comparison in nearest.values()), key=lambda comparison: len(comparison.reasons))
    )


def _reasons(row: Row, there: Published) -> list[str]:
    """What makes the published row another experiment than this one."""
    reasons = []
    if not _same_family(row, there):
        reasons.append(f"experts of {there.family} there, of {row.family} here")
    variant = _look(row.config, "suite.variant")
    if variant != there.variant:
        reasons.append(f"prompts and test sets of {there.variant} there, of {variant or 'an unknown code base'} here")
    if names := sorted({str(split.get("name")) for split in row.splits.values()} - {"test"}):
        reasons.append(f"scored on the {' and '.join(names)} split here")
    if (limit := _look(row.config, "suite.limit")) is not None:
        reasons.append(f"at most {limit} images per split here")
    here = {task: row.splits.get(task, {}).get("size") for task in row.tasks if task in there.test_images}
    if sizes := [f"{task} {there.test_images[task]} / {'?' if size is None else size}"
                 for task, size in here.items() if size != there.test_images[task]]:  # fmt: skip
        reasons.append(f"other test images (there / here): {', '.join(sizes)}")
    if settings := _settings(row, there):
        reasons.append(f"other settings (there / here): {', '.join(settings)}")
    return reasons


def _same_family(row: Row, there: Published) -> bool:
    return row.family in (there.family, there.also)


def _settings(row: Row, there: Published) -> list[str]:
    """The published settings that the row does not share; how the experts are read is no matter among families."""
    reasons = []
    for name, expected in there.settings.items():
        if name.startswith("experts.") and not _same_family(row, there):
            continue
        if name.startswith("search.") and not row.scale_source.startswith("search"):
            continue  # a method without a scale, or whose scale was not searched
        if name == "scale":
            reasons += _scale(row, expected)
        elif (here := _here(row, name)) != expected:
            reasons.append(f"{name} {_short(expected)} / {_short(here)}")
    if (scored := row.search.get("scored", 0)) < (listed := len(row.search.get("scales", ()))):
        reasons.append(f"all scales scored / {scored} of {listed}")
    precision = _look(row.config, "engine.precision")
    return reasons if precision in (None, PRECISION) else [*reasons, f"precision {PRECISION} / {precision}"]


def _scale(row: Row, expected: Any) -> list[str]:
    """What differs in the coefficient and in who chose it: nobody, or labelled validation images."""
    searched = row.scale_source.startswith("search")
    here = f"{_short(row.scale)} {'tuned on validation' if searched else 'fixed'}"
    if expected == UNKNOWN:
        return [f"scale {UNKNOWN} / {here}"]
    if expected == "search":
        return [] if searched else [f"scale tuned on validation / {here}"]
    if searched:
        return [f"scale {_short(expected)} fixed / {here}"]
    return [] if row.scale == expected else [f"scale {_short(expected)} / {_short(row.scale)}"]


def _here(row: Row, name: str) -> Any:
    if name == "router":
        return routed_by(row)
    if name == "search.scales":
        scales = row.search.get("scales")
        return scales and f"{len(scales)} from {min(scales):g} to {max(scales):g}"
    if name == "search.criterion":
        return row.search.get("criterion")
    return getattr(row, name) if name in ("adaptation", "granularity") else _look(row.config, name)


def routed_by(row: Row) -> str:
    """What chooses the weights, as published rows tell it: how gates learned, not what their file is called."""
    train = _look(row.config, "router.train")
    if row.router in ("none", "oracle", "subspace") or not isinstance(train, Mapping) or "_target_" not in train:
        return row.router
    if str(train["_target_"]).endswith("TaskId"):
        return "task_id"
    terms = ["task_id"] if train.get("warm_up") else []
    return " + ".join([*terms, *(name for name, term in (train.get("objectives") or {}).items() if term["weight"])])


def _look(config: Any, name: str) -> Any:
    """The value at a dotted place of a configuration, None where there is no such place."""
    for part in name.split("."):
        config = config.get(part) if isinstance(config, Mapping) else None
    return config


def _gap_of_scales(row: Row, there: Published) -> float:
    expected = there.settings.get("scale")
    return abs(expected - row.scale) if isinstance(expected, float) and row.scale is not None else 0.0


def _short(value: Any) -> str:
    return "not set" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def backbone_of(row: Row) -> str:
    """The name of a row's backbone, "unknown" where its configuration does not tell."""
    return _look(row.config, "backbone.name") or "unknown"


def sheets(rows: Iterable[Row]) -> list[Sheet]:
    """Every suite and backbone of `rows` as a table: measured, published, difference and what it means."""
    return [_sheet(section) for section in sections(rows)]


def _sheet(section: Section) -> Sheet:
    footnotes: dict[str, int] = {}
    lines: list[dict[str, Cell]] = []
    dim, breaks = set(), []
    shown = [compared for compared in section.lines if compared.counterparts]
    for compared in shown:
        has_norm = any(comparison.published.norm is not None for comparison in compared.counterparts)
        cells = {name: f"{value:.1f}" for name, value in compared.measured.items() if name != "norm" or has_norm}
        lines.append(_printed(compared.line.label, cells, Cell("measured")))
        for comparison in compared.counterparts:
            there = comparison.published
            dim |= {len(lines), len(lines) + 1}
            known = {name: f"{value:.1f}" for name, value in there.scores.items()}
            lines.append(_printed(f"  {there.table}", known, Cell(_marks(there.notes, footnotes))))
            text = f"{comparison.verdict} {_marks(comparison.reasons, footnotes)}".strip()
            gaps = {name: signed(gap) for name, gap in comparison.gaps.items()}
            lines.append(_printed("    difference", gaps, Cell(text, bold=comparison.within)))
        breaks.append(len(lines) - 1)
    norm = ["norm"] if any("norm" in line for line in lines) else []
    headers = ["method", *section.summary.tasks, "mean", *norm, "verdict"]
    columns = (Column(header, tuple(line.get(header, Cell()) for line in lines)) for header in headers)
    return Sheet(
        section.title, tuple(columns), tuple(_below(section, footnotes)), frozenset(dim), frozenset(breaks[:-1])
    )


def _printed(method: str, cells: Mapping[str, str], verdict: Cell) -> dict[str, Cell]:
    return {"method": Cell(method), **{name: Cell(text) for name, text in cells.items()}, "verdict": verdict}


def _marks(texts: Iterable[str], footnotes: dict[str, int]) -> str:
    """The marks of these texts, "[1 3]", or nothing; each text is numbered where it first appears."""
    numbers = sorted({footnotes.setdefault(text, len(footnotes) + 1) for text in texts})
    return f"[{' '.join(map(str, numbers))}]" if numbers else ""


def signed(gap: float) -> str:
    """A difference in points, one decimal; no sign in front of zero."""
    return "0.0" if abs(gap) < 0.05 else f"{gap:+.1f}"


def _below(section: Section, footnotes: Mapping[str, int]) -> list[str]:
    known = [comparison.published for compared in section.lines for comparison in compared.counterparts]
    sources = {there.table: there.source for there in known}
    failed = [compared.line.label for compared in section.lines if compared.line.kind == "failed"]
    bare = [compared.line.label for compared in section.lines if not compared.counterparts]
    nothing = [label for label in bare if label not in failed]
    return [
        *[LEGEND] * bool(known),
        *(f"[{number}] {text}" for text, number in footnotes.items()),
        *(f"{table}: {source}" for table, source in sources.items() if table not in source),
        *[f"Nothing published for {', '.join(nothing)}."] * bool(nothing),
        *[f"Failed, nothing to compare: {', '.join(failed)}."] * bool(failed),
    ]


def records(rows: Iterable[Row]) -> "DataFrame":
    """A line for every measured line and counterpart; one without published columns where there is none."""
    from pandas import DataFrame

    return DataFrame([_record(section, compared, comparison)
                      for section in sections(rows) for compared in section.lines
                      for comparison in compared.counterparts or (None,)])  # fmt: skip


def _record(section: Section, compared: Compared, comparison: Comparison | None) -> dict[str, Any]:
    line, there = compared.line, comparison and comparison.published
    record = {"suite": section.summary.suite, "backbone": section.backbone, "method": line.label,
              "status": line.status, "family": line.family}  # fmt: skip
    record |= {
        "table": there and there.table, "printed": there and there.printed, "source": there and there.source,
        "published_family": there and there.family, "verdict": comparison and comparison.verdict.split()[0],
        "tolerance": there and there.tolerance, "reasons": comparison and "; ".join(comparison.reasons),
        "notes": there and " ".join(there.notes),
    }  # fmt: skip
    for name in (*section.summary.tasks, "mean", "norm"):
        record[f"{name} measured"] = compared.measured.get(name)
        record[f"{name} published"] = there and there.scores.get(name)
        record[f"{name} difference"] = comparison and comparison.gaps.get(name)
    return record
