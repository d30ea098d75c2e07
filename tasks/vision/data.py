"""The images of one task, decoded when they are asked for."""

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from merging.errors import UserError
from tasks.heads.text import TextHead, check_prompts
from tasks.split import Split, Uncached
from tasks.task import LabelledTask
from tasks.vision.dataset_registry import DEFAULT, Facts, check_order
from tasks.vision.images import FORMAT, Images, StoredSplit, ToDecode
from tasks.vision.parts import Rule
from tasks.vision.sources import Source, Table

SCORED = ("val", "calibration", "test")  # what a run needs that trains no expert
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Store:
    """Folders of this machine: decoded images (kept), the cache (deletable), and how many threads decode."""

    images: str
    cache: str
    workers: int | None = None


class Need(NamedTuple):
    """What a task is yet to load: `images` to decode into `bytes` on disk; a repository of the Hub or a local path."""

    where: str
    kind: str  # dataset | model | local
    images: int
    bytes: int


@dataclass(frozen=True)
class VisionTask(LabelledTask):
    """A task of images with class names. Nothing is downloaded or decoded before split() and head()."""

    def split(self, name: str) -> Split:
        if isinstance(self.heads, TextHead):
            _ = self.heads.tower  # first of all, because a download takes long
        return super().split(name)

    @property
    def is_local(self) -> bool:
        """Whether nothing of it is asked of the Hub."""
        return self.data.source.repo is None and (not isinstance(self.heads, TextHead) or self.heads.tower.repo is None)

    def needs(self, splits: Sequence[str] = SCORED) -> list[Need]:
        """What these splits are yet to load, from published sizes; nothing is opened, and Hub files may be cached."""
        tower = self.heads.tower if isinstance(self.heads, TextHead) else None
        head = [] if tower is None or tower.repo is None else [Need(tower.repo, "model", 0, 0)]
        return [*head, *self.data.needs(splits)]


@dataclass(frozen=True)
class VisionData(Uncached):
    """The images of one task. Raises UserError for damaged images, and labels or class names that do not fit."""

    name: str
    source: Source
    known: Facts | None  # None: a user's own task
    class_names: tuple[str, ...] | None  # None for those of the data set
    rule: Rule
    size: int  # pixels of a side
    store: Store

    def __post_init__(self) -> None:
        if self.class_names is not None:
            check_prompts(self.name, self.class_names)

    @property
    def classes(self) -> Sequence[str]:
        """As written into the prompts, in label order."""
        return self._source_classes if self.class_names is None else self.class_names

    @cached_property
    def _source_classes(self) -> tuple[str, ...]:
        names = self.source.classes()
        if names is None:
            raise UserError(
                f"The labels of {self.name} ({self.source.name}) are numbers without names. Give the class names in "
                f"their order: suite.sources.{self.name}.classes=[...]."
            )
        check_prompts(self.name, names)
        return tuple(name.replace("_", " ") for name in names)

    def split(self, name: str) -> Split:
        """Decoded on first use."""
        if name not in self._splits:
            key = str(self._key(name))
            stored = self._images.find(self.name, name, key)
            self._splits[name] = self._images.make(self._to_decode(name), key) if stored is None else stored
        return self._splits[name]

    @cached_property
    def _splits(self) -> dict[str, StoredSplit]:
        return {}

    @cached_property
    def _keys(self) -> dict[str, str]:
        return {}

    @property
    def _images(self) -> Images:
        return Images(Path(self.store.images), self.store.workers)

    def _key(self, split: str, ask: bool = True) -> str | None:
        """What the decoded images depend on; None where the Hub must be asked for it, and may not be."""
        if split not in self._keys:
            content = self.source.content(split, self.rule, ask)
            if content is None:
                return None
            self._keys[split] = json.dumps([content, self.size])
        return self._keys[split]

    def _to_decode(self, split: str) -> ToDecode:
        self._check_classes()
        if self.known is not None and self.known.variant != DEFAULT and self.known.note:
            log.warning("%s of %s: %s", self.name, self.known.variant, self.known.note)
        size = lambda part: None if (table := self.source.table(part)) is None else len(table.labels)  # noqa: E731
        part, indices = self.rule.choose(split, size, self.name)
        table = self.source.table(part)
        assert table is not None
        self._check_labels(table, part)
        return ToDecode(self.name, split, table, indices, self.size)

    def _check_classes(self) -> None:
        names = self.source.classes()
        if self.known is not None and self.class_names == self.known.classes:
            check_order(self.known, names)
        if names is None or len(names) == len(self.classes):
            return
        message = f"{self.name} has {len(self.classes)} class names, its data set {self.source.name} has {len(names)}"
        if self.known is None or self.known.hub is None or self.source.repo != self.known.hub["id"]:
            raise UserError(f"{message}. Both need the same classes in the same order.")
        log.warning("%s; its labels are checked against the former", message)

    def _check_labels(self, table: Table, part: str) -> None:
        low, high, count = int(table.labels.min()), int(table.labels.max()), len(self.classes)
        if low < 0 or high >= count:
            raise UserError(
                f"The labels of {self.name} ({table.origin}) run from {low} to {high}; with {count} classes they must "
                f"lie in 0 to {count - 1}."
            )
        published = None if self.known is None else self.known.sizes.get(part)
        if published not in (None, len(table.labels)):
            log.warning("%s: %s has %d images, published are %d", self.name, table.origin, len(table.labels), published)

    def content(self, split: str) -> str:
        """Id of a split, by what it is decoded from."""
        return hashlib.sha256(f"{FORMAT} {self._key(split)}".encode()).hexdigest()[:16]

    def notes(self) -> list[str]:
        """What a reader of the numbers should know of how the images were read."""
        return self.source.notes()

    def needs(self, splits: Sequence[str]) -> list[Need]:
        """What these splits are yet to load, from published sizes; nothing is opened."""
        if self.source.repo is None:
            self._check_classes()
        keys = {split: self._key(split, ask=False) for split in splits}
        missing = [split for split, key in keys.items()
                   if key is None or self._images.find(self.name, split, key) is None]  # fmt: skip
        if not missing:
            return []
        sizes = self.known.sizes if self.known is not None else {}
        count = sum(len(self.rule.choose(split, sizes.get, self.name).indices) for split in missing) if sizes else 0
        kind = "local" if self.source.repo is None else "dataset"
        return [Need(self.source.repo or self.source.name, kind, count, count * 3 * self.size**2)]
