"""Questions of one task in a parquet file beside the code that reads them."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

from tasks.split import Split


@dataclass(frozen=True)
class Stored:
    """The questions of one task. sizes: of every split, at most what is stored; a smaller one is the start of it.

    A subclass says in which folder they are, and what it makes of their rows.
    """

    task: str
    sizes: tuple[tuple[str, int], ...]
    folder: ClassVar[Path]
    asked: ClassVar[Mapping[str, str]] = {}  # task -> what is put around its texts

    def split(self, name: str) -> Split:
        """Those of a split."""
        return _split(self, name)

    def made(self, name: str, rows: Sequence[Mapping[str, Any]]) -> Split:
        """Of the rows of the file."""
        raise NotImplementedError

    def content(self, split: str) -> str:
        """Id of a split, without reading it."""
        asked = [self.asked[self.task]] if self.task in self.asked else []
        facts = [_digest(self.folder / f"{self.task}.parquet"), *asked, split, str(dict(self.sizes)[split])]
        return hashlib.sha256(" ".join(facts).encode()).hexdigest()[:16]


@cache
def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


@cache
def _split(stored: Stored, name: str) -> Split:
    from pyarrow import parquet

    table = parquet.read_table(stored.folder / f"{stored.task}.parquet", filters=[("split", "=", name)])
    return stored.made(name, table.slice(0, dict(stored.sizes)[name]).to_pylist())
