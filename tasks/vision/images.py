"""Decoded images on disk: a split is decoded once, then mapped into memory."""

import hashlib
import json
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy
import torch

from merging.errors import UserError
from merging.files import write_text
from tasks.split import Split
from tasks.vision.writing import (
    Wanted,
    check_space,
    complaint,
    fingerprint,
    locked,
    provenance,
    resume,
    write_images,
)

FORMAT = 2  # raised with every change of what decode() gives
_ONE_AT_A_TIME = threading.Lock()  # within this process; several splits at once would only share the same cores


@dataclass(frozen=True)
class StoredSplit(Split):
    """A split whose images are a memory map. Sent to another process as its path, not as its images."""

    folder: Path = field(default_factory=Path)

    def __reduce__(self):
        return open_split, (self.folder,)


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
        done = resume(partial, wanted.each)
        check_space(partial, (len(wanted.indices) - done) * wanted.each)
        workers = self.workers or len(os.sched_getaffinity(0))
        with ThreadPoolExecutor(workers) as pool:  # PIL decodes and resizes without Python's lock
            damaged = write_images(wanted, partial, done, pool)
        if damaged:
            raise UserError(complaint(wanted, damaged))
        labels = wanted.table.labels[wanted.indices]
        (partial / "labels.bin").write_bytes(labels.numpy().tobytes())
        write_text(partial / "split.json", json.dumps(provenance(wanted, fingerprint(partial)), indent=1))
        os.rename(partial, path)


def open_split(folder: Path) -> StoredSplit:
    """Raises UserError for a folder whose files do not belong together."""
    try:
        said = json.loads((folder / "split.json").read_text())
        shape, count = (said["count"], 3, said["size"], said["size"]), said["count"]
        images = numpy.memmap(folder / "images.bin", numpy.uint8, "c", shape=shape)  # c: writing never reaches the file
        labels = torch.from_numpy(numpy.fromfile(folder / "labels.bin", numpy.int64))
        if (folder / "images.bin").stat().st_size != images.nbytes or len(labels) != count:
            raise ValueError(f"it should hold {count} images and labels")
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"The decoded images in {folder} are damaged ({error}). Delete this folder: the next run decodes again."
        ) from error
    return StoredSplit(said["split"], torch.from_numpy(images), labels, said["id"], folder)
