"""Decoded images on disk: a split is decoded once, block by block so that a killed run goes on, then memory-mapped."""

import hashlib
import json
import logging
import os
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
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
class ToDecode:
    """One split to decode: the images `indices` of `table`, in that order, `size` pixels square."""

    task: str
    split: str
    table: Table
    indices: Tensor
    size: int

    def __str__(self) -> str:
        return f"{self.task} {self.split}"

    @property
    def bytes_each(self) -> int:
        """Of one decoded image."""
        return 3 * self.size**2


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

    def make(self, job: ToDecode, key: str) -> StoredSplit:
        """The split, decoded now unless it is there; of several processes one decodes it.

        After a kill the same call goes on behind the last whole block. Raises UserError naming the damaged images, for
        a full disk, and for a folder that cannot be written.
        """
        from filelock import FileLock

        path = self.path(job.task, job.split, key)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with _ONE_AT_A_TIME, FileLock(path.with_name(f".{path.name}.lock")):  # that of a killed one is free at once
                if not path.is_dir():
                    self._make(job, path)
        except OSError as error:
            raise UserError(
                f"Cannot decode {job} into {path.parent}: {error.strerror or error}. Free some space or choose another "
                f"folder for the decoded images; what is finished is kept."
            ) from error
        return open_split(path)

    def _make(self, job: ToDecode, path: Path) -> None:
        partial = path.with_name(f"{path.name}.partial")
        partial.mkdir(exist_ok=True)
        done = resume(partial, job.bytes_each)
        with ThreadPoolExecutor(self.workers or len(os.sched_getaffinity(0))) as pool:  # PIL needs no lock
            damaged = write_images(job, partial, done, pool)
        if damaged:
            listed = "; ".join(f"{where}: {why}" for where, why in damaged[:SHOWN])
            more = f"; and {len(damaged) - SHOWN} more" if len(damaged) > SHOWN else ""
            raise UserError(
                f"{len(damaged)} of the {len(job.indices)} images of {job} cannot be read: {listed}{more}. Replace "
                f"them, or remove them from the data set, and run the same command again: no image is skipped."
            )
        (partial / "labels.bin").write_bytes(job.table.labels[job.indices].numpy().tobytes())
        write_text(partial / "split.json", json.dumps(provenance(job, partial), indent=1))
        os.rename(partial, path)


def write_images(job: ToDecode, partial: Path, done: int, pool: ThreadPoolExecutor) -> list[Damaged]:
    """Append the images behind the first `done` to images.bin; returns the damaged ones.

    From the first damaged image on nothing more is written, but all others are still tried, to name every bad one.
    Raises UserError where the disk has too little space for them and a margin.
    """
    total, damaged = len(job.indices), []
    needed, free = (total - done) * job.bytes_each, shutil.disk_usage(partial).free
    if needed + MARGIN > free:
        raise UserError(
            f"The decoded images need {needed:,} bytes in {partial.parent}, where {free:,} bytes are free. Free some "
            f"space, name another disk (suite.store.images=<folder>), or score fewer images (suite.limit)."
        )
    detail = f"{total - done} images into {partial.parent}"
    with Progress(f"decoding {job}", total, detail) as progress, (partial / "images.bin").open("ab") as file:
        for block in job.indices[done:].split(BLOCK):
            images = list(pool.map(lambda image: decode(image, job.size), job.table.read(block.tolist())))
            damaged += [image for image in images if isinstance(image, Damaged)]
            if not damaged:
                file.write(numpy.stack(images).data)  # type: ignore[arg-type]
                file.flush()
                os.fsync(file.fileno())
                write_text(partial / "done", str(file.tell() // job.bytes_each))
            done += len(block)
            progress.at(done)
    return damaged


def resume(partial: Path, bytes_each: int) -> int:
    """How many images are safely there; what a kill left behind them is cut off."""
    file = partial / "images.bin"
    try:
        done = min(int((partial / "done").read_text()), file.stat().st_size // bytes_each)
    except (OSError, ValueError):
        done = 0
    with file.open("ab") as opened:
        opened.truncate(done * bytes_each)
    return done


def provenance(job: ToDecode, partial: Path) -> dict[str, object]:
    """What split.json says; the id is that of `Split`, over images and labels."""
    import PIL
    import torchvision

    digest = hashlib.sha256()
    for name in ("images.bin", "labels.bin"):
        with (partial / name).open("rb") as file:
            while piece := file.read(1 << 22):
                digest.update(piece)
    made_by = f"Pillow {PIL.__version__}, torchvision {torchvision.__version__}"
    return {"task": job.task, "split": job.split, "count": len(job.indices), "size": job.size,
            "id": digest.hexdigest()[:16], "origin": job.table.origin, "made_by": made_by}  # fmt: skip


def open_split(folder: Path) -> StoredSplit:
    """Raises UserError for a folder whose files do not belong together."""
    try:
        stored = json.loads((folder / "split.json").read_text())
        shape = (stored["count"], 3, stored["size"], stored["size"])
        images = numpy.memmap(folder / "images.bin", numpy.uint8, "c", shape=shape)  # c: writing never reaches the file
        labels = torch.from_numpy(numpy.fromfile(folder / "labels.bin", numpy.int64))
        if (folder / "images.bin").stat().st_size != images.nbytes or len(labels) != len(images):
            raise ValueError(f"it should hold {len(images)} images and labels")
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"The decoded images in {folder} are damaged ({error}). Delete this folder: the next run decodes again."
        ) from error
    return StoredSplit(stored["split"], torch.from_numpy(images), labels, stored["id"], folder)
