"""The mini8 suite: eight 32x32 tasks made here, seven drawn and one of real handwriting."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

from merging.cache import code
from merging.ops import generator
from tasks.heads.head import ZeroShot
from tasks.mini.digits import handwriting
from tasks.mini.generate import CLASSES, render, to_bytes
from tasks.mini.model import BASE, head
from tasks.split import Split
from tasks.suite import Suite, divided, known, sized
from tasks.task import LabelledTask

HANDWRITTEN = {"train": (0, 1000), "val": (1000, 1160), "calibration": (1160, 1400), "test": (1400, 1797)}


@dataclass(frozen=True)
class Drawn:
    """The images of one task; splits come from random streams of different names, so they are disjoint."""

    task: str
    sizes: tuple[tuple[str, int], ...]  # split -> images; the handwriting has fixed sizes instead
    seed: int = 0

    @property
    def classes(self) -> Sequence[str]:
        return CLASSES[self.task]

    def split(self, name: str) -> Split:
        return _split(self, name)

    def content(self, split: str) -> str:
        """Id of a split, by what draws it; nothing is drawn for it."""
        return _id(self.task, self.sizes, self.seed, split)


@dataclass(frozen=True)
class BaseText:
    """Zero-shot heads [classes, 128] by the text tower of the shipped base, times its logit scale."""

    def open(self, task: str, classes: Sequence[str]) -> ZeroShot:
        return ZeroShot(head(task))

    def content(self, task: str, classes: Sequence[str]) -> str:
        return _id(task, "head")


def _id(*facts: object) -> str:
    made = [code(("tasks.mini",)), hashlib.sha256(BASE.read_bytes()).hexdigest(), *facts]
    return hashlib.sha256(json.dumps(made).encode()).hexdigest()[:16]


@cache
def _split(data: Drawn, name: str) -> Split:
    if data.task == "digits":
        images, labels = handwriting()
        first, last = HANDWRITTEN[name]
        return Split(name, to_bytes(images[first:last]), labels[first:last])
    rng = generator("mini8", data.seed, data.task, name)
    return Split(name, *render(data.task, dict(data.sizes)[name], "task", rng))


def build(
    name: str, tasks: Sequence[str], sizes: Mapping[str, int], seed: int = 0, held_out: Sequence[str] = ()
) -> Suite:
    """The suite of the named tasks, `held_out` among them, which are scored only.

    Raises UserError for an unknown or repeated task, where none is left to merge, and for sizes below 1.
    """
    chosen = sized(name, sizes)
    make = lambda task: LabelledTask(task, Drawn(known(task, tuple(CLASSES), name), chosen, seed), BaseText())  # noqa: E731
    return divided(name, [make(task) for task in tasks], held_out)
