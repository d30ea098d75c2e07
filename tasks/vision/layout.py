"""Which folders, or which splits of a data set, are train, val and test."""

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from merging.errors import UserError
from merging.preflight import some
from tasks.vision.digests import reading

PARTS = ("train", "val", "test")
USUAL = {"train": ("train", "training"), "val": ("val", "valid", "validation", "dev"), "test": ("test", "testing")}
WORDS = r"(train(ing)?|val(id(ation)?)?|dev|test(ing)?|eval(uation)?|hold[ _.-]?out|fold|split)"
LIKE = re.compile(rf"{WORDS}([ _.-]?(\d+|set|data|images?|imgs|split|new|old|extra|full|small|unlabell?ed))*")
HAS_WORD = re.compile(rf"(.*[^a-z])?{WORDS}([^a-z].*)?")
IMAGES, BESIDE_IMAGES = "images", ("annotations", "labels", "masks", "bboxes", "boxes", "segmentations", "meta")
ENDINGS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")  # what torchvision reads
HIDDEN = ("__MACOSX", "@eaDir", "lost+found", "Thumbs.db", "desktop.ini")  # and all that begin with a dot


class Layout(NamedTuple):
    """Where a data set's class folders lie."""

    roots: dict[str, Path]  # part -> its folder of class folders; train alone where the folder is not divided
    unused: list[str]  # folders beside the parts
    plain: bool  # whether the names are train, val and test themselves, or the folder is not divided


def layout(folder: Path, named: Mapping[str, str | bool | None]) -> Layout:
    """The parts of a folder; `named` as FolderSource has it.

    The usual names are known in any case. Raises UserError where folders look like splits and are none of these,
    where two may serve as the same part, and where two parts are one and the same folder.
    """
    own_names = any(isinstance(named.get(part), str) for part in PARTS)
    root = folder if own_names else _inside_images(folder)
    inside = folders(root)
    if not own_names and not is_divided(root, inside):
        check_names(root, inside)
        return Layout({"train": root}, [], root == folder)
    names = {part: chosen(part, named, inside, str(root)) for part in PARTS}
    if names["train"] is None:
        raise UserError(f"There is no folder train in {root}, only {some(inside)}. Name it: train: <folder>.")
    roots = {part: root / name for part, name in names.items() if name is not None}
    real: dict[str, str] = {}
    for part, path in roots.items():
        if (other := real.setdefault(os.path.realpath(path), part)) != part:
            raise UserError(
                f"{roots[other]} and {path} are the same folder, so that {other} and {part} would have the same "
                f"images. Give another folder, or {part}: false."
            )
    check_names(roots["train"], folders(roots["train"]))
    plain = root == folder and all(path.name == part for part, path in roots.items())
    return Layout(roots, [name for name in inside if name not in names.values()], plain)


def folders(root: Path) -> list[str]:
    """Names of the folders in `root`, hidden ones left out. Raises UserError where there are none."""
    with reading():
        names = sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and not is_hidden(entry.name))
    if not names:
        raise UserError(f"{root} has no class folders. Put the images of each class into a folder named after it.")
    return sorted(names, key=int) if all(map(str.isdecimal, names)) else names  # 2 before 10: the names are the labels


def is_hidden(name: str) -> bool:
    """Whether an entry is none of the user's: checkpoints of notebooks, what file managers leave behind."""
    return name.startswith(".") or name in HIDDEN


def chosen(part: str, named: Mapping[str, str | bool | None], available: Sequence[str], where: str) -> str | None:
    """Which of the available splits or folders is this part, None for none; what is named for one part is no other.

    Raises UserError for a name that is not there, and where several have a usual name of the part.
    """
    name = named.get(part)
    if name is None:
        usual = [name for name in available if part_of(name) == part and name not in named.values()]
        if len(usual) > 1:
            raise UserError(
                f"{where} has {' and '.join(usual)}, and each may be the {part} part. Say which one is: {part}: "
                f"<name>, or {part}: false for none."
            )
        return usual[0] if usual else None
    if name is not False and name not in available:
        raise UserError(f"{where} has no {part} part called {name!r}. It has: {', '.join(available) or 'nothing'}.")
    return str(name) if name else None


def part_of(name: str) -> str | None:
    """The part that a folder or split of this name usually is."""
    return next((part for part, names in USUAL.items() if name.lower() in names), None)


def is_divided(root: Path, inside: Sequence[str]) -> bool:
    """Whether the folders are parts rather than classes. Raises UserError where they may be either."""
    parts = {name: part_of(name) for name in inside if part_of(name)}
    like = [name for name in inside if name in parts or LIKE.fullmatch(name.lower())]
    clear = len(parts) == len(inside) or {"train", "test"} <= {*parts.values()}
    if clear and len(like) == len(parts):
        return True
    deep = [name for name in inside if _holds_folders(root / name)]
    nested = [name for name in deep if HAS_WORD.fullmatch(name.lower())]
    if clear or len(like) == len(inside) or nested:
        raise UserError(
            f"{root} has the folders {some(inside, 6)}: {some(like or nested)} may be splits of the data set or "
            f"classes. Say which is which: train: <folder>, test: <folder>, val: <folder>; or move the class folders "
            f"into one folder of their own."
        )
    shared = folders(root / deep[0]) if len(deep) == len(inside) > 1 else []
    if len(shared) > 1 and all(folders(root / name) == shared for name in deep):
        raise UserError(
            f"{root} has the folders {some(inside, 6)}, and each of them holds {some(shared, 6)}: they may be parts of "
            f"the data set, such as domains, or classes. Name the part: train: <folder>, test: <folder>; or, if they "
            f"are classes, move them into one folder called train."
        )
    return False  # a class may be called "train"


def check_names(root: Path, classes: Sequence[str]) -> None:
    """Raises UserError for a single class folder, and for folders that hold images and their annotations."""
    if len(classes) < 2 or {name.lower() for name in classes} <= {IMAGES, *BESIDE_IMAGES}:
        raise UserError(
            f"The class folders of {root} would be {', '.join(classes)}. A task needs two classes or more, a folder of "
            f"images for each. If the class folders lie deeper, name the folder that holds them."
        )


def _inside_images(folder: Path) -> Path:
    """The folder `images` where all others beside it are known to hold no images."""
    inside = {name.lower(): name for name in folders(folder)}
    only = IMAGES in inside and {*inside} <= {IMAGES, *BESIDE_IMAGES}
    return folder / inside[IMAGES] if only and _holds_folders(folder / inside[IMAGES]) else folder


def _holds_folders(folder: Path) -> bool:
    """Whether there are folders inside and no images beside them."""
    entries = [entry for entry in os.scandir(folder) if not is_hidden(entry.name)]
    return any(map(os.DirEntry.is_dir, entries)) and not any(e.name.lower().endswith(ENDINGS) for e in entries)
