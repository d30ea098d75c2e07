"""Data sets of rows, on the Hub or in parquet files, through the library `datasets`."""

import json
import logging
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from merging.cache import Cache
from merging.errors import UserError
from tasks.split import Uncached
from tasks.vision.decode import Encoded
from tasks.vision.digests import digests
from tasks.vision.layout import chosen
from tasks.vision.parts import Rule

ARROW = re.compile(r"^(?!cache-).*?-(\w+?)(?:-\d{5}-of-\d{5})?\.arrow$")  # <name>-<split>.arrow, also in pieces
TRIES = 3  # of what fails on the network
Result = TypeVar("Result")
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RowTable:
    """Rows of a `datasets.Dataset` whose images are not decoded, with their labels, int64 [N]."""

    rows: Any
    column: str
    labels: Tensor
    origin: str

    def read(self, indices: Sequence[int]) -> list[Encoded]:
        cells = self.rows[list(indices)][self.column]
        return [self._encoded(index, cell) for index, cell in zip(indices, cells, strict=True)]

    def _encoded(self, index: int, cell: Any) -> Encoded:
        """A cell is {"bytes", "path"} as the Hub stores images, plain bytes, or a path."""
        where = f"{self.origin} row {index}"
        if isinstance(cell, dict):
            path = cell.get("path")
            where += f" ({path})" if path else ""
            cell = path if cell.get("bytes") is None else cell["bytes"]
        return Encoded(where, Path(cell) if isinstance(cell, str) else b"" if cell is None else bytes(cell))


@dataclass(frozen=True)
class RowSource(Uncached):
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
    cache: Cache | None = None  # remembers the content of files and what the Hub said

    @property
    def name(self) -> str:
        return str(self.parquet) if self.hub is None else " ".join((self.hub, *self.args))

    @property
    def repo(self) -> str | None:
        return self.hub

    def notes(self) -> list[str]:
        return []

    def content(self, split: str, rule: Rule, ask: bool = True) -> str | None:
        identity = self._identity(ask)
        return None if identity is None else json.dumps([identity, split, rule.facts(split)])

    def _identity(self, ask: bool = True) -> str | None:
        """Of all rows: the content of local files under their names, which tell the splits, or the Hub's commit."""
        if self.hub is not None:
            if (commit := self._commit(ask)) is None:
                return None
            origin: list[Any] = [self.hub, list(self.args), commit]
        else:
            files = [(split, *file) for split, named in self._local.items() for file in named]
            ids = digests([path for _, _, path in files], str(files[0][2].parent), self.cache)
            origin = [[split, name, digest] for (split, name, _), digest in zip(files, ids, strict=True)]
        return json.dumps(["rows", origin, self.image, self.label, dict(self.parts)])

    @cached_property
    def _local(self) -> dict[str, list[tuple[str, Path]]]:
        """Split -> names and paths of parquet files. Without a mapping the split is empty: their names tell it."""
        paths = self.parquet if isinstance(self.parquet, Mapping) else {"": self.parquet}
        return {split: parquet_files(where) for split, where in paths.items()}

    def _commit(self, ask: bool = True) -> str | None:
        """Of the repository: the one that was read first, until the cache is deleted; None where only the Hub knows."""
        if re.fullmatch("[0-9a-f]{40}", self.revision or ""):
            return self.revision
        key = f"commit of the data set {self.hub} {self.revision}"
        if self.cache is not None and (stored := self.cache.get(key)) is not None:
            return stored.decode()
        if not ask:
            return None
        if self.cache is not None:
            self.cache.put(key, self._newest.encode())
        return self._newest

    @cached_property
    def _newest(self) -> str:
        """The commit that the Hub has now; without a network that of the newest files in the cache of `datasets`."""
        if offline():
            files = chain(*prepared(str(self.hub), self.args).values())
            return max(files, key=lambda path: path.stat().st_mtime).parent.name
        files = chain(*_data_files(self.name, self.hub, *self.args, revision=self.revision).values())
        if (first := next(files, None)) is None:
            raise UserError(f"The data set {self.name} has no data files. Name one with an image and a label column.")
        return commit_and_path(first)[0]

    def classes(self) -> tuple[str, ...] | None:
        """Names of the labels: those of the column, or the sorted words in it. Those of the Hub are remembered."""
        if self.hub is None or self.cache is None:
            return self._classes()
        key = f"class names 1 {self._identity()}"  # the number: of a way to read them
        names = json.loads(self.cache.text(key, lambda: json.dumps(self._classes())))
        return None if names is None else tuple(names)

    def _classes(self) -> tuple[str, ...] | None:
        split = str(self._split("train"))
        if (names := getattr(self._rows(split).features[self.label], "names", None)) is not None:
            return tuple(names)
        values = self._values(split)
        return tuple(sorted(set(values))) if values and isinstance(values[0], str) else None

    def table(self, part: str) -> RowTable | None:
        if (split := self._split(part)) is None:
            return None
        rows, values = self._rows(split), self._values(split)
        try:
            if values and isinstance(values[0], str):
                index = {name: label for label, name in enumerate(self.classes() or ())}
                values = [index[value] for value in values]
            labels = torch.tensor([int(value) for value in values], dtype=torch.int64)
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"The column {self.label!r} of {self.name} ({split}) has a label that is no class: {error}. Labels are "
                f"integers from 0, booleans, or names that the train split has too."
            ) from error
        return RowTable(rows, self.image, labels, f"{self.name} {split}")

    @cached_property
    def _files(self) -> Mapping[str, list[Any]]:
        """Split -> its files, on the Hub or in the cache of `datasets`."""
        if self.hub is None:
            return _data_files(self.name, "parquet", **self._arguments)
        commit = self._commit()
        if offline():
            return prepared(self.hub, self.args, commit)
        return _data_files(self.name, self.hub, *self.args, revision=commit)

    @property
    def _arguments(self) -> dict[str, Any]:
        """Of `datasets.load_dataset` for local files: a folder, of whose file names it makes splits, or the files."""
        files = {split: [str(path) for _, path in named] for split, named in self._local.items()}
        if isinstance(self.parquet, str) and Path(self.parquet).expanduser().is_dir():
            return {"data_dir": str(Path(self.parquet).expanduser())}
        return {"data_files": files if isinstance(self.parquet, Mapping) else files[""]}

    def _split(self, part: str) -> str | None:
        split = chosen(part, self.parts, list(self._files), self.name)
        if split is None and part == "train":
            raise UserError(f"{self.name} has no split train, only {', '.join(self._files)}. Name it: train: <split>.")
        return split

    @cached_property
    def _loaded(self) -> dict[str, Any]:
        return {}

    def _rows(self, split: str) -> Any:
        """A split, its images not decoded."""
        if split not in self._loaded:
            from datasets import Image

            rows = loaded(lambda: self._load(split), self.name)
            for column in (self.image, self.label):
                if column not in rows.column_names:
                    raise UserError(
                        f"{self.name} ({split}) has no column {column!r}, only {', '.join(rows.column_names)}. Name "
                        f"the columns: image: <column>, label: <column>."
                    )
            stored = isinstance(rows.features[self.image], Image)
            self._loaded[split] = rows.cast_column(self.image, Image(decode=False)) if stored else rows
        return self._loaded[split]

    def _load(self, split: str) -> Any:
        """One split; of a repository its own files alone, where `datasets` would download those of all splits."""
        from datasets import Dataset, concatenate_datasets, disable_progress_bars, load_dataset

        log.info("%s: loading %s", self.name, split)
        if not sys.stderr.isatty():
            disable_progress_bars()
        if self.hub is None:
            return load_dataset("parquet", split=split, **self._arguments)
        files = self._files[split]
        if offline():
            return concatenate_datasets([Dataset.from_file(str(path)) for path in files])
        commits, paths = zip(*map(commit_and_path, files), strict=True)
        facts: dict[str, Any] = {"revision": commits[0], "verification_mode": "no_checks"}
        return load_dataset(self.hub, data_files={split: list(paths)}, split=split, **facts)

    def _values(self, split: str) -> list[Any]:
        return list(self._rows(split).select_columns([self.label])[:][self.label])


def offline() -> bool:
    """Whether the Hub must not be asked."""
    from datasets import config

    return bool(config.HF_HUB_OFFLINE)


def prepared(repo: str, args: Sequence[str], commit: str | None = None) -> Mapping[str, list[Path]]:
    """Split -> its newest files in the cache of `datasets`, or those of a commit. Raises UserError for none."""
    from datasets import config
    from datasets.naming import camelcase_to_snakecase

    owner, _, short = repo.rpartition("/")
    folder = Path(config.HF_DATASETS_CACHE) / "___".join([*filter(None, [owner]), camelcase_to_snakecase(short)])
    configs = [f"{args[0]}*" if args else "*", "default-*"]
    files = {path for config_name in configs for path in folder.glob(f"{config_name}/*/{commit or '*'}/*.arrow")}
    splits: dict[str, list[Path]] = {}
    for path in sorted(files, key=lambda path: (path.parent.stat().st_mtime, path.name)):
        if match := ARROW.search(path.name):
            have = splits.setdefault(match[1], [])
            splits[match[1]] = [*have, path] if have and have[0].parent == path.parent else [path]
    if not splits:
        raise UserError(
            f"HF_HUB_OFFLINE is set and {' '.join((repo, *args))} is not in the Hugging Face cache ({folder})"
            f"{f' as of its commit {commit}' if commit else ''}. Run once with a network, or copy that folder from a "
            f"machine that has it."
        )
    return splits


def loaded(load: Callable[[], Result], name: str) -> Result:
    """What `load` returns; tried again where the network failed. Raises UserError for what cannot be had."""
    attempt = 1
    while True:
        try:
            return load()
        except (OSError, ValueError, RuntimeError) as error:  # datasets wraps whatever went wrong in any of these
            if attempt == TRIES or isinstance(error, FileNotFoundError) or not isinstance(error, OSError):
                raise UserError(
                    f"Cannot load the data set {name} ({type(error).__name__}: {error}). Check its name, your access "
                    f"and the network; with HF_HUB_OFFLINE=1 it must be in the Hugging Face cache."
                ) from error
            attempt += 1
            log.warning("%s: %s; trying again (%d of %d)", name, error, attempt, TRIES)


def _data_files(name: str, *positional: Any, **named: Any) -> dict[str, list[str]]:
    """Split -> its files, as `datasets` finds them. On the Hub with the commit: hf://datasets/<repo>@<sha>/<path>."""
    from datasets import load_dataset_builder

    files = loaded(lambda: load_dataset_builder(*positional, **named), name).config.data_files or {}
    return {str(split): list(paths) for split, paths in files.items()}


def commit_and_path(file: str) -> tuple[str, str]:
    """Of hf://datasets/<repo>@<commit>/<path>."""
    commit, _, path = file.partition("@")[2].partition("/")
    return commit, path


def parquet_files(where: str | Sequence[str]) -> list[tuple[str, Path]]:
    """The parquet files of a file, a folder, a pattern or a list of these, under what their names say."""
    if not isinstance(where, str):
        return [file for one in where for file in parquet_files(one)]
    path = Path(where).expanduser()
    folder = path if path.is_dir() else path.parent
    files = sorted(path.rglob("*.parquet") if path.is_dir() else folder.glob(path.name))
    if not files:
        raise UserError(f"There are no parquet files at {where}. Give a file, a folder or a pattern.")
    return [(str(file.relative_to(folder)), file) for file in files]
