"""The gloss8 suite: eight tasks of real text, stored beside this file."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

from tasks.split import Split, Texts
from tasks.suite import Suite, divided, known, sized
from tasks.task import LabelledTask
from tasks.text.questions import TOPICS
from tasks.text.stored import Stored

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
class Questions(Stored):
    """The texts of one task and their labels, in order of their tokens: those of one batch are of like length."""

    folder: ClassVar[Path] = DATA

    @property
    def classes(self) -> Sequence[str]:
        return CLASSES[self.task]

    def made(self, name: str, rows: Sequence[Mapping[str, Any]]) -> Split:
        rows = sorted(rows, key=lambda row: row["tokens"])
        texts = [row["text"] if row["pair"] is None else (row["text"], row["pair"]) for row in rows]
        kind = torch.int64 if self.classes else torch.float32
        return Split(name, Texts(tuple(texts)), torch.tensor([row["label"] for row in rows], dtype=kind))


def build(name: str, tasks: Sequence[str], sizes: Mapping[str, int], held_out: Sequence[str] = ()) -> Suite:
    """The suite of the named tasks, `held_out` among them, which are scored only. Heads come with the experts.

    Raises UserError for an unknown or repeated task, where none is left to merge, and for sizes below 1.
    """
    chosen = sized(name, sizes)
    made = [
        LabelledTask(
            task, Questions(known(task, tuple(CLASSES), name), chosen), metrics=(METRICS.get(task, "accuracy"),)
        )
        for task in tasks
    ]
    return divided(name, made, held_out)
