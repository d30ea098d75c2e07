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
    variant: str | None  # the code base whose prompts and test sets it was measured with, if that matters
    accuracy: dict[str, float]  # task -> percent; empty where only means are published
    printed_mean: float | None
    norm: float | None
    tolerance: float  # points of the mean
    digits: int
    settings: dict[str, Any]  # what a measured row must agree in
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
            known = set(tasks) <= set(self.accuracy)
            return replace(self, suite=suite, accuracy={task: self.accuracy[task] for task in tasks}) if known else None
        same = suite == self.suite and set(tasks) == set(_about()["suites"][self.suite])
        return self if same else None


def method_of(label: str) -> str:
    """The method as published that a row's label stands for: presets of ours go by another name."""
    return _about()["presets"].get(label, label)


@cache
def _about() -> dict[str, Any]:
    return yaml.safe_load((FOLDER / "about.yaml").read_text("utf-8"))


@cache
def published() -> tuple[Published, ...]:
    """All published rows, family by family."""
    tables = (yaml.safe_load(path.read_text("utf-8")) for path in sorted(FOLDER.glob("*.yaml")))
    return tuple(row for listed in tables if isinstance(listed, list) for table in listed for row in _rows(table))


def _rows(table: Mapping[str, Any]) -> Iterator[Published]:
    about = _about()
    tasks, family = about["suites"][table["suite"]], about["families"][table["family"]]
    images = {} if table.get("test_images") == UNKNOWN else family["test_images"] | table.get("test_images", {})
    for row in table["rows"]:
        settings = about["protocols"][about["methods"][row["method"]]] | table.get("settings", {})
        notes = [about["notes"][name] for part in (table, row) for name in part.get("notes", [])]
        yield Published(
            **{name: table[name] for name in ("table", "source", "backbone", "suite", "family", "digits")},
            **{name: row[name] for name in ("method", "printed", "tolerance")},
            also=family.get("also", table["family"]),
            variant=family["variant"],
            accuracy=dict(zip(tasks, row["accuracy"], strict=True)) if "accuracy" in row else {},
            printed_mean=row.get("mean"),
            norm=row.get("norm"),
            settings={name: value for name, value in (settings | row.get("settings", {})).items() if value != ANY},
            test_images=images,
            notes=(*notes, *([row["misprint"]] if "misprint" in row else [])),
            misprint="misprint" in row,
        )
