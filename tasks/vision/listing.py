"""The image files of class folders: which there are, and which entries are left out and why."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from merging.errors import UserError
from merging.preflight import some

ENDINGS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")  # what torchvision reads
HIDDEN = ("__MACOSX", "@eaDir", "lost+found", "Thumbs.db", "desktop.ini")  # and all that begin with a dot
STARTS = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"GIF87a", b"GIF89a", b"II*\0", b"MM\0*", b"\0\0\0\x0cjP  ",
          b"\xff\x4f\xff\x51", *(b"P%d\n" % kind for kind in range(1, 7)))  # fmt: skip
SHOWN = 10  # dead links named in a message


@dataclass
class Listing:
    """What a walk through class folders has come across beside images: reason -> paths."""

    skipped: dict[str, list[Path]] = field(default_factory=dict)
    dead: list[Path] = field(default_factory=list)  # links to nothing

    def skip(self, reason: str, path: str) -> None:
        """Note an entry that is left out."""
        self.skipped.setdefault(reason, []).append(Path(path))

    def summary(self) -> str | None:
        """What was left out, counted and named, or None."""
        told = [f"{len(paths)} {reason} ({some(sorted({path.name for path in paths}))})"
                for reason, paths in self.skipped.items()]  # fmt: skip
        return f"skipped {', '.join(told)}" if told else None

    def check(self) -> None:
        """Raises UserError naming the links to nothing."""
        if self.dead:
            raise UserError(
                f"{len(self.dead)} links lead to no file: {some([str(path) for path in self.dead], SHOWN)}. Put back "
                f"what they point to, or remove them: no image is left out silently."
            )


def folders(root: Path) -> list[str]:
    """Names of the folders in `root`, hidden ones left out. Raises UserError where there are none."""
    try:
        found = sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and not is_hidden(entry.name))
    except OSError as error:
        raise UserError(f"Cannot read {root}: {error.strerror}. Give a folder of class folders.") from error
    if not found:
        raise UserError(f"{root} has no class folders. Put the images of each class into a folder named after it.")
    numbered = all(name.isdecimal() for name in found)
    return sorted(found, key=int) if numbered else found  # 2 before 10: the names are the labels


def class_files(root: Path, listing: Listing) -> dict[str, list[Path]]:
    """Class -> its image files, in the order of torchvision's ImageFolder.

    Links are followed unless they lead back into what is read. Raises UserError for two classes in one folder and for
    folders that cannot be read.
    """
    whole, classes = os.path.realpath(root), {}
    names = folders(root)
    for entry in _entries(root):
        if is_hidden(entry.name):
            listing.skip("hidden", entry.path)
        elif entry.name in names:
            classes[entry.name] = os.path.realpath(entry.path)
        elif entry.is_symlink() and not os.path.exists(entry.path):
            listing.dead.append(Path(entry.path))
        else:
            listing.skip("beside the class folders", entry.path)
    for name in [name for name, real in classes.items() if _holds(real, whole)]:
        listing.skip("linked back into the data set", str(root / name))
        del classes[name]
    _check_apart(root, classes)
    read = (whole, *classes.values())
    return {name: _images(root / name, read, listing) for name in names if name in classes}


def is_hidden(name: str) -> bool:
    """Whether an entry is none of the user's: checkpoints of notebooks, what file managers leave behind."""
    return name.startswith(".") or name in HIDDEN


def is_image(path: str) -> bool:
    """Whether a file is an image, by its ending, else by its first bytes; one that only claims so fails when decoded.

    Raises OSError for a file that cannot be read.
    """
    if path.lower().endswith(ENDINGS):
        return True
    with open(path, "rb") as file:
        start = file.read(16)
    riff = start[:4] == b"RIFF" and start[8:12] == b"WEBP"
    boxed = start[4:12] in (b"ftypavif", b"ftypheic", b"ftypmif1")
    bitmap = start[:2] == b"BM" and start[6:10] == bytes(4)
    return start.startswith(STARTS) or riff or boxed or bitmap


def _images(folder: Path, read: Sequence[str], listing: Listing) -> list[Path]:
    """All image files below a class folder; `read`: real paths of the folders that are read anyway."""
    waiting, found, seen = [str(folder)], [], [*read]
    while waiting:
        here = waiting.pop()
        files = []
        for entry in _entries(Path(here)):
            if is_hidden(entry.name):
                listing.skip("hidden", entry.path)
            elif entry.is_dir():
                if _follow(entry, seen, listing):
                    waiting.append(entry.path)
            elif entry.is_symlink() and not os.path.exists(entry.path):
                listing.dead.append(Path(entry.path))
            elif entry.is_file() and _is_readable_image(entry.path):
                files.append(Path(entry.path))
            else:
                listing.skip("no image", entry.path)
        found.append((here, files))
    return [path for _, files in sorted(found) for path in files]


def _follow(entry: os.DirEntry, seen: list[str], listing: Listing) -> bool:
    """Whether to enter a folder; a link to a folder that holds what is read, or lies in it, is a loop or a double."""
    if not entry.is_symlink():
        return True
    real = os.path.realpath(entry.path)
    if any(_holds(real, other) or _holds(other, real) for other in seen):
        listing.skip("linked back into the data set", entry.path)
        return False
    seen.append(real)
    return True


def _entries(folder: Path) -> list[os.DirEntry]:
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        raise _unreadable(folder, error) from error


def _is_readable_image(path: str) -> bool:
    try:
        return is_image(path)
    except OSError as error:
        raise _unreadable(path, error) from error


def _unreadable(path: str | Path, error: OSError) -> UserError:
    return UserError(f"Cannot read {path}: {error.strerror}. Make it readable, or move it out of the data set.")


def _check_apart(root: Path, classes: dict[str, str]) -> None:
    """Raises UserError where two class folders are one and the same by links."""
    first: dict[str, str] = {}
    for name, real in classes.items():
        if (other := first.setdefault(real, name)) != name:
            raise UserError(
                f"The class folders {other} and {name} of {root} are the same folder, {real}. Remove one of the links."
            )


def _holds(outer: str, inner: str) -> bool:
    """Whether a folder is `inner` or contains it, by real paths."""
    return inner == outer or inner.startswith(os.path.join(outer, ""))
