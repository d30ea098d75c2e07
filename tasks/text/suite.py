"""The gloss8 suite: eight tasks of real text, stored beside this file."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from tasks.split import Split, Texts
from tasks.suite import Suite, divided, known, sized
from tasks.task import LabelledTask
from tasks.text.questions import TOPICS

DATA = Path(__file__).with_name("data")
YES = ("no", "yes")
CLASSES: dict[str, Sequence[str]] = {
    "accept": ("corrupted", "as spoken"),
    "lexname": tuple(topic.removeprefix("noun.") for topic in TOPICS),
    "pos": ("noun", "verb", "adjective", "adverb"),
    "match": YES,
    "hyper": ("first is a kind of second", "second is a kind of first", "siblings"),
    "sim": (),
    "sense": YES,
    "era": (),
}
METRICS = {"accept": "matthews", "match": "f1_macro", "sim": "pearson_spearman", "era": "pearson_spearman"}


@dataclass(frozen=True)
class Stored:
    """The texts of one task. sizes: of every split, at most what is stored; a smaller one is the stored one's start."""

    task: str
    sizes: tuple[tuple[str, int], ...]

    @property
    def classes(self) -> Sequence[str]:
        return CLASSES[self.task]

    def split(self, name: str) -> Split:
        """Those of a split, in order of their number of tokens: texts of one batch are of like length."""
        return _split(self, name)

    def content(self, split: str) -> str:
        """Id of a split, without reading it."""
        return hashlib.sha256(f"{_digest(self.task)} {split} {dict(self.sizes)[split]}".encode()).hexdigest()[:16]


@cache
def _digest(task: str) -> str:
    return hashlib.sha256((DATA / f"{task}.parquet").read_bytes()).hexdigest()


@cache
def _split(stored: Stored, name: str) -> Split:
    from pyarrow import parquet

    table = parquet.read_table(DATA / f"{stored.task}.parquet", filters=[("split", "=", name)])
    rows = table.slice(0, dict(stored.sizes)[name]).to_pylist()
    rows.sort(key=lambda row: row["tokens"])
    texts = [row["text"] if row["pair"] is None else (row["text"], row["pair"]) for row in rows]
    kind = torch.int64 if stored.classes else torch.float32
    return Split(name, Texts(tuple(texts)), torch.tensor([row["label"] for row in rows], dtype=kind))


def build(name: str, tasks: Sequence[str], sizes: Mapping[str, int], held_out: Sequence[str] = ()) -> Suite:
    """The suite of the named tasks, `held_out` among them, which are scored only. Heads come with the experts.

    Raises UserError for an unknown or repeated task, where none is left to merge, and for sizes below 1.
    """
    chosen = sized(name, sizes)
    made = [
        LabelledTask(task, Stored(known(task, tuple(CLASSES), name), chosen), metrics=(METRICS.get(task, "accuracy"),))
        for task in tasks
    ]
    return divided(name, made, held_out)
