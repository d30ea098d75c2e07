"""Checkpoints in pickles (torch.save of today and of before 1.6, pickle.dump; whole modules or state dicts).

They are read in place, and nothing in them runs (merging.checkpoints.inert).
"""

import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from merging.cache import Cache
from merging.checkpoints.base import OneFile, Spec
from merging.checkpoints.file_kinds import WORKS, expect, reading
from merging.checkpoints.inert import Broken, Unsupported
from merging.checkpoints.levels import weights
from merging.checkpoints.torch_files import Reader
from merging.errors import UserError

DAMAGES = (Broken, ValueError, TypeError, LookupError, AttributeError, OverflowError, RecursionError, struct.error,
           zipfile.BadZipFile, NotImplementedError, EOFError)  # fmt: skip


class PickleFile(OneFile):
    """A pickle as a checkpoint: its instructions are read at once, its numbers on demand from a private map.

    `remarks` say in which level of a training script's dict the weights were. Raises UserError for what is missing,
    truncated, damaged, or holds no weights or those of two models.
    """

    def __init__(self, path: str | Path, cache: Cache | None = None):
        try:
            with reading(Path(path)):
                expect(Path(path), "pickle")
                super().__init__(path, cache)
                self._read()
        except Unsupported as error:
            raise UserError(f"{path} cannot be read as a checkpoint: {error}. {WORKS}") from error
        except DAMAGES as error:
            raise UserError(
                f"{path} cannot be read as a checkpoint: {error or type(error).__name__}. It may be truncated or "
                f"damaged: copy or download it again. {WORKS}"
            ) from error

    def _read(self) -> None:
        self._tensors, self.remarks = weights(Reader(self._map).root())
        if not self._tensors:
            raise Unsupported("it holds no tensors with names")
        for tensor in self._tensors.values():
            tensor.check()
        self._specs = {key: Spec(torch.Size(item.shape), item.storage.dtype) for key, item in self._tensors.items()}

    def specs(self) -> Mapping[str, Spec]:
        return self._specs

    def tensor(self, key: str) -> Tensor:
        """The tensor as stored; a copy where the file does not align it."""
        return self._tensors[key].tensor()
