"""Where labelled images come from: class folders, parquet files, data sets on the Hub."""

import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch

from merging.cache import Cache
from merging.errors import UserError
from merging.preflight import some
from tasks.vision.digests import digests
from tasks.vision.layout import ENDINGS, PARTS, Layout, layout
from tasks.vision.listing import Listing, class_files
from tasks.vision.parts import Rule
from tasks.vision.tables import FileTable, Table

log = logging.getLogger(__name__)


class Source(Protocol):
    """A data set in up to three parts. Nothing is read or downloaded before it is asked for."""

    @property
    def name(self) -> str: ...
    @property
    def repo(self) -> str | None: ...  # of the Hub
    def classes(self) -> tuple[str, ...] | None: ...  # in label order; None where the data set does not say
    def table(self, part: str) -> Table | None: ...  # None where there is no such part
    def content(self, split: str, rule: Rule, ask: bool = True) -> str | None: ...  # of a split; None: only the Hub
    # knows, which is not asked
    def notes(self) -> list[str]: ...  # what a reader of its numbers should know of how it was read


@dataclass(frozen=True)
class FolderSource:
    """Class folders, <folder>/{train,val,test}/<class>/*.jpg or <folder>/<class>/*.jpg, in torchvision's order.

    parts: names of the folders for train, val and test; None finds the usual ones, False is not to use one. cache
    remembers the content of files. The classes are those of train. Raises UserError for missing or empty folders, for
    a class that train lacks, and for folders that may be splits or classes.
    """

    folder: Path
    parts: Mapping[str, str | bool | None] = field(default_factory=dict)
    cache: Cache | None = None
    repo: None = None

    def __getstate__(self) -> dict[str, Any]:
        return {each.name: getattr(self, each.name) for each in fields(self)}  # without what is cached

    @property
    def name(self) -> str:
        return str(self.folder)

    @cached_property
    def _layout(self) -> Layout:
        return layout(self.folder, self.parts)

    @cached_property
    def _listed(self) -> tuple[dict[str, dict[str, list[Path]]], list[str]]:
        """Part -> class -> image files, those of train's classes; what was understood, and what was left out."""
        listing, roots = Listing(), self._layout.roots
        parts = {part: class_files(root, listing) for part, root in roots.items()}
        listing.check()
        read = []
        for part, files in parts.items():
            _check_classes(roots, part, files, parts["train"])
            where = "the whole folder" if roots[part] == self.folder else roots[part].relative_to(self.folder)
            counts = [len(paths) for paths in files.values()]
            read.append(f"{part}={where} ({sum(counts)} images, {sum(map(bool, counts))} classes)")
        unused = f"not used: {some(self._layout.unused, 6)}" if self._layout.unused else None
        notes = [note for note in (", ".join(read), unused, listing.summary()) if note]
        log.info("%s: read %s", self.name, "; ".join(notes))
        return {part: {name: files.get(name, []) for name in parts["train"]} for part, files in parts.items()}, notes

    @property
    def _files(self) -> dict[str, dict[str, list[Path]]]:
        return self._listed[0]

    def notes(self) -> list[str]:
        layout, *rest = self._listed[1]
        return rest if self._layout.plain and not self._layout.unused else [f"read {layout}", *rest]

    def classes(self) -> tuple[str, ...]:
        return tuple(self._files["train"])

    def table(self, part: str) -> FileTable | None:
        if part not in self._files:
            return None
        files = self._files[part].values()
        labels = torch.arange(len(files)).repeat_interleave(torch.tensor([len(paths) for paths in files]))
        return FileTable(tuple(path for paths in files for path in paths), labels, str(self._layout.roots[part]))

    def content(self, split: str, rule: Rule, ask: bool = True) -> str:
        """Of the images that serve the split, in order, and of their labels; what lies beside them does not count."""

        sizes = {part: sum(map(len, files.values())) for part, files in self._files.items()}
        part, indices = rule.choose(split, sizes.get, self.name)
        table = self.table(part)
        assert table is not None
        files = digests([table.paths[index] for index in indices.tolist()], self.name, self.cache)
        return json.dumps([files, table.labels[indices].tolist()])


def _check_classes(
    roots: Mapping[str, Path], part: str, files: Mapping[str, list[Path]], train: Mapping[str, list[Path]]
) -> None:
    """Raises UserError for an empty class of train, a class that train lacks, and a part without images."""
    if part == "train" and (empty := [name for name, paths in files.items() if not paths]):
        raise UserError(
            f"There is no image in the class folder {some(empty)} of {roots[part]}. Endings of images: "
            f"{' '.join(ENDINGS)}, and any file that begins as an image. Remove the folder or fill it."
        )
    if extra := [name for name, paths in files.items() if paths and name not in train]:
        raise UserError(
            f"{roots[part]} has images of {some(extra)}, which {roots['train']} lacks. Train decides the classes: add "
            f"images of {'it' if len(extra) == 1 else 'them'} there, or remove the class here."
        )
    if not any(files.values()):
        raise UserError(f"There is no image in {roots[part]}. Fill its class folders, or say {part}: false.")


@dataclass(frozen=True)
class Plain:
    """What a source is, as the user or the published facts give it; see conf/suite/folder.yaml."""

    folder: str | None = None
    parquet: object = None
    hub: str | None = None
    args: tuple[str, ...] = ()
    revision: str | None = None
    image: str = "image"
    label: str = "label"
    train: str | bool | None = None
    val: str | bool | None = None
    test: str | bool | None = None

    def open(self, task: str, cache: Cache | None = None) -> Source:
        """`cache` remembers what files hold. Raises UserError unless one of folder, parquet and hub is given."""
        from tasks.vision.rows import RowSource

        given = [name for name in ("folder", "parquet", "hub") if getattr(self, name) is not None]
        if len(given) != 1:
            raise UserError(
                f"The task {task} says {' and '.join(given) or 'none'} of folder, parquet and hub. Give exactly one of "
                f"them under suite.sources.{task}: where its images lie."
            )
        parts = {part: getattr(self, part) for part in PARTS}
        if self.folder is not None:
            return FolderSource(Path(self.folder).expanduser(), parts, cache)
        rest = {name: value for name, value in asdict(self).items() if name not in (*PARTS, "folder")}
        return RowSource(**rest, parts=parts, cache=cache)
