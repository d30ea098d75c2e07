"""Where labelled images come from: class folders, parquet files, data sets on the Hub."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

from merging.cache import Cache
from merging.errors import UserError
from tasks.vision.folders import FileTable, FolderSource
from tasks.vision.layout import PARTS
from tasks.vision.parts import Rule
from tasks.vision.rows import RowSource, RowTable

Table = FileTable | RowTable  # the images of one part, encoded, in a fixed order


class Source(Protocol):
    """A data set in up to three parts. Nothing is read or downloaded before it is asked for."""

    @property
    def name(self) -> str: ...
    @property
    def repo(self) -> str | None: ...  # of the Hub
    def classes(self) -> tuple[str, ...] | None: ...  # in label order; None where the data set does not say
    def table(self, part: str) -> Table | None: ...  # None where there is no such part
    def content(self, split: str, rule: Rule, ask: bool = True) -> str | None: ...  # of a split; None: only the Hub
    # knows, which is not asked
    def notes(self) -> list[str]: ...  # what a reader of its numbers should know of how it was read


@dataclass(frozen=True)
class Location:
    """Where images lie, as the user or the published facts say; see conf/suite/folder.yaml."""

    folder: str | None = None
    parquet: object = None
    hub: str | None = None
    args: tuple[str, ...] = ()
    revision: str | None = None
    image: str = "image"
    label: str = "label"
    train: str | bool | None = None
    val: str | bool | None = None
    test: str | bool | None = None

    def open(self, task: str, cache: Cache | None = None) -> Source:
        """`cache` remembers what files hold. Raises UserError unless one of folder, parquet and hub is given."""
        kinds = [name for name in ("folder", "parquet", "hub") if getattr(self, name) is not None]
        if len(kinds) != 1:
            raise UserError(
                f"The task {task} says {' and '.join(kinds) or 'none'} of folder, parquet and hub. Give exactly one of "
                f"them under suite.sources.{task}: where its images lie."
            )
        parts = {part: getattr(self, part) for part in PARTS}
        if self.folder is not None:
            return FolderSource(Path(self.folder).expanduser(), parts, cache)
        rest = {name: value for name, value in asdict(self).items() if name not in (*PARTS, "folder")}
        return RowSource(**rest, parts=parts, cache=cache)
