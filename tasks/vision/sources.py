"""Where labelled images come from: class folders, parquet files, data sets on the Hub."""

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, Protocol

from merging.cache import Cache
from merging.errors import UserError
from tasks.vision.folders import FileTable, FolderSource
from tasks.vision.layout import PARTS
from tasks.vision.parts import Rule
from tasks.vision.rows import RowSource, RowTable

Table = FileTable | RowTable  # the images of one part, encoded, in a fixed order
KINDS = ("folder", "parquet", "hub")
OPTIONS = {"folder", *PARTS, *(field.name for field in fields(RowSource))} - {"parts", "cache"}


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


def open_source(task: str, options: Mapping[str, Any], cache: Cache | None = None) -> Source:
    """The source that options name, as conf/suite/folder.yaml explains them; `cache` remembers what files hold.

    Raises UserError unless one of folder, parquet and hub is given.
    """
    kinds = [name for name in KINDS if options.get(name) is not None]
    if len(kinds) != 1:
        raise UserError(
            f"The task {task} says {' and '.join(kinds) or 'none'} of folder, parquet and hub. Give exactly one of "
            f"them under suite.sources.{task}: where its images lie."
        )
    parts = {part: options.get(part) for part in PARTS}
    if kinds == ["folder"]:
        return FolderSource(Path(options["folder"]).expanduser(), parts, cache)
    rest = {name: value for name, value in options.items() if name not in (*PARTS, "folder")}
    return RowSource(**rest, parts=parts, cache=cache)
