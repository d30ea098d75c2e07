"""Data sets of rows, on the Hub or in parquet files, through the library `datasets`."""

import json
import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any

from merging.errors import UserError
from tasks.vision.loading import offline, prepared, reach
from tasks.vision.sources import chosen
from tasks.vision.tables import RowTable, to_labels

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RowSource:
    """A data set with an image and a label column.

    hub, args, revision: what `datasets.load_dataset` is given. parquet: a file, a folder, a pattern, or a mapping of
    splits to any of these. parts: the splits for train, val and test; None finds the usual names, False is not to use
    one. Raises UserError for what cannot be loaded and for missing splits or columns.
    """

    hub: str | None = None
    args: Sequence[str] = ()
    revision: str | None = None
    parquet: Any = None
    image: str = "image"
    label: str = "label"
    parts: Mapping[str, str | bool | None] = field(default_factory=dict)

    def __getstate__(self) -> dict[str, Any]:
        return {each.name: getattr(self, each.name) for each in fields(self)}  # without what is cached

    @property
    def name(self) -> str:
        return str(self.parquet) if self.hub is None else " ".join((self.hub, *self.args))

    @property
    def repo(self) -> str | None:
        return self.hub

    def identity(self) -> str:
        said = ["rows", self.hub, list(self.args), self.revision, self.image, self.label, dict(self.parts)]
        files = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in self._local()]
        return json.dumps([*said, files], default=str)

    def classes(self) -> tuple[str, ...] | None:
        """Names of the labels: those of the column, or the sorted words in it."""
        split = self._split("train")
        assert split is not None
        column = self._rows(split).features[self.label]
        if getattr(column, "names", None) is not None:
            return tuple(column.names)
        values = self._values(split)
        return tuple(sorted(set(values))) if values and isinstance(values[0], str) else None

    def table(self, part: str) -> RowTable | None:
        if (split := self._split(part)) is None:
            return None
        rows, values = self._rows(split), self._values(split)
        try:
            labels = to_labels(values, self.classes())
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"The column {self.label!r} of {self.name} ({split}) has a label that is no class: {error}. Labels are "
                f"integers from 0, booleans, or names that the train split has too."
            ) from error
        return RowTable(rows, self.image, labels, f"{self.name} {split}")

    def _local(self) -> list[Path]:
        if self.parquet is None:
            return []
        given = self.parquet.values() if isinstance(self.parquet, Mapping) else [self.parquet]
        flat = [path for each in given for path in ([each] if isinstance(each, str) else each)]
        found = [path for each in flat for path in sorted(_matching(Path(each).expanduser()))]
        if not found:
            raise UserError(f"There are no parquet files at {self.parquet}. Give a file, a folder or a pattern.")
        return found

    @cached_property
    def _arguments(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Of `datasets.load_dataset`."""
        if self.hub is not None:
            return (self.hub, *self.args), {"revision": self.revision}
        if isinstance(self.parquet, str) and Path(self.parquet).expanduser().is_dir():
            return ("parquet",), {"data_dir": str(Path(self.parquet).expanduser())}
        self._local()
        return ("parquet",), {"data_files": _expanded(self.parquet)}

    @cached_property
    def _files(self) -> Mapping[str, list[str]]:
        """Split -> its files, as `datasets` finds them. On the Hub with the commit: hf://datasets/<repo>@<sha>/<path>."""
        from datasets import load_dataset_builder

        positional, named = self._arguments
        found = reach(lambda: load_dataset_builder(*positional, **named), self.name).config.data_files or {}
        return {str(split): list(files) for split, files in found.items()}

    @cached_property
    def _available(self) -> list[str]:
        """The splits."""
        return list(self._files) if self.hub is None or not offline() else list(self._prepared)

    @cached_property
    def _prepared(self) -> Mapping[str, list[Path]]:
        return prepared(str(self.hub), self.args)

    def _split(self, part: str) -> str | None:
        found = chosen(part, self.parts.get(part), self._available, self.name)
        if found is None and part == "train":
            raise UserError(
                f"{self.name} has no split train, only {', '.join(self._available)}. Name it: train: <split>."
            )
        return found

    @cached_property
    def _loaded(self) -> dict[str, Any]:
        return {}

    def _rows(self, split: str) -> Any:
        """A split, its images not decoded."""
        if split not in self._loaded:
            from datasets import Image

            rows = reach(lambda: self._load(split), self.name)
            for column in (self.image, self.label):
                if column not in rows.column_names:
                    raise UserError(
                        f"{self.name} ({split}) has no column {column!r}, only {', '.join(rows.column_names)}. Name "
                        f"the columns: image: <column>, label: <column>."
                    )
            if isinstance(rows.features[self.image], Image):
                rows = rows.cast_column(self.image, Image(decode=False))
            self._loaded[split] = rows
        return self._loaded[split]

    def _load(self, split: str) -> Any:
        """One split; of a repository its own files alone, where `datasets` would download those of all splits."""
        from datasets import Dataset, concatenate_datasets, disable_progress_bars, load_dataset

        log.info("%s: loading %s", self.name, split)
        if not sys.stderr.isatty():
            disable_progress_bars()
        if self.hub is None:
            positional, named = self._arguments
            return load_dataset(*positional, split=split, **named)
        if offline():
            return concatenate_datasets([Dataset.from_file(str(path)) for path in self._prepared[split]])
        commits = {file.partition("@")[2].partition("/")[0] for file in self._files[split]}
        paths = [file.partition("@")[2].partition("/")[2] for file in self._files[split]]
        return load_dataset(
            self.hub, data_files={split: paths}, split=split, revision=commits.pop(), verification_mode="no_checks"
        )

    def _values(self, split: str) -> list[Any]:
        return list(self._rows(split).select_columns([self.label])[:][self.label])


def _matching(path: Path) -> list[Path]:
    if path.is_dir():
        return list(path.rglob("*.parquet"))
    return list(path.parent.glob(path.name))


def _expanded(given: Any) -> Any:
    """Paths with the home folder spelt out."""
    if isinstance(given, Mapping):
        return {split: _expanded(each) for split, each in given.items()}
    return str(Path(given).expanduser()) if isinstance(given, str) else [_expanded(each) for each in given]
