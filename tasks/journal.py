"""What has been scored so far, on disk: a kill in the middle of a task costs the last half minute."""

import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load, save
from torch import Tensor
from torch.nn.functional import pad

from merging.cache import Cache, key_of


class Page:
    """Named tensors about the samples of a task's split, batch after batch along their first axis.

    What they mean is the affair of who adds them: predictions of a model, or [N, S] of S models, gating weights.
    """

    def __init__(self, cache: Cache | None, key: str, seconds: float):
        self._cache, self._key, self._seconds, self._written = cache, key, seconds, time.monotonic()
        stored = cache.get(key) if cache is not None else None
        self._batches = {name: [tensor] for name, tensor in (load(stored) if stored is not None else {}).items()}

    @property
    def done(self) -> int:
        """Samples that need not be run again."""
        return sum(map(len, next(iter(self._batches.values()), [])))

    def add(self, tensors: Mapping[str, Tensor]) -> None:
        """Note a batch; what has come together is stored from time to time."""
        for name, tensor in tensors.items():
            self._batches.setdefault(name, []).append(tensor.cpu())
        if time.monotonic() - self._written >= self._seconds:
            self.store()

    def store(self) -> None:
        """Write what there is."""
        self._written = time.monotonic()
        if self._cache is not None and self._batches:
            self._cache.put(self._key, save(self.together()))

    def together(self) -> dict[str, Tensor]:
        """All that was added, by name."""
        return {name: joined(batches) for name, batches in self._batches.items()}


class Journal:
    """The pages of one cell, in a folder of its own; without a folder nothing is stored. made_by: the `code`."""

    def __init__(self, folder: str | Path | None = None, made_by: str = "", seconds: float = 30.0):
        self.folder, self.made_by, self.seconds = None if folder is None else Path(folder), made_by, seconds

    @property
    def cache(self) -> Cache | None:
        """What is kept of this cell."""
        return None if self.folder is None else Cache(self.folder)

    def page(self, *facts: object) -> Page:
        """The page of these facts, which must name everything that decides its content."""
        return Page(self.cache, key_of("scored", self.made_by, *facts), self.seconds)

    def tensors(self, name: str, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """Named tensors made once for this cell."""
        cache = self.cache
        return make() if cache is None else cache.tensors(key_of("made", self.made_by, name), make)

    def close(self) -> None:
        """Remove all pages: the row is written."""
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)  # what is busy now is removed when its row is found again


def joined(tensors: Sequence[Tensor], axis: int = 0) -> Tensor:
    """Put together along an axis; behind it the last one, of texts, is filled up with zeros to the longest."""
    if tensors[0].ndim > axis + 1:
        longest = max(tensor.shape[-1] for tensor in tensors)
        tensors = [pad(tensor, (0, longest - tensor.shape[-1])) for tensor in tensors]
    return torch.cat(list(tensors), axis)


NOWHERE = Journal()
