"""Pure tensor functions shared by methods."""

import hashlib
import threading
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from merging.threads import Scratch, each

SPAN = 1 << 20  # entries of a parameter at a time, in memory that a thread uses again
BLOCK = 1 << 24  # entries that one worker takes: 64 MB in fp32
PIECE = 1 << 15  # entries of a row at a time: those of eight rows stay in a core's cache
MAGNITUDE = 0x7FFFFFFF  # a float's bits without its sign
LOW = 17  # of them the lower ones; the upper 14 are counted first
MOST = 1 << 24  # numbers that a second look is spared for: 64 MB
Counted = tuple[Hashable, list[np.ndarray]]  # a piece's name, and numbers of each of its rows
Sweep = Callable[[Callable[[Hashable, Tensor], Any]], Iterable[Any]]  # work(name, piece [T, n]) of all, in order


def generator(*parts: object) -> torch.Generator:
    """A random stream named by its parts, so that draws do not depend on order and repeat after a resume."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def rows(tau: Tensor) -> Tensor:
    """[T, *shape] seen as [T, n]; a parameter may be a single number, which `flatten(1)` refuses, or empty."""
    return tau.view(len(tau), tau.shape[1:].numel())


def by_magnitude(values: Tensor) -> Tensor:
    """Columns of every row of fp32 `values` [k, n] in the order of their magnitudes, int64 [k, n].

    The smallest comes first; of equals the later one, so that the last of the order are the first of the row.
    """
    backwards = np.arange(values.shape[1] - 1, -1, -1)
    numbers = (values.view(torch.int32).numpy() & MAGNITUDE).astype(np.int64) << 32 | backwards
    numbers.sort(1)  # of whole numbers, several times as fast as an argsort
    return torch.from_numpy(values.shape[1] - 1 - (numbers & 0xFFFFFFFF))


@dataclass(frozen=True)
class KeepLargest:
    """Keeps exactly the `count` entries of largest magnitude of each row over a whole model, seen in pieces [T, n].

    Of equal magnitudes at the threshold the earliest are kept, in the order of pieces and of entries.
    """

    threshold: Tensor  # [T] magnitude of the last entry kept
    beyond: Mapping[Hashable, Mapping[int, int]]  # piece -> row -> how many of those of exactly that magnitude are kept

    @classmethod
    def find(cls, sweep: Sweep, count: int) -> "KeepLargest":
        """Exact selection in two passes, without sorting or stacking; threads may work on the pieces.

        The bits of non-negative floats order like their values: the first pass counts the upper 14, the second the
        lower 17 of those entries that share the upper ones of the threshold.
        """
        bits, room, equal, entries, low = _ranked(sweep, count)
        if bool((equal == room).all()):
            return cls(bits.view(torch.float32), {})
        last, entries = (bits, _equal(sweep, bits.numpy())) if entries is None else (low, entries)
        return cls(bits.view(torch.float32), _beyond(entries, last.numpy(), room.numpy()))

    @cached_property
    def _below(self) -> list[float]:
        """The next smaller magnitudes."""
        return torch.nextafter(self.threshold, torch.tensor(-1.0)).tolist()

    def __call__(self, name: Hashable, piece: Tensor) -> Tensor:
        """`piece` [T, n] with the small entries set to zero, in place; `name` is that of the sweep."""
        for values, below in zip(piece, self._below, strict=True):
            torch.hardshrink(values, below, out=values)  # zeroes magnitudes up to `below`, in one sweep
        for row, kept in self.beyond.get(name, {}).items():
            equal = (piece[row].abs() == self.threshold[row]).nonzero()[:, 0]
            piece[row, equal[kept:]] = 0
        return piece


def keep_largest(values: Tensor, count: int) -> Tensor:
    """`values` [T, n] with all but the `count` largest magnitudes of each row set to zero, in place."""
    pieces = values.split(PIECE, 1)
    trim = KeepLargest.find(lambda work: each(work, range(len(pieces)), pieces), count)
    each(trim, range(len(pieces)), pieces)
    return values


class _Tally:
    """Counts [T, bins] of whole numbers below `bins`, taken in by a single thread."""

    def __init__(self, rows: int, bins: int):
        self.counts = torch.zeros(rows, bins, dtype=torch.int64)
        self._waiting: list[list[np.ndarray]] = [[] for _ in range(rows)]
        self._sizes = [0] * rows

    def add(self, row: int, numbers: np.ndarray) -> None:
        """Few numbers wait for more: every count looks at all bins."""
        if len(numbers) >= self.counts.shape[1]:
            return self._count(row, numbers)
        self._waiting[row].append(numbers.copy())
        self._sizes[row] += len(numbers)
        if self._sizes[row] >= self.counts.shape[1]:
            self._flush(row)

    def _flush(self, row: int) -> None:
        if self._waiting[row]:
            self._count(row, np.concatenate(self._waiting[row]))
        self._waiting[row], self._sizes[row] = [], 0

    def _count(self, row: int, numbers: np.ndarray) -> None:
        self.counts[row] += torch.bincount(torch.from_numpy(numbers), minlength=self.counts.shape[1])

    def total(self) -> Tensor:
        for row in range(len(self.counts)):
            self._flush(row)
        return self.counts


def magnitude_at(sweep: Sweep, ranks: Tensor) -> Tensor:
    """Magnitudes [T, K] of the entries of ranks [T, K] from the largest, 1, in every row of a model seen in pieces.

    In two passes, however many ranks.
    """
    return _ranked(sweep, ranks.flatten(), ranks.shape[1])[0].view(torch.float32).view_as(ranks)


def _ranked(
    sweep: Sweep, count: Tensor | int, kinds: int = 1
) -> tuple[Tensor, Tensor, Tensor, list[Counted] | None, Tensor]:
    """Of every row: the bits of the magnitude of rank `count` from the largest, how many entries of exactly that
    magnitude are among those, how many there are, and the lower bits of all near it (unless many) and of itself.

    kinds: how many ranks there are of each row, one after the other.
    """
    upper = _histogram(sweep, 1 << 31 - LOW, lambda bits, upper: list(upper))[0]
    high, above = _select(upper.repeat_interleave(kinds, 0), count)
    bounds = high.numpy().astype(np.int32)  # of the same type: a comparison of two is slow

    def lower(bits: np.ndarray, upper: np.ndarray) -> list[np.ndarray]:
        pieces = ((index // kinds, bound) for index, bound in enumerate(bounds))
        return [bits[row][upper[row] == bound] & (1 << LOW) - 1 for row, bound in pieces]

    counts, entries = _histogram(sweep, 1 << LOW, lower, MOST)
    low, above_low = _select(counts, count - above)
    bits = (high << LOW | low).to(torch.int32)
    return bits, count - above - above_low, counts.gather(1, low[:, None])[:, 0], entries, low


def _histogram(
    sweep: Sweep, bins: int, numbers: Callable[[np.ndarray, np.ndarray], list[np.ndarray]], most: int = 0
) -> tuple[Tensor, list[Counted] | None]:
    """Counts [R, bins] of what `numbers` makes, R arrays, of the bits [T, n] of every piece and their upper ones.

    Also the numbers themselves by piece, unless there are more than `most`.
    """
    mine, tallies, scratch = threading.local(), [], Scratch()

    def count(name: Hashable, piece: Tensor) -> Counted | None:
        bits, upper = (scratch.like(piece, which).view(torch.int32).numpy() for which in (0, 1))
        np.bitwise_and(piece.view(torch.int32).numpy(), MAGNITUDE, out=bits)
        counted = numbers(bits, np.right_shift(bits, LOW, out=upper))
        if not hasattr(mine, "tally"):
            mine.tally = _Tally(len(counted), bins)
            tallies.append(mine.tally)
        for row, values in enumerate(counted):
            mine.tally.add(row, values)
        return (name, counted) if most else None

    size, kept = 0, []
    for counted in sweep(count):
        if counted is not None and size <= most:
            size += sum(map(len, counted[1]))
            kept.append(counted)
    total: Tensor = sum(tally.total() for tally in tallies)  # type: ignore[assignment]
    return total, kept if most > 0 and size <= most else None


def _equal(sweep: Sweep, bits: np.ndarray) -> Iterable[Counted]:
    """For every piece, in another pass, the entries that have exactly these bits [T]."""

    def equal(name: Hashable, piece: Tensor) -> Counted:
        magnitudes = piece.view(torch.int32).numpy() & MAGNITUDE
        return name, [row[row == number] for row, number in zip(magnitudes, bits, strict=True)]

    return sweep(equal)


def _beyond(entries: Iterable[Counted], last: np.ndarray, room: np.ndarray) -> dict[Hashable, dict[int, int]]:
    """Pieces with more of the last number kept [T] in a row than there is room [T]: how many of them stay there."""
    crowded = {}
    for name, numbers in entries:
        equal = np.array([np.count_nonzero(row == number) for row, number in zip(numbers, last, strict=True)])
        kept = equal.clip(max=room)
        room = room - kept
        if len(rows_ := np.flatnonzero(kept < equal)):
            crowded[name] = {int(row): int(kept[row]) for row in rows_}
    return crowded


def _select(counts: Tensor, rank: Tensor | int) -> tuple[Tensor, Tensor]:
    """Per row: the bin that holds the `rank`-th largest entry (from 1), and how many entries lie in higher bins."""
    at_least = counts.flip(1).cumsum(1).flip(1)  # entries in this bin and above
    rank = torch.as_tensor(rank).expand(len(counts))[:, None]
    bin_ = (at_least >= rank).sum(1) - 1
    return bin_, (at_least - counts).gather(1, bin_[:, None])[:, 0]
