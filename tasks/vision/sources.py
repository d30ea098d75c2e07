"""Where labelled images come from: class folders, parquet files, data sets on the Hub."""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch

from merging.errors import UserError
from merging.preflight import some
from tasks.vision.tables import FileTable, Table

PARTS = ("train", "val", "test")
USUAL = {"train": ("train",), "val": ("val", "validation", "valid"), "test": ("test",)}
ENDINGS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")  # what torchvision reads


class Source(Protocol):
    """A data set in up to three parts. Nothing is read or downloaded before it is asked for."""

    @property
    def name(self) -> str: ...
    @property
    def repo(self) -> str | None: ...  # of the Hub
    def identity(self) -> str: ...  # changes where the images may have changed
    def classes(self) -> tuple[str, ...] | None: ...  # in label order; None where the data set does not say
    def table(self, part: str) -> Table | None: ...  # None where there is no such part


@dataclass(frozen=True)
class FolderSource:
    """Class folders, <folder>/{train,val,test}/<class>/*.jpg or <folder>/<class>/*.jpg, in torchvision's order.

    parts: names of the folders for train, val and test; None finds the usual ones, False is not to use one.
    Raises UserError for missing or empty folders and where two parts have different classes.
    """

    folder: Path
    parts: Mapping[str, str | bool | None] = field(default_factory=dict)
    repo: None = None

    def __getstate__(self) -> dict[str, Any]:
        return {each.name: getattr(self, each.name) for each in fields(self)}  # without what is cached

    @property
    def name(self) -> str:
        return str(self.folder)

    @cached_property
    def _roots(self) -> dict[str, Path]:
        """Part -> folder of class folders; the whole folder is train where it is not divided."""
        inside = _folders(self.folder)
        roots = {part: chosen(part, self.parts.get(part), inside, self.name) for part in PARTS}
        named = any(isinstance(self.parts.get(part), str) for part in PARTS)
        usual = {name for names in USUAL.values() for name in names}
        if not named and not (roots["train"] and roots["test"]) and not set(inside) <= usual:
            return {"train": self.folder}  # a class may be called "train"
        if roots["train"] is None:
            raise UserError(
                f"There is no folder train in {self.folder}, only {some(inside)}. Name it: train: <folder>."
            )
        return {part: self.folder / name for part, name in roots.items() if name is not None}

    @cached_property
    def _files(self) -> dict[str, dict[str, list[Path]]]:
        """Part -> class -> image files."""
        return {part: {name: _images(root / name) for name in _folders(root)} for part, root in self._roots.items()}

    def classes(self) -> tuple[str, ...]:
        first = tuple(self._files["train"])
        for part, found in self._files.items():
            if tuple(found) != first:
                missing, extra = sorted({*first} - {*found}), sorted({*found} - {*first})
                raise UserError(
                    f"{self._roots[part]} has other class folders than {self._roots['train']}: it lacks "
                    f"{some(missing) or 'none'} and adds {some(extra) or 'none'}. Both need the same ones."
                )
            if empty := [name for name, files in found.items() if not files]:
                raise UserError(
                    f"There is no image in the class folder {some(empty)} of {self._roots[part]}. Endings of images: "
                    f"{' '.join(ENDINGS)}. Remove the folder or fill it."
                )
        return first

    def table(self, part: str) -> FileTable | None:
        classes = self.classes()
        if part not in self._files:
            return None
        files = self._files[part]
        counts = torch.tensor([len(files[name]) for name in classes])
        labels = torch.arange(len(classes)).repeat_interleave(counts)
        return FileTable(tuple(path for name in classes for path in files[name]), labels, str(self._roots[part]))

    def identity(self) -> str:
        """Paths, sizes and times of all files."""
        found = []
        for part, classes in self._files.items():
            for path in (path for files in classes.values() for path in files):
                stat = path.stat()
                found.append((part, str(path), stat.st_size, stat.st_mtime_ns))
        return json.dumps(["folder", found])


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

    def open(self, task: str) -> Source:
        """Raises UserError unless exactly one of folder, parquet and hub is given."""
        from tasks.vision.rows import RowSource

        given = [name for name in ("folder", "parquet", "hub") if getattr(self, name) is not None]
        if len(given) != 1:
            raise UserError(
                f"The task {task} says {' and '.join(given) or 'none'} of folder, parquet and hub. Give exactly one of "
                f"them under suite.sources.{task}: where its images lie."
            )
        parts = {part: getattr(self, part) for part in PARTS}
        if self.folder is not None:
            return FolderSource(Path(self.folder).expanduser(), parts)
        rest = {name: value for name, value in asdict(self).items() if name not in (*PARTS, "folder")}
        return RowSource(**rest, parts=parts)


def chosen(part: str, name: str | bool | None, available: list[str], where: str) -> str | None:
    """Which of the available splits or folders is this part, None for none. Raises UserError for a name not there."""
    if name is None:
        return next((usual for usual in USUAL[part] if usual in available), None)
    if name is False:
        return None
    if name not in available:
        raise UserError(f"{where} has no {part} part called {name!r}. It has: {', '.join(available) or 'nothing'}.")
    return str(name)


def _folders(root: Path) -> list[str]:
    try:
        found = sorted(entry.name for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    except OSError as error:
        raise UserError(f"Cannot read {root}: {error.strerror}. Give a folder of class folders.") from error
    if not found:
        raise UserError(f"{root} has no class folders. Put the images of each class into a folder named after it.")
    numbered = all(name.isdecimal() for name in found)
    return sorted(found, key=int) if numbered else found  # 2 before 10: the names are the labels


def _images(folder: Path) -> list[Path]:
    """All image files below a class folder, in the order of torchvision's ImageFolder."""
    walked = sorted(os.walk(folder, followlinks=True))
    found = (Path(root) / name for root, _, names in walked for name in sorted(names))
    return [path for path in found if path.suffix.lower() in ENDINGS]
