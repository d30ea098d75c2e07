"""Entries of the task vectors of all experts, in pieces that stay in a core's cache."""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from merging.experts import Experts
from merging.ops import PIECE
from merging.threads import Scratch, workers


class Entry(NamedTuple):
    """One entry of a parameter, counted over its flattened numbers."""

    key: str
    first: int


def sweep(experts: Experts, work: Callable[[Entry, Tensor], Any], keys: Sequence[str] | None = None) -> Iterator[Any]:
    """What `work` makes of tau [T, n] of every parameter, piece by piece, in order; all cores work at once.

    A piece is named by its first entry; it is one buffer used again for the next: copy what is to be kept.
    """
    scratch, tasks = Scratch(), len(experts.tasks)

    def one(flats: Sequence[Tensor], key: str, first: int) -> Any:
        base, *others = (flat[first : first + PIECE].float() for flat in flats)
        tau = scratch.like(base.expand(tasks, -1))
        for row, expert in zip(tau, others, strict=True):
            torch.sub(expert, base, out=row)
        if not math.isfinite(tau.sum()):
            for task, row in enumerate(tau):
                experts.check_finite(key, task, row)
        return work(Entry(key, first), tau)

    specs = experts.specs()
    with workers() as run:
        for key in experts.keys() if keys is None else keys:
            firsts, flats = range(0, specs[key].shape.numel(), PIECE), experts.flat(key)
            yield from run(partial(one, flats, key), firsts)
            flats.clear()  # a worker may hold its last piece a moment longer than its result is awaited
            experts.release()


def entrywise(experts: Experts, merge: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """`merge(tau)` [n] of tau [T, n], for a method that looks at one entry of all experts at a time."""
    merged = {key: torch.empty(spec.shape) for key, spec in experts.specs().items()}

    def work(entry: Entry, tau: Tensor) -> None:
        merged[entry.key].view(-1)[entry.first : entry.first + tau.shape[1]] = merge(tau)

    for _ in sweep(experts, work):
        pass
    return merged
