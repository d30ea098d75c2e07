"""Writes decoded images block by block, so that a killed run goes on where it was."""

import fcntl
import hashlib
import logging
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy
from torch import Tensor

from merging.errors import UserError
from merging.files import write_text
from tasks.progress import Progress
from tasks.vision.decode import Damaged, decode
from tasks.vision.tables import Table

BLOCK = 128  # images between two points to resume from, 19 MB at 224 pixels
MARGIN = 64 << 20  # bytes that must stay free
SHOWN = 10  # damaged images named in a message
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Wanted:
    """One split to decode: the images `indices` of `table`, in that order, `size` pixels square."""

    task: str
    split: str
    table: Table
    indices: Tensor
    size: int

    @property
    def each(self) -> int:
        """Bytes of one image."""
        return 3 * self.size**2


def write_images(wanted: Wanted, partial: Path, done: int, pool: ThreadPoolExecutor) -> list[Damaged]:
    """Append the images behind the first `done` to images.bin; returns the damaged ones.

    From the first damaged image on nothing more is written, but all others are still tried, to name every bad one.
    """
    damaged: list[Damaged] = []
    total, detail = len(wanted.indices), f"{len(wanted.indices) - done} images into {partial.parent}"
    with (
        Progress(f"decoding {wanted.task} {wanted.split}", total, detail) as progress,
        (partial / "images.bin").open("ab") as file,
    ):
        for some in wanted.indices[done:].split(BLOCK):
            found = list(pool.map(lambda each: decode(each, wanted.size), wanted.table.read(some.tolist())))
            damaged += [each for each in found if isinstance(each, Damaged)]
            if not damaged:
                file.write(numpy.stack(found).data)  # type: ignore[arg-type]
                file.flush()
                os.fsync(file.fileno())
                write_text(partial / "done", str(file.tell() // wanted.each))
            done += len(some)
            progress.at(done)
    return damaged


def resume(partial: Path, each: int) -> int:
    """How many images are safely there; what a kill left behind them is cut off."""
    file = partial / "images.bin"
    try:
        done = min(int((partial / "done").read_text()), file.stat().st_size // each)
    except (OSError, ValueError):
        done = 0
    with file.open("ab") as opened:
        opened.truncate(done * each)
    return done


def check_space(folder: Path, needed: int) -> None:
    """Raises UserError where the disk has less than `needed` bytes and a margin."""
    free = shutil.disk_usage(folder).free
    if needed + MARGIN > free:
        raise UserError(
            f"The decoded images need {needed:,} bytes in {folder.parent}, where {free:,} bytes are free. Free some "
            f"space, name another disk (suite.store.images=<folder>), or score fewer images (suite.limit)."
        )


def fingerprint(partial: Path) -> str:
    """As `Split.id`: over images and labels, read in pieces."""
    digest = hashlib.sha256()
    for name in ("images.bin", "labels.bin"):
        with (partial / name).open("rb") as file:
            while piece := file.read(1 << 22):
                digest.update(piece)
    return digest.hexdigest()[:16]


def provenance(wanted: Wanted, identity: str) -> dict[str, object]:
    """What split.json says."""
    import PIL
    import torchvision

    return {
        "task": wanted.task, "split": wanted.split, "count": len(wanted.indices), "size": wanted.size, "id": identity,
        "origin": wanted.table.origin, "made_by": f"Pillow {PIL.__version__}, torchvision {torchvision.__version__}",
    }  # fmt: skip


def complaint(wanted: Wanted, damaged: list[Damaged]) -> str:
    listed = "; ".join(f"{where}: {why}" for where, why in damaged[:SHOWN])
    rest = f"; and {len(damaged) - SHOWN} more" if len(damaged) > SHOWN else ""
    return (
        f"{len(damaged)} of the {len(wanted.indices)} images of {wanted.task} {wanted.split} cannot be read: {listed}"
        f"{rest}. Replace them, or remove them from the data set, and run the same command again: no image is skipped."
    )


@contextmanager
def locked(path: Path, wanted: Wanted) -> Iterator[None]:
    """Alone among all processes; the lock of a killed one is free at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.info("%s %s: waiting for another process that decodes it", wanted.task, wanted.split)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
