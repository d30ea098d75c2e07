"""The mini8 suite: eight 32x32 tasks made here, seven drawn and one of real handwriting."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

from torch import Tensor

from merging.cache import code
from merging.errors import UserError
from merging.ops import generator
from tasks.mini.digits import handwriting
from tasks.mini.generate import CLASSES, render, to_bytes
from tasks.mini.model import BASE, head
from tasks.suite import SPLITS, Split, Suite, divided, known

HANDWRITTEN = {"train": (0, 1000), "val": (1000, 1160), "calibration": (1160, 1400), "test": (1400, 1797)}


@dataclass(frozen=True)
class MiniTask:
    """One task; its splits come from random streams of different names, so they are disjoint by construction."""

    name: str
    sizes: tuple[tuple[str, int], ...]  # split -> images; the handwriting has fixed sizes instead
    seed: int = 0

    @property
    def classes(self) -> Sequence[str]:
        return CLASSES[self.name]

    def split(self, name: str) -> Split:
        return _split(self, name)

    def content(self, what: str) -> str:
        """Id of a split or the head, by what draws it; nothing is drawn for it."""
        made = [code(("tasks.mini",)), _base(), self.name, self.sizes, self.seed, what]
        return hashlib.sha256(json.dumps(made).encode()).hexdigest()[:16]

    def head(self) -> Tensor:
        """Zero-shot head [classes, 128]: text features times the base's logit scale."""
        return head(self.name)


@cache
def _base() -> str:
    """sha256 of the base, which reads the prompts."""
    return hashlib.sha256(BASE.read_bytes()).hexdigest()


@cache
def _split(task: MiniTask, name: str) -> Split:
    if task.name == "digits":
        images, labels = handwriting()
        first, last = HANDWRITTEN[name]
        return Split(name, to_bytes(images[first:last]), labels[first:last])
    return Split(
        name, *render(task.name, dict(task.sizes)[name], "task", generator("mini8", task.seed, task.name, name))
    )


def build(
    name: str, tasks: Sequence[str], sizes: Mapping[str, int], seed: int = 0, held_out: Sequence[str] = ()
) -> Suite:
    """The suite of the named tasks, `held_out` among them, which are scored only.

    Raises UserError for an unknown or repeated task, where none is left to merge, and for sizes below 1.
    """
    if extra := sorted(set(sizes) - set(SPLITS)):
        raise UserError(f"suite.sizes has {', '.join(extra)}, which is no split. Splits are {', '.join(SPLITS)}.")
    for split in SPLITS:
        if sizes.get(split, 0) < 1:
            raise UserError(
                f"suite.sizes.{split}={sizes.get(split)} leaves the split {split} of {name} empty. "
                f"Give at least 1 image."
            )
    chosen = tuple((split, int(sizes[split])) for split in SPLITS)
    return divided(name, [MiniTask(known(task, tuple(CLASSES), name), chosen, seed) for task in tasks], held_out)
