"""What has been scored so far, on disk: a kill in the middle of a task costs the last half minute."""

import shutil
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load, save
from torch import Tensor

from merging.cache import Cache, key_of


class Page:
    """Predictions [done], or [done, S] of S models, and mean gate weights [done, G] of a task's split, by batches."""

    def __init__(self, cache: Cache | None, key: str, seconds: float):
        self._cache, self._key, self._seconds, self._written = cache, key, seconds, time.monotonic()
        stored = cache.get(key) if cache is not None else None
        found = load(stored) if stored is not None else {}
        self.predicted = [found["predicted"]] if "predicted" in found else []
        self.weights = [found["weights"]] if "weights" in found else []

    @property
    def done(self) -> int:
        """Images that need not be scored again."""
        return sum(map(len, self.predicted))

    def add(self, predicted: Tensor, weights: Tensor | None) -> None:
        """Note a batch; what has come together is stored from time to time."""
        self.predicted.append(predicted.cpu())
        if weights is not None:
            self.weights.append(weights.float().cpu())
        if time.monotonic() - self._written >= self._seconds:
            self.store()

    def store(self) -> None:
        """Write what there is."""
        self._written = time.monotonic()
        if self._cache is not None and self.predicted:
            parts = {"predicted": self.predicted} | ({"weights": self.weights} if self.weights else {})
            self._cache.put(self._key, save({name: torch.cat(each) for name, each in parts.items()}))

    def together(self) -> tuple[Tensor, Tensor | None]:
        """Predictions [N] or [N, S], and weights [N, G]."""
        weights = torch.cat(self.weights) if self.weights else None
        return torch.cat(self.predicted) if self.predicted else torch.empty(0, dtype=torch.int64), weights


class Journal:
    """The pages of one cell, in a folder of its own; without a folder nothing is stored. made_by: the `code`."""

    def __init__(self, folder: str | Path | None = None, made_by: str = "", seconds: float = 30.0):
        self.folder, self.made_by, self.seconds = None if folder is None else Path(folder), made_by, seconds

    def page(self, *facts: object) -> Page:
        """The page of these facts, which must name everything that decides its content."""
        cache = None if self.folder is None else Cache(self.folder)
        return Page(cache, key_of("scored", self.made_by, *facts), self.seconds)

    def tensors(self, name: str, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """Named tensors made once for this cell."""
        if self.folder is None:
            return make()
        return Cache(self.folder).tensors(key_of("made", self.made_by, name), make)

    def close(self) -> None:
        """Remove all pages: the row is written."""
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)  # what is busy now is removed when its row is found again


NOWHERE = Journal()
