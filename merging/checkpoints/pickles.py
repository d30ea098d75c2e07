"""Checkpoints in pickles (torch.save of today and of before 1.6, pickle.dump; whole modules or state dicts).

They are read in place, and nothing in them runs (merging.checkpoints.inert).
"""

import mmap
import struct
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from merging.cache import Cache
from merging.checkpoints.base import OneFile, Spec
from merging.checkpoints.file_kinds import WORKS, expect, reading
from merging.checkpoints.inert import Broken, Unsupported
from merging.checkpoints.levels import weights
from merging.checkpoints.torch_files import Map, Reader
from merging.errors import UserError

DAMAGES = (Broken, ValueError, TypeError, LookupError, AttributeError, OverflowError, RecursionError, struct.error,
           zipfile.BadZipFile, NotImplementedError, EOFError)  # fmt: skip


@contextmanager
def _mapped(path: Path) -> Iterator[Map]:
    """The file, mapped privately; what is wrong with it becomes a UserError."""
    try:
        with reading(path), path.open("rb") as file:
            expect(path, "pickle")
            yield Map(file.fileno(), 0, access=mmap.ACCESS_COPY)
    except Unsupported as error:
        raise UserError(f"{path} cannot be read as a checkpoint: {error}. {WORKS}") from error
    except DAMAGES as error:
        raise UserError(
            f"{path} cannot be read as a checkpoint: {error or type(error).__name__}. It may be truncated or damaged: "
            f"copy or download it again. {WORKS}"
        ) from error


def inert_state(path: str | Path) -> dict[str, Tensor]:
    """The state dict in a pickle, without running anything in it; tensors are views of a private map of the file.

    Raises UserError for what is missing, truncated, damaged or holds no weights.
    """
    file = PickleFile(path)
    return {key: file.tensor(key) for key in file.specs()}


class PickleFile(OneFile):
    """A pickle as a checkpoint: its instructions are read at once, its numbers on demand from a private map.

    `remarks` say in which level of a training script's dict the weights were. `id` is the sha256 of the file. Raises
    UserError for what is missing, truncated, damaged, or holds no weights or those of two models.
    """

    def __init__(self, path: str | Path, cache: Cache | None = None):
        self.path = Path(path)
        with _mapped(self.path) as self._map:
            super().__init__(path, cache)
            self._views, self.remarks = weights(Reader(self._map).root())
            if not self._views:
                raise Unsupported("it holds no tensors with names")
            for view in self._views.values():
                view.check()

    def specs(self) -> Mapping[str, Spec]:
        return {key: Spec(torch.Size(view.shape), view.storage.dtype) for key, view in self._views.items()}

    def tensor(self, key: str) -> Tensor:
        """The tensor as stored; a copy where the file does not align it."""
        return self._views[key].tensor()

    def release(self) -> None:
        """Hand the pages read so far back to the system; a later use reads them again."""
        self._map.madvise(mmap.MADV_DONTNEED)
