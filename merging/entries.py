"""Entries of the task vectors of all experts, in pieces that stay in a core's cache."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor

from merging.checkpoints import Flat
from merging.combined import Changes, Combined, Computed, Mix, terms
from merging.deltas import LowRank
from merging.experts import Experts
from merging.ops import BLOCK, PIECE, SPAN, rows
from merging.sparsifiers import ByRow, height
from merging.threads import Scratch, in_order

KEPT = 1 << 30  # bytes of changes that are kept in memory; more are computed from files whenever they are asked for
Fill = Callable[[int, Tensor], None]  # (first entry, rows [T, n] to be written), called in order


class Entry(NamedTuple):
    """One entry of a parameter, counted over its flattened numbers."""

    key: str
    first: int


Merge = Callable[[Entry, Tensor], Tensor]  # of the entries from one on, tau [T, n], what is merged [n]


def blocks(sizes: Mapping[str, int]) -> Iterator[Entry]:
    """The first entries of all blocks of parameters of these sizes."""
    return (Entry(key, first) for key, size in sizes.items() for first in range(0, size, BLOCK))


def sweep(experts: Experts, work: Callable[[Entry, Tensor], Any], keys: Sequence[str] | None = None) -> Iterator[Any]:
    """What `work` makes of tau [T, n] of every parameter, piece by piece, in order; all cores work at once.

    A piece is named by its first entry; it is one buffer used again for the next: copy what is to be kept.
    """
    scratch = Scratch()
    sizes = {key: spec.shape.numel() for key, spec in experts.specs().items() if keys is None or key in keys}

    def one(block: Entry) -> list[Any]:
        last = min(block.first + BLOCK, sizes[block.key])
        return [work(entry, tau) for entry, tau in _pieces(experts, *block, last, scratch)]

    return chain.from_iterable(in_order(one, blocks(sizes)))


def _pieces(experts: Experts, key: str, first: int, last: int, scratch: Scratch) -> Iterator[tuple[Entry, Tensor]]:
    """Entries [first, last) of all task vectors of a parameter. Raises UserError for a number that is not finite."""
    fill = filling(experts, key, first)
    for start in range(first, last, PIECE):
        tau = scratch.of((len(experts.tasks), min(PIECE, last - start)))
        fill(start, tau)
        if not math.isfinite(tau.sum()):
            for task, row in enumerate(tau):
                experts.check_finite(key, task, row)
        yield Entry(key, start), tau
        if (start + PIECE) % SPAN == 0:
            experts.release()
    experts.release()


def filling(experts: Experts, key: str, first: int = 0) -> Fill:
    """What writes the entries of all task vectors of a parameter, from `first` on, into rows [T, n].

    `first` is a multiple of BLOCK where sparsifiers draw at random.
    """
    along = [sparsifier.along for sparsifier in experts.sparsifiers if hasattr(sparsifier, "along")]
    by_row = [sparsifier for sparsifier in experts.sparsifiers if isinstance(sparsifier, ByRow)]
    if len(experts.sparsifiers) not in (len(along), len(by_row)):  # one looks at a whole parameter, or they are mixed
        tau = rows(experts.tau(key))
        return partial(_subtract, [torch.zeros(tau.shape[1]), *tau])
    if (delta := experts.factors(key)) is not None:
        fill = partial(_multiply, [delta.factors(task) for task in range(delta.parts)])
    else:
        fill = partial(_subtract, experts.flat(key))
    if by_row and (shape := experts.specs()[key].shape):
        return _Rows(experts, key, shape, fill, by_row)
    if not along:
        return fill
    return partial(_sparsify, fill, [[begin(key, task, first) for begin in along] for task in experts.tasks])


class _Rows:
    """A Fill through sparsifiers that look at whole rows: as many as they see at a time are held."""

    def __init__(self, experts: Experts, key: str, shape: torch.Size, fill: Fill, sparsifiers: Sequence[ByRow]):
        self.experts, self.key, self.fill, self.sparsifiers = experts, key, fill, sparsifiers
        self.size, self.width, self.height = shape.numel(), shape[-1], height(shape[-1])
        self.held, self.first = torch.empty(len(experts.tasks), 0), 0  # sparsified entries, and which is their first

    def __call__(self, first: int, out: Tensor) -> None:
        filled, unit = 0, self.height * self.width
        while filled < out.shape[1]:
            start = first + filled
            if not self.first <= start < self.first + self.held.shape[1]:
                self._hold(start // unit * unit, min(unit, self.size - start // unit * unit))
            piece = self.held[:, start - self.first :][:, : out.shape[1] - filled]
            out[:, filled : filled + piece.shape[1]] = piece
            filled += piece.shape[1]

    def _hold(self, first: int, count: int) -> None:
        self.first, self.held = first, torch.empty(len(self.experts.tasks), count)
        self.fill(first, self.held)
        for index, (task, tau) in enumerate(zip(self.experts.tasks, self.held, strict=True)):
            self.experts.check_finite(self.key, index, tau)
            for sparsifier in self.sparsifiers:
                rows = sparsifier.rows(self.key, task, first // self.width, tau.view(-1, self.width))
                tau.copy_(rows.view(-1))


def _sparsify(fill: Fill, streams: list[list[Callable[[Tensor], Tensor]]], first: int, out: Tensor) -> None:
    fill(first, out)
    for row, sparsifiers in zip(out, streams, strict=True):
        for sparsifier in sparsifiers:
            row.copy_(sparsifier(row))


def _subtract(flats: Sequence[Tensor | Flat], first: int, out: Tensor) -> None:
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


def kept(experts: Experts, keys: Iterable[str] | None = None) -> bool:
    """Whether merged entries are kept in memory: few of them, or those of models that lie in memory themselves."""
    specs = experts.specs()
    size = 4 * sum(specs[key].shape.numel() for key in (specs if keys is None else keys))
    return size <= KEPT or not all(checkpoint.files for checkpoint in (experts.origin, *experts.checkpoints))


def entrywise(experts: Experts, merge: Merge, keys: Sequence[str] | None = None) -> Changes:
    """What `merge` makes of tau [T, n], for a method that looks at one entry of all experts at a time."""
    keys = experts.keys() if keys is None else keys
    specs = experts.specs()
    if not kept(experts, keys):
        return Combined({key: Computed(partial(_spans, experts, merge, key), specs[key].shape) for key in keys})
    merged = {key: torch.empty(specs[key].shape) for key in keys}

    def work(entry: Entry, tau: Tensor) -> None:
        merged[entry.key].view(-1)[entry.first : entry.first + tau.shape[1]] = merge(entry, tau)

    for _ in sweep(experts, work, keys):
        pass
    return merged


def _spans(experts: Experts, merge: Merge, key: str, first: int, last: int) -> Iterator[Tensor]:
    """Merged entries [first, last) of a parameter, from a multiple of BLOCK on, SPAN at a time, in one buffer."""
    buffer, filled = torch.empty(min(SPAN, last - first)), 0
    for entry, tau in _pieces(experts, key, first, last, Scratch()):
        buffer[filled : filled + tau.shape[1]] = merge(entry, tau)
        filled += tau.shape[1]
        if filled == SPAN or entry.first + tau.shape[1] == last:
            yield buffer[:filled]
            filled = 0


def by_factors(experts: Experts) -> tuple[dict[str, LowRank], list[str]]:
    """The parameters whose task vectors are known as factors, and the names of all others."""
    low_rank = {key: delta for key in experts.specs() if (delta := experts.low_rank(key)) is not None}
    return low_rank, [key for key in experts.specs() if key not in low_rank]


def combined(experts: Experts, merge: Callable[[Tensor], Tensor], weight: float | Tensor) -> Changes:
    """`merge(tau)`, which is the sum of the task vectors times `weight`, or weights [T]; of adapters as a mix."""
    low_rank, rest = by_factors(experts)
    dense = entrywise(experts, lambda _, tau: merge(tau), rest)
    if not low_rank:
        return dense
    mixes = {key: Mix(delta, weight * torch.ones(delta.parts)) for key, delta in low_rank.items() if delta.rank}
    return Combined({**terms(dense), **mixes})
