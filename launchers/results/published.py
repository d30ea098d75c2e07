"""Published numbers as package data: what papers and public result files report, with sources and known errors."""

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import yaml

FOLDER = Path(__file__).with_name("published_numbers")
PER_TASK = ("base", "expert")  # whose number of a task does not depend on the other tasks of the suite
UNKNOWN, ANY = "unknown", "any"  # a setting that is not known, and one that makes no difference


@dataclass(frozen=True)
class Published:
    """One published row, in percent. `about.yaml` beside the numbers explains what the fields hold."""

    table: str
    source: str
    method: str  # our label
    printed: str  # its own
    backbone: str
    suite: str
    family: str
    also: str  # another name of the family
    variant: str  # the code base whose prompts and test sets it was measured with
    accuracy: dict[str, float]  # task -> percent; empty where only means are published
    printed_mean: float | None
    norm: float | None
    tolerance: float  # points of the mean
    digits: int
    settings: dict[str, Any]
    test_images: dict[str, int]  # empty where unknown
    notes: tuple[str, ...]  # known errors and traps
    misprint: bool  # whether its printed mean contradicts its cells, as a note tells

    @property
    def mean(self) -> float | None:
        """The mean of the cells; where there are none, as printed."""
        return statistics.fmean(self.accuracy.values()) if self.accuracy else self.printed_mean

    @property
    def scores(self) -> dict[str, float]:
        """What is known, in percent, by task, "mean" and "norm"."""
        means = {"mean": self.mean, "norm": self.norm}
        return self.accuracy | {name: value for name, value in means.items() if value is not None}

    def on(self, suite: str, tasks: Sequence[str]) -> "Published | None":
        """The row as a counterpart on these tasks: the same suite, or for PER_TASK rows a part of it; else None."""
        if self.method in PER_TASK and self.accuracy:
            if not set(tasks) <= set(self.accuracy):
                return None
            return replace(self, suite=suite, accuracy={task: self.accuracy[task] for task in tasks})
        same = suite == self.suite and set(tasks) == set(_about()["suites"][self.suite])
        return self if same else None


@cache
def published() -> tuple[Published, ...]:
    """All published rows, family by family."""
    files = sorted(path for path in FOLDER.glob("*.yaml") if path.name != "about.yaml")
    return tuple(row for path in files for table in _load(path) for row in _rows(table))


def method_of(label: str) -> str:
    """The method as published that a row's label stands for: presets of ours go by another name."""
    return _about()["presets"].get(label, label)


def _settings(about: Mapping[str, Any], table: Mapping[str, Any], row: Mapping[str, Any]) -> dict[str, Any]:
    """What a measured row must agree in: of the method, over it of the table, over that of the row."""
    protocol = about["protocols"][about["methods"][row["method"]]]
    settings = {**protocol, **table.get("settings", {}), **row.get("settings", {})}
    return {name: value for name, value in settings.items() if value != ANY}


@cache
def _about() -> dict[str, Any]:
    return _load(FOLDER / "about.yaml")


def _load(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def _rows(table: Mapping[str, Any]) -> Iterator[Published]:
    about = _about()
    tasks, family = about["suites"][table["suite"]], about["families"][table["family"]]
    images = table.get("test_images", {})
    for row in table["rows"]:
        accuracy = row.get("accuracy", [])
        notes = [about["notes"][name] for part in (table, row) for name in part.get("notes", [])]
        yield Published(
            **{name: table[name] for name in ("table", "source", "backbone", "suite", "family", "digits")},
            **{name: row[name] for name in ("method", "printed", "tolerance")},
            also=family.get("also", table["family"]),
            variant=family["variant"],
            accuracy=dict(zip(tasks, accuracy, strict=True)) if accuracy else {},
            printed_mean=row.get("mean"),
            norm=row.get("norm"),
            settings=_settings(about, table, row),
            test_images={} if images == "unknown" else {**family["test_images"], **images},
            notes=(*notes, *([row["misprint"]] if "misprint" in row else [])),
            misprint="misprint" in row,
        )
