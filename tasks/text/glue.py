"""GLUE: eight tasks of English sentences and pairs of them; what is known of each is in facts/glue.yaml."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any, Literal

import numpy
import torch
import yaml
from torch import Tensor

from merging.errors import UserError
from merging.files import Content
from tasks.hub import HubFile, fetch
from tasks.split import Split, Texts, Uncached
from tasks.suite import Suite, divided, known
from tasks.task import LabelledTask

FACTS = Path(__file__).parent / "facts" / "glue.yaml"
VAL_SHARE = 0.1  # of train


@cache
def facts() -> Mapping[str, Any]:
    """glue.yaml."""
    return yaml.safe_load(FACTS.read_text("utf-8"))


@dataclass(frozen=True)
class Glue(Uncached):
    """The texts of one task. val and calibration: samples at most; first: of test, the first ones alone.

    Validation is the last tenth of numpy's permutation of train, seed 0: MergeLM, whose code draws it so, trained no
    expert on it. Test is the published validation part. folder: a local copy of the repository. Raises UserError
    for a copy with other columns, and for labels in another order, hidden, or out of range.
    """

    task: str
    val: int
    calibration: int
    first: int | None = None
    folder: str | None = None
    revision: str | None = None

    @property
    def facts(self) -> Mapping[str, Any]:
        return facts()["tasks"][self.task]

    @property
    def classes(self) -> Sequence[str]:
        return self.facts["classes"]

    @property
    def is_local(self) -> bool:
        """Whether nothing of it is asked of the Hub."""
        return self.folder is not None

    def files(self, splits: Sequence[str]) -> list[HubFile]:
        """What the splits are in, on the Hub."""
        return [] if self.is_local else [self._file(part) for part in dict.fromkeys(map(self._part, splits))]

    def expected(self, split: str) -> int:
        """How many samples a split has by the published sizes."""
        return len(self._indices(split, self.facts["sizes"]["test" if split == "test" else "train"]))

    def split(self, name: str) -> Split:
        """Short texts first, so that those of one batch are of like length."""
        if name not in self._splits:
            table = self._table(self._part(name))
            rows = table.take(self._indices(name, table.num_rows))
            columns = [rows[column].to_pylist() for column in self.facts["texts"]]
            items = [pair[0] if len(pair) == 1 else pair for pair in zip(*columns, strict=True)]
            order = sorted(range(len(items)), key=lambda index: len("".join(items[index])))
            labels = self._labels(rows["label"].to_pylist(), name)
            self._splits[name] = Split(name, Texts(tuple(items))[torch.tensor(order)], labels[order])
        return self._splits[name]

    @cached_property
    def _splits(self) -> dict[str, Split]:
        return {}

    def content(self, split: str) -> str:
        """Id of a split, without reading its rows."""
        settings = [self.val, self.calibration, self.first, self.facts["texts"]]
        made = json.dumps([Content(self._path(self._part(split)), None).id, split, settings])
        return hashlib.sha256(made.encode()).hexdigest()[:16]

    def notes(self) -> Iterator[str]:
        """What a reader of the numbers should know of the samples that were read."""
        for name, split in self._splits.items():
            texts: Any = [split.inputs[index] for index in range(len(split))]  # type: ignore[index]
            if empty := sum(not all(map(str.strip, (text,) if isinstance(text, str) else text)) for text in texts):
                yield f"{empty} of {len(texts)} samples of {name} have an empty text"

    def _part(self, split: str) -> str:
        return self.facts.get("test", "validation") if split == "test" else "train"

    def _file(self, part: str) -> HubFile:
        return HubFile(facts()["repo"], (f"{self.task}/{part}-00000-of-00001.parquet",), self.revision, "dataset")

    def _path(self, part: str) -> Path:
        file = self._file(part)
        if self.folder is None:
            return fetch(file)
        path = Path(self.folder).expanduser() / file.filenames[0]
        if not path.is_file():
            raise UserError(
                f"There is no {path}. suite.folder is a copy of the data set {file.repo} as the Hub has it."
            )
        return path

    def _indices(self, split: str, count: int) -> Any:
        if split == "test":
            return numpy.arange(count)[: self.first]
        order = numpy.random.RandomState(0).permutation(count)
        rest, held = numpy.split(order, [int((1 - VAL_SHARE) * count)])
        return {"train": rest, "val": held[: self.val], "calibration": rest[: self.calibration]}[split]

    def _table(self, part: str) -> Any:
        from pyarrow import parquet

        path = self._path(part)
        schema, columns = parquet.read_schema(path), (*self.facts["texts"], "label")
        if missing := [column for column in columns if column not in schema.names]:
            raise UserError(
                f"{path} has no column {missing[0]!r}, only {', '.join(schema.names)}: it is no copy of {self.task} as "
                f"the data set {facts()['repo']} has it."
            )
        check_names(self.task, path, schema.metadata or {}, self.classes)
        return parquet.read_table(path, columns=list(columns))

    def _labels(self, values: Sequence[float], split: str) -> Tensor:
        if not self.classes:
            return torch.tensor(values, dtype=torch.float32)
        if odd := [value for value in values if not 0 <= value < len(self.classes)]:
            raise UserError(
                f"{self.task} ({split}) has the label {odd[0]}, and its classes are 0 to {len(self.classes) - 1}. The "
                f"labels of GLUE's own test parts are hidden: score on the published validation part."
            )
        return torch.tensor(values, dtype=torch.int64)


def check_names(task: str, path: Path, metadata: Mapping[bytes, bytes], classes: Sequence[str]) -> None:
    """Raises UserError where a file names its labels, and otherwise than the heads of experts have them."""
    info = json.loads(metadata.get(b"huggingface", b"{}")).get("info", {})
    names = info.get("features", {}).get("label", {}).get("names")
    if names and list(names) != list(classes):
        raise UserError(
            f"{path}: the labels of {task} are {', '.join(names)} here, and {', '.join(classes)} in the published data "
            f"that heads were trained on. Put the labels into that order."
        )


def build(
    name: str, tasks: Sequence[str], val: int = 1000, calibration: int = 512, first: int | None = None,
    metrics: Literal["glue", "accuracy"] = "glue", held_out: Sequence[str] = (), folder: str | None = None,
    revision: str | None = None, text: None = None,
) -> Suite:  # fmt: skip
    """The suite of the named tasks; conf/suite/glue8.yaml explains the options.

    Raises UserError for an unknown or repeated task, where none is left to merge, for sizes below 1, and for a metric
    that the tasks do not have.
    """
    for option, size in (("val", val), ("calibration", calibration), ("first", first)):
        if size is not None and size < 1:
            raise UserError(f"suite.{option}={size} leaves a split of {name} empty. Give at least 1 sample.")
    if metrics not in ("glue", "accuracy"):
        raise UserError(f"suite.metrics={metrics} is unknown. Choose glue, or accuracy for all tasks.")
    if metrics == "accuracy" and "stsb" in tasks:
        raise UserError("suite.metrics=accuracy is not defined for stsb, whose labels are numbers. Leave stsb out.")
    made = []
    for task in tasks:
        own = facts()["tasks"][known(task, tuple(facts()["tasks"]), name)]["metrics"]
        data = Glue(task, val, calibration, first, folder, revision)
        made.append(LabelledTask(task, data, metrics=tuple(own if metrics == "glue" else ["accuracy"])))
    return divided(name, made, held_out)
