"""Decoded images on disk: a split is decoded once, block by block so that a killed run goes on, then memory-mapped."""

import fcntl
import hashlib
import json
import logging
import os
import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy
import torch
from torch import Tensor

from merging.errors import UserError
from merging.files import write_text
from tasks.progress import Progress
from tasks.split import Split
from tasks.vision.decode import Damaged, decode
from tasks.vision.sources import Table

FORMAT = 2  # raised with every change of what decode() gives
BLOCK = 128  # images between two points to resume from, 19 MB at 224 pixels
MARGIN = 64 << 20  # bytes that must stay free
SHOWN = 10  # damaged images named in a message
_ONE_AT_A_TIME = threading.Lock()  # within this process; several splits at once would only share the same cores
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class StoredSplit(Split):
    """A split whose images are a memory map. Sent to another process as its path, not as its images."""

    folder: Path = field(default_factory=Path)

    def __reduce__(self):
        return open_split, (self.folder,)


@dataclass(frozen=True)
class Wanted:
    """One split to decode: the images `indices` of `table`, in that order, `size` pixels square."""

    task: str
    split: str
    table: Table
    indices: Tensor
    size: int


@dataclass(frozen=True)
class Images:
    """The folder of all decoded splits. `workers` decode at once; None is one per core."""

    folder: Path
    workers: int | None = None

    def path(self, task: str, split: str, key: str) -> Path:
        """Where the split made from `key` lies, present or not."""
        return self.folder / task / f"{split}-{hashlib.sha256(f'{FORMAT} {key}'.encode()).hexdigest()[:12]}"

    def find(self, task: str, split: str, key: str) -> StoredSplit | None:
        """The finished split, None where it is yet to be decoded."""
        path = self.path(task, split, key)
        return open_split(path) if path.is_dir() else None

    def make(self, wanted: Wanted, key: str) -> StoredSplit:
        """The split, decoded now unless it is there.

        After a kill the same call goes on behind the last whole block. Raises UserError naming the damaged images, for
        a full disk, and for a folder that cannot be written.
        """
        path = self.path(wanted.task, wanted.split, key)
        try:
            with _ONE_AT_A_TIME, locked(path.with_name(f".{path.name}.lock"), wanted):
                if not path.is_dir():
                    self._make(wanted, path)
        except OSError as error:
            raise UserError(
                f"Cannot decode {wanted.task} {wanted.split} into {path.parent}: {error.strerror or error}. Free some "
                f"space or choose another folder for the decoded images; what is finished is kept."
            ) from error
        return open_split(path)

    def _make(self, wanted: Wanted, path: Path) -> None:
        partial = path.with_name(f"{path.name}.partial")
        partial.mkdir(exist_ok=True)
        done = resume(partial, 3 * wanted.size**2)
        with ThreadPoolExecutor(self.workers or len(os.sched_getaffinity(0))) as pool:  # PIL needs no lock
            damaged = write_images(wanted, partial, done, pool)
        if damaged:
            listed = "; ".join(f"{where}: {why}" for where, why in damaged[:SHOWN])
            more = f"; and {len(damaged) - SHOWN} more" if len(damaged) > SHOWN else ""
            raise UserError(
                f"{len(damaged)} of the {len(wanted.indices)} images of {wanted.task} {wanted.split} cannot be read: "
                f"{listed}{more}. Replace them, or remove them from the data set, and run the same command again: no "
                f"image is skipped."
            )
        (partial / "labels.bin").write_bytes(wanted.table.labels[wanted.indices].numpy().tobytes())
        write_text(partial / "split.json", json.dumps(provenance(wanted, partial), indent=1))
        os.rename(partial, path)


def write_images(wanted: Wanted, partial: Path, done: int, pool: ThreadPoolExecutor) -> list[Damaged]:
    """Append the images behind the first `done` to images.bin; returns the damaged ones.

    From the first damaged image on nothing more is written, but all others are still tried, to name every bad one.
    Raises UserError where the disk has too little space for them and a margin.
    """
    each, total, damaged = 3 * wanted.size**2, len(wanted.indices), []
    needed, free = (total - done) * each, shutil.disk_usage(partial).free
    if needed + MARGIN > free:
        raise UserError(
            f"The decoded images need {needed:,} bytes in {partial.parent}, where {free:,} bytes are free. Free some "
            f"space, name another disk (suite.store.images=<folder>), or score fewer images (suite.limit)."
        )
    what, detail = f"decoding {wanted.task} {wanted.split}", f"{total - done} images into {partial.parent}"
    with Progress(what, total, detail) as progress, (partial / "images.bin").open("ab") as file:
        for some in wanted.indices[done:].split(BLOCK):
            images = list(pool.map(lambda image: decode(image, wanted.size), wanted.table.read(some.tolist())))
            damaged += [image for image in images if isinstance(image, Damaged)]
            if not damaged:
                file.write(numpy.stack(images).data)  # type: ignore[arg-type]
                file.flush()
                os.fsync(file.fileno())
                write_text(partial / "done", str(file.tell() // each))
            done += len(some)
            progress.at(done)
    return damaged


def resume(partial: Path, each: int) -> int:
    """How many images of `each` bytes are safely there; what a kill left behind them is cut off."""
    file = partial / "images.bin"
    try:
        done = min(int((partial / "done").read_text()), file.stat().st_size // each)
    except (OSError, ValueError):
        done = 0
    with file.open("ab") as opened:
        opened.truncate(done * each)
    return done


def provenance(wanted: Wanted, partial: Path) -> dict[str, object]:
    """What split.json says; the id is that of `Split`, over images and labels."""
    import PIL
    import torchvision

    digest = hashlib.sha256()
    for name in ("images.bin", "labels.bin"):
        with (partial / name).open("rb") as file:
            while piece := file.read(1 << 22):
                digest.update(piece)
    return {
        "task": wanted.task, "split": wanted.split, "count": len(wanted.indices), "size": wanted.size,
        "id": digest.hexdigest()[:16], "origin": wanted.table.origin,
        "made_by": f"Pillow {PIL.__version__}, torchvision {torchvision.__version__}",
    }  # fmt: skip


def open_split(folder: Path) -> StoredSplit:
    """Raises UserError for a folder whose files do not belong together."""
    try:
        stored = json.loads((folder / "split.json").read_text())
        shape, count = (stored["count"], 3, stored["size"], stored["size"]), stored["count"]
        images = numpy.memmap(folder / "images.bin", numpy.uint8, "c", shape=shape)  # c: writing never reaches the file
        labels = torch.from_numpy(numpy.fromfile(folder / "labels.bin", numpy.int64))
        if (folder / "images.bin").stat().st_size != images.nbytes or len(labels) != count:
            raise ValueError(f"it should hold {count} images and labels")
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"The decoded images in {folder} are damaged ({error}). Delete this folder: the next run decodes again."
        ) from error
    return StoredSplit(stored["split"], torch.from_numpy(images), labels, stored["id"], folder)


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
