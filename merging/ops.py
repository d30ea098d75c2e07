"""Pure tensor functions shared by methods."""

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from merging.threads import each

HALF = 1 << 16
CHUNK = 1 << 18  # entries at a time: temporaries stay in the processor's cache
MAGNITUDE = 0x7FFFFFFF  # a float's bits without its sign


def generator(*parts: object) -> torch.Generator:
    """A random stream named by its parts, so that draws do not depend on order and repeat after a resume."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def rows(tau: Tensor) -> Tensor:
    """[T, *shape] seen as [T, n]; a parameter may be a single number, which `flatten(1)` refuses, or empty."""
    return tau.view(len(tau), tau.shape[1:].numel())


@dataclass
class KeepLargest:
    """Keeps exactly the `count` entries of largest magnitude of each row over a whole model, seen in pieces [T, ...].

    Of equal magnitudes at the threshold the earliest are kept, in the order of pieces and of entries.
    """

    threshold: Tensor  # [T, 1] magnitude of the last entry kept
    room: Tensor  # [T, 1] how many entries of exactly that magnitude are kept
    tied: bool  # whether there are more of them than room
    _before: dict[str, list[int]] = field(default_factory=dict)  # piece -> entries at the threshold seen before it
    _seen: list[int] = field(default_factory=list)

    @classmethod
    def find(cls, pieces: Callable[[], Iterable[Tensor]], count: int) -> "KeepLargest":
        """Exact selection in two passes over pieces [T, n], without sorting or stacking.

        The bits of non-negative floats order like their values: the first pass counts the upper 16 bits, the second
        the lower 16 of those entries that share the upper ones of the threshold.
        """
        high, above = _select(_histogram(pieces(), lambda row: 0, 16), count)
        low_counts = _histogram(pieces(), lambda row: int(high[row]) << 16, 0)
        low, above_low = _select(low_counts, count - above)
        threshold = ((high << 16) | low).to(torch.int32).view(torch.float32)[:, None]
        room = count - above - above_low
        equal = low_counts.gather(1, low[:, None])[:, 0]
        return cls(threshold, room[:, None], bool((equal > room).any()))

    def __call__(self, name: str, tau: Tensor) -> Tensor:
        """`tau` [T, ...] with the small entries set to zero, in place; `name` identifies the piece."""
        before = self._before.setdefault(name, self._seen or [0] * len(tau))
        below, bits = torch.nextafter(self.threshold, torch.tensor(-1.0)), self.threshold.view(torch.int32)

        def trim(row: int, values: Tensor) -> int:
            seen = before[row]
            for part in values.split(CHUNK):
                torch.hardshrink(part, float(below[row]), out=part)  # zeroes magnitudes up to `below`, in one sweep
                if self.tied:
                    equal = (part.view(torch.int32) & MAGNITUDE == bits[row]).nonzero()[:, 0]
                    part[equal[max(int(self.room[row]) - seen, 0) :]] = 0
                    seen += len(equal)
            return seen

        self._seen = each(trim, range(len(tau)), rows(tau))
        return tau


def _histogram(pieces: Iterable[Tensor], first: Callable[[int], int], shift: int) -> Tensor:
    """Counts [T, 65536] per row: entries whose magnitude bits, less `first(row)` and shifted right, are 0 to 65535."""
    counts: list[Tensor] = []

    def count(row: int, values: Tensor) -> None:
        for part in values.split(CHUNK):
            bins = (part.view(torch.int32) & MAGNITUDE).sub_(first(row)).bitwise_right_shift_(shift)
            bins.clamp_(-1, HALF).add_(1)  # the rest lies at both ends
            counts[row] += torch.bincount(bins, minlength=HALF + 2)

    for piece in pieces:
        counts = counts or [torch.zeros(HALF + 2, dtype=torch.int64) for _ in piece]
        each(count, range(len(piece)), piece)
    return torch.stack(counts)[:, 1:-1]


def _select(counts: Tensor, rank: Tensor | int) -> tuple[Tensor, Tensor]:
    """Per row: the bin that holds the `rank`-th largest entry (from 1), and how many entries lie in higher bins."""
    at_least = counts.flip(1).cumsum(1).flip(1)  # entries in this bin and above
    rank = torch.as_tensor(rank).expand(len(counts))[:, None]
    bin_ = (at_least >= rank).sum(1) - 1
    return bin_, (at_least - counts).gather(1, bin_[:, None])[:, 0]
