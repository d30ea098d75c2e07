"""Class folders as a source of labelled images: which files are images, and which entries are left out and why."""

import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from merging.cache import Cache
from merging.errors import UserError
from merging.preflight import some
from tasks.split import Uncached
from tasks.vision.decode import Encoded
from tasks.vision.digests import digests, reading
from tasks.vision.layout import ENDINGS, Layout, folders, is_hidden, layout
from tasks.vision.parts import Rule

STARTS = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"GIF87a", b"GIF89a", b"II*\0", b"MM\0*", b"\0\0\0\x0cjP  ",
          b"\xff\x4f\xff\x51", *(b"P%d\n" % kind for kind in range(1, 7)))  # fmt: skip
BOXES = (b"ftypavif", b"ftypheic", b"ftypmif1")
BACK = "linked back into the data set"
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class FileTable:
    """Image files with their labels, int64 [N]."""

    paths: tuple[Path, ...]
    labels: Tensor
    origin: str

    def read(self, indices: Sequence[int]) -> list[Encoded]:
        return [Encoded(str(self.paths[index]), self.paths[index]) for index in indices]


@dataclass(frozen=True)
class FolderSource(Uncached):
    """Class folders, <folder>/{train,val,test}/<class>/*.jpg or <folder>/<class>/*.jpg, in torchvision's order.

    parts: names of the folders for train, val and test; None finds the usual ones, False is not to use one. cache
    remembers the content of files. The classes are those of train. Raises UserError for missing or empty folders, for
    a class that train lacks, and for folders that may be splits or classes.
    """

    folder: Path
    parts: Mapping[str, str | bool | None] = field(default_factory=dict)
    cache: Cache | None = None
    repo: None = None

    @property
    def name(self) -> str:
        return str(self.folder)

    @cached_property
    def _layout(self) -> Layout:
        return layout(self.folder, self.parts)

    @cached_property
    def _listed(self) -> tuple[dict[str, dict[str, list[Path]]], list[str]]:
        """Part -> class -> image files, those of train's classes; what was understood, and what was left out."""
        walk, roots = Walk(), self._layout.roots
        with reading():
            parts = {part: walk.classes(root) for part, root in roots.items()}
        walk.check()
        read = []
        for part, files in parts.items():
            _check_classes(roots, part, files, parts["train"])
            where = "the whole folder" if roots[part] == self.folder else roots[part].relative_to(self.folder)
            counts = [len(paths) for paths in files.values()]
            read.append(f"{part}={where} ({sum(counts)} images, {sum(map(bool, counts))} classes)")
        unused = f"not used: {some(self._layout.unused, 6)}" if self._layout.unused else None
        notes = [note for note in (", ".join(read), unused, walk.summary()) if note]
        log.info("%s: read %s", self.name, "; ".join(notes))
        return {part: {name: files.get(name, []) for name in parts["train"]} for part, files in parts.items()}, notes

    def notes(self) -> list[str]:
        understood, *rest = self._listed[1]
        return rest if self._layout.plain and not self._layout.unused else [f"read {understood}", *rest]

    def classes(self) -> tuple[str, ...]:
        return tuple(self._listed[0]["train"])

    def table(self, part: str) -> FileTable | None:
        if part not in self._listed[0]:
            return None
        files = self._listed[0][part].values()
        labels = torch.arange(len(files)).repeat_interleave(torch.tensor([len(paths) for paths in files]))
        return FileTable(tuple(path for paths in files for path in paths), labels, str(self._layout.roots[part]))

    def content(self, split: str, rule: Rule, ask: bool = True) -> str:
        """Of the images that serve the split, in order, and of their labels; what lies beside them does not count."""
        sizes = {part: sum(map(len, files.values())) for part, files in self._listed[0].items()}
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


@dataclass
class Walk:
    """A walk through class folders, and what it comes across beside images: reason -> paths; links to nothing.

    Links are followed unless they lead back into what is read. What cannot be read raises OSError.
    """

    skipped: dict[str, list[str]] = field(default_factory=dict)
    dead: list[str] = field(default_factory=list)

    def summary(self) -> str | None:
        """What was left out, counted and named, or None."""
        reasons = [f"{len(paths)} {reason} ({some(sorted({os.path.basename(path) for path in paths}))})"
                   for reason, paths in self.skipped.items()]  # fmt: skip
        return f"skipped {', '.join(reasons)}" if reasons else None

    def check(self) -> None:
        """Raises UserError naming the links to nothing."""
        if self.dead:
            raise UserError(
                f"{len(self.dead)} links lead to no file: {some(self.dead, 10)}. Put back what they point to, or "
                f"remove them: no image is left out silently."
            )

    def classes(self, root: Path) -> dict[str, list[Path]]:
        """Class -> its image files, in torchvision's order. Raises UserError for two classes in one folder."""
        whole, names, real_paths = os.path.realpath(root), folders(root), {}
        for entry in self._entries(root):
            real = os.path.realpath(entry.path)
            if entry.name not in names:
                self._skip("beside the class folders", entry.path)
            elif _holds(real, whole):
                self._skip(BACK, entry.path)
            elif other := next((name for name, path in real_paths.items() if path == real), None):
                raise UserError(
                    f"The class folders {other} and {entry.name} of {root} are the same folder, {real}. Remove one of "
                    f"the links."
                )
            else:
                real_paths[entry.name] = real
        return {name: self._images(root / name, [whole, *real_paths.values()]) for name in names if name in real_paths}

    def _images(self, folder: Path, seen: list[str]) -> list[Path]:
        """All image files below a class folder; `seen`: real paths of the folders that are read anyway."""
        waiting, read = [str(folder)], []
        while waiting:
            here, files = waiting.pop(), []
            for entry in self._entries(here):
                real = os.path.realpath(entry.path)
                if entry.is_dir() and entry.is_symlink() and any(_holds(real, a) or _holds(a, real) for a in seen):
                    self._skip(BACK, entry.path)
                elif entry.is_dir():
                    waiting.append(entry.path)
                    seen += [real] if entry.is_symlink() else []
                elif entry.is_file() and is_image(entry.path):
                    files.append(Path(entry.path))
                else:
                    self._skip("no image", entry.path)
            read.append((here, files))
        return [path for _, files in sorted(read) for path in files]

    def _entries(self, folder: str | Path) -> list[os.DirEntry]:
        """What a folder holds, sorted; hidden entries and links to nothing are noted and left out."""
        kept = []
        with os.scandir(folder) as entries:
            for entry in sorted(entries, key=lambda entry: entry.name):
                if is_hidden(entry.name):
                    self._skip("hidden", entry.path)
                elif entry.is_symlink() and not os.path.exists(entry.path):
                    self.dead.append(entry.path)
                else:
                    kept.append(entry)
        return kept

    def _skip(self, reason: str, path: str) -> None:
        self.skipped.setdefault(reason, []).append(path)


def is_image(path: str) -> bool:
    """Whether a file is an image by its ending or first bytes; one that only claims so fails when it is decoded."""
    if path.lower().endswith(ENDINGS):
        return True
    with open(path, "rb") as file:
        start = file.read(16)
    riff, bitmap = start[:4] == b"RIFF" and start[8:12] == b"WEBP", start[:2] == b"BM" and start[6:10] == bytes(4)
    return riff or bitmap or start.startswith(STARTS) or start[4:12] in BOXES


def _holds(outer: str, inner: str) -> bool:
    """Whether a folder is `inner` or contains it, by real paths."""
    return inner == outer or inner.startswith(os.path.join(outer, ""))
