"""The image files of class folders: which there are, and which entries are left out and why."""

import os
from dataclasses import dataclass, field
from pathlib import Path

from merging.errors import UserError
from merging.preflight import some
from tasks.vision.layout import ENDINGS, folders, is_hidden

STARTS = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"GIF87a", b"GIF89a", b"II*\0", b"MM\0*", b"\0\0\0\x0cjP  ",
          b"\xff\x4f\xff\x51", *(b"P%d\n" % kind for kind in range(1, 7)))  # fmt: skip
SHOWN = 10  # dead links named in a message
BACK = "linked back into the data set"


@dataclass
class Listing:
    """What a walk through class folders has come across beside images: reason -> paths; links to nothing."""

    skipped: dict[str, list[str]] = field(default_factory=dict)
    dead: list[str] = field(default_factory=list)

    def summary(self) -> str | None:
        """What was left out, counted and named, or None."""
        parts = [f"{len(paths)} {reason} ({some(sorted({os.path.basename(path) for path in paths}))})"
                for reason, paths in self.skipped.items()]  # fmt: skip
        return f"skipped {', '.join(parts)}" if parts else None

    def check(self) -> None:
        """Raises UserError naming the links to nothing."""
        if self.dead:
            raise UserError(
                f"{len(self.dead)} links lead to no file: {some(self.dead, SHOWN)}. Put back what they point to, or "
                f"remove them: no image is left out silently."
            )

    def entries(self, folder: str | Path) -> list[os.DirEntry]:
        """What a folder holds, sorted; hidden entries and links to nothing are noted and left out."""
        kept = []
        for entry in sorted(_scan(folder), key=lambda entry: entry.name):
            if is_hidden(entry.name):
                self.skip("hidden", entry.path)
            elif entry.is_symlink() and not os.path.exists(entry.path):
                self.dead.append(entry.path)
            else:
                kept.append(entry)
        return kept

    def skip(self, reason: str, path: str) -> None:
        self.skipped.setdefault(reason, []).append(path)


def class_files(root: Path, listing: Listing) -> dict[str, list[Path]]:
    """Class -> its image files, in the order of torchvision's ImageFolder.

    Links are followed unless they lead back into what is read. Raises UserError for two classes in one folder and for
    folders that cannot be read.
    """
    whole, names, classes = os.path.realpath(root), folders(root), {}
    for entry in listing.entries(root):
        real = os.path.realpath(entry.path)
        if entry.name not in names:
            listing.skip("beside the class folders", entry.path)
        elif _holds(real, whole):
            listing.skip(BACK, entry.path)
        elif other := next((name for name, path in classes.items() if path == real), None):
            raise UserError(
                f"The class folders {other} and {entry.name} of {root} are the same folder, {real}. Remove one of the "
                f"links."
            )
        else:
            classes[entry.name] = real
    return {name: _images(root / name, [whole, *classes.values()], listing) for name in names if name in classes}


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


def _images(folder: Path, seen: list[str], listing: Listing) -> list[Path]:
    """All image files below a class folder; `seen`: real paths of the folders that are read anyway."""
    waiting, read = [str(folder)], []
    while waiting:
        here, files = waiting.pop(), []
        for entry in listing.entries(here):
            real = os.path.realpath(entry.path)
            if entry.is_dir() and entry.is_symlink() and any(_holds(real, a) or _holds(a, real) for a in seen):
                listing.skip(BACK, entry.path)
            elif entry.is_dir():
                waiting.append(entry.path)
                seen += [real] if entry.is_symlink() else []
            elif entry.is_file() and _is_readable_image(entry.path):
                files.append(Path(entry.path))
            else:
                listing.skip("no image", entry.path)
        read.append((here, files))
    return [path for _, files in sorted(read) for path in files]


def _scan(folder: str | Path) -> list[os.DirEntry]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError as error:
        raise _unreadable(folder, error) from error


def _is_readable_image(path: str) -> bool:
    try:
        return is_image(path)
    except OSError as error:
        raise _unreadable(path, error) from error


def _unreadable(path: str | Path, error: OSError) -> UserError:
    return UserError(f"Cannot read {path}: {error.strerror}. Make it readable, or move it out of the data set.")


def _holds(outer: str, inner: str) -> bool:
    """Whether a folder is `inner` or contains it, by real paths."""
    return inner == outer or inner.startswith(os.path.join(outer, ""))
