"""Labelled images where they lie: encoded, not yet decoded."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor


class Encoded(NamedTuple):
    """One image file. `where` names it in messages."""

    where: str
    content: bytes | Path


class Table(Protocol):
    """The images of one part of a data set, in a fixed order."""

    @property
    def labels(self) -> Tensor: ...  # int64 [N]
    @property
    def origin(self) -> str: ...  # for the provenance
    def read(self, indices: Sequence[int]) -> list[Encoded]: ...


@dataclass(frozen=True)
class FileTable:
    """Image files by path."""

    paths: tuple[Path, ...]
    labels: Tensor
    origin: str

    def read(self, indices: Sequence[int]) -> list[Encoded]:
        return [Encoded(str(self.paths[index]), self.paths[index]) for index in indices]


@dataclass(frozen=True)
class RowTable:
    """Rows of a `datasets.Dataset` whose images are not decoded."""

    rows: Any
    column: str
    labels: Tensor
    origin: str

    def read(self, indices: Sequence[int]) -> list[Encoded]:
        cells = self.rows[list(indices)][self.column]
        return [self._encoded(index, cell) for index, cell in zip(indices, cells, strict=True)]

    def _encoded(self, index: int, cell: Any) -> Encoded:
        """A cell is {"bytes", "path"} as the Hub stores images, plain bytes, or a path."""
        where = f"{self.origin} row {index}"
        if isinstance(cell, dict):
            path = cell.get("path")
            where += f" ({path})" if path else ""
            cell = path if cell.get("bytes") is None else cell["bytes"]
        return Encoded(where, Path(cell) if isinstance(cell, str) else b"" if cell is None else bytes(cell))


def to_labels(values: Sequence[Any], classes: Sequence[str] | None) -> Tensor:
    """int64 [N] from integers, booleans or class names. Raises KeyError for a name that is no class."""
    if classes is not None and values and isinstance(values[0], str):
        index = {name: position for position, name in enumerate(classes)}
        values = [index[value] for value in values]
    return torch.tensor([int(value) for value in values], dtype=torch.int64)
