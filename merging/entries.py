"""Entries of the task vectors of all experts, in pieces that stay in a core's cache."""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from merging.combined import Changes, Combined, Mix
from merging.experts import Experts
from merging.ops import PIECE
from merging.threads import Scratch, workers

Fill = Callable[[int, Tensor], None]  # (first entry, rows [T, n] to be written)


class Entry(NamedTuple):
    """One entry of a parameter, counted over its flattened numbers."""

    key: str
    first: int


def sweep(experts: Experts, work: Callable[[Entry, Tensor], Any], keys: Sequence[str] | None = None) -> Iterator[Any]:
    """What `work` makes of tau [T, n] of every parameter, piece by piece, in order; all cores work at once.

    A piece is named by its first entry; it is one buffer used again for the next: copy what is to be kept.
    """
    scratch, tasks = Scratch(), len(experts.tasks)

    def one(fill: Fill, size: int, key: str, first: int) -> Any:
        tau = scratch.of((tasks, min(PIECE, size - first)))
        fill(first, tau)
        if not math.isfinite(tau.sum()):
            for task, row in enumerate(tau):
                experts.check_finite(key, task, row)
        return work(Entry(key, first), tau)

    specs = experts.specs()
    with workers() as run:
        for key in experts.keys() if keys is None else keys:
            size, fill = specs[key].shape.numel(), filling(experts, key)
            yield from run(partial(one, fill, size, key), range(0, size, PIECE))
            fill.args[0].clear()  # a worker may hold its last piece a moment longer than its result is awaited
            experts.release()


def filling(experts: Experts, key: str) -> Fill:
    """What writes the entries of all task vectors of a parameter, from the `first` on, into rows [T, n]."""
    if (delta := experts.low_rank(key)) is not None:
        return partial(_multiply, [delta.factors(task) for task in range(delta.parts)])
    return partial(_subtract, experts.flat(key))


def _subtract(flats: list[Tensor], first: int, out: Tensor) -> None:
    """Of base and experts [size]."""
    base, *others = (flat[first : first + out.shape[1]].float() for flat in flats)
    for row, expert in zip(out, others, strict=True):
        torch.sub(expert, base, out=row)


def _multiply(factors: list[tuple[Tensor, Tensor]], first: int, out: Tensor) -> None:
    """Of factors up [m, r] and down [r, n]: only the rows of the product that hold these entries are made."""
    width, count = factors[0][1].shape[1], out.shape[1]
    start, stop = first // width, -(-(first + count) // width)
    for row, (up, down) in zip(out, factors, strict=True):
        row.copy_((up[start:stop] @ down).flatten()[first - start * width :][:count])


def entrywise(
    experts: Experts, merge: Callable[[Tensor], Tensor], keys: Sequence[str] | None = None
) -> dict[str, Tensor]:
    """`merge(tau)` [n] of tau [T, n], for a method that looks at one entry of all experts at a time."""
    keys = experts.keys() if keys is None else keys
    specs = experts.specs()
    merged = {key: torch.empty(specs[key].shape) for key in keys}

    def work(entry: Entry, tau: Tensor) -> None:
        merged[entry.key].view(-1)[entry.first : entry.first + tau.shape[1]] = merge(tau)

    for _ in sweep(experts, work, keys):
        pass
    return merged


def combined(experts: Experts, merge: Callable[[Tensor], Tensor], weight: float) -> Changes:
    """`merge(tau)`, which is the sum of the task vectors times `weight`; of adapters their factors and this weight."""
    low_rank = {key: delta for key in experts.specs() if (delta := experts.low_rank(key)) is not None}
    dense = entrywise(experts, merge, [key for key in experts.specs() if key not in low_rank])
    if not low_rank:
        return dense
    mixes = {key: Mix(delta, torch.full((delta.parts,), weight)) for key, delta in low_rank.items() if delta.rank}
    return Combined({**dense, **mixes})
