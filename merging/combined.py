"""Sums of task vectors that are not held as tensors: factors of adapters, and what is computed when it is asked for."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from merging.deltas import LowRank
from merging.ops import BLOCK, SPAN

Changes = Mapping[str, Tensor]


class Mix(NamedTuple):
    """sum_t weights_t tau_t of the task vectors of one parameter, as factors."""

    low_rank: LowRank
    weights: Tensor  # [T]

    @property
    def shape(self) -> torch.Size:
        return self.low_rank.shape

    def times(self, factor: float) -> "Mix":
        return Mix(self.low_rank, factor * self.weights)

    def whole(self) -> Tensor:
        """The sum [*shape]; what is larger than a block is multiplied in spans, however much of it is asked for."""
        return self.low_rank.mix(self.weights) if self.shape.numel() <= BLOCK else _joined(self)

    def spans(self, first: int, last: int) -> Iterator[Tensor]:
        """Entries [first, last) of the flattened sum, SPAN at a time; only the rows of the product that hold them."""
        low_rank, width = self.low_rank, self.low_rank.down.shape[1]
        up = low_rank.up * low_rank.spread(self.weights)
        for start in range(first, last, SPAN):
            stop = min(start + SPAN, last)
            top = start // width
            rows = up[top : -(-stop // width)] @ low_rank.down
            yield rows.flatten()[start - top * width : stop - top * width]


class Computed(NamedTuple):
    """A change of `shape` times `factor`, computed anew whenever it is asked for."""

    entries: Callable[[int, int], Iterator[Tensor]]  # of the flattened change, from a multiple of BLOCK on, SPAN a time
    shape: torch.Size
    factor: float = 1.0

    def times(self, factor: float) -> "Computed":
        return self._replace(factor=self.factor * factor)

    def spans(self, first: int, last: int) -> Iterator[Tensor]:
        """Entries [first, last) of the flattened change, SPAN at a time; `first` is a multiple of BLOCK."""
        for span in self.entries(first, last):
            yield span if self.factor == 1 else self.factor * span

    def whole(self) -> Tensor:
        """The change [*shape]."""
        return _joined(self)


Term = Tensor | Mix | Computed


def _joined(term: Mix | Computed) -> Tensor:
    """All spans of a change, as [*shape]."""
    size, whole = term.shape.numel(), torch.empty(term.shape)
    for first in range(0, size, BLOCK):
        last = min(first + BLOCK, size)
        for start, span in zip(range(first, last, SPAN), term.spans(first, last), strict=True):
            whole.view(-1)[start : start + SPAN] = span
    return whole


@dataclass(frozen=True)
class Combined(Mapping[str, Tensor]):
    """Changes of parameters by name; those that are no tensors are made dense when asked for."""

    terms: Mapping[str, Term]

    def __getitem__(self, key: str) -> Tensor:
        term = self.terms[key]
        return term if isinstance(term, Tensor) else term.whole()

    def __iter__(self) -> Iterator[str]:
        return iter(self.terms)

    def __len__(self) -> int:
        return len(self.terms)


def terms(changes: Changes) -> Mapping[str, Term]:
    """Changes as they are held."""
    return changes.terms if isinstance(changes, Combined) else changes


def mix_of(changes: Changes, key: str) -> Mix | None:
    """A change as the mix that it is, None for any other."""
    term = terms(changes).get(key)
    return term if isinstance(term, Mix) else None


def spans(changes: Changes, key: str, first: int, last: int) -> Iterator[Tensor] | None:
    """Entries [first, last) of a flattened change, at most BLOCK from a multiple of it on, SPAN at a time.

    None for a parameter that is not changed.
    """
    if (term := terms(changes).get(key)) is None:
        return None
    if isinstance(term, Mix) and term.shape.numel() <= BLOCK:
        term = term.whole()
    return iter(term.reshape(-1)[first:last].split(SPAN)) if isinstance(term, Tensor) else term.spans(first, last)


def total(*added: tuple[float, Changes]) -> Changes:
    """The sum of factor * changes; of low rank where all terms are."""
    summed: dict[str, Term] = {}
    for key in dict.fromkeys(key for _, changes in added for key in changes):
        here = [(factor, changes) for factor, changes in added if key in changes]
        mixes = [(factor, mix) for factor, changes in here if (mix := mix_of(changes, key))]
        if len(mixes) == len(here):
            weights = torch.stack([factor * mix.weights for factor, mix in mixes]).sum(0)
            summed[key] = Mix(mixes[0][1].low_rank, weights)
        else:
            scaled = [changes[key] if factor == 1 else factor * changes[key] for factor, changes in here]
            summed[key] = sum(scaled[1:], scaled[0])
    return Combined(summed)


def chosen(changes: Changes, factors: Mapping[str, float]) -> Changes:
    """Some changes, each times its factor."""
    held = terms(changes)
    return Combined({key: _times(factor, held[key]) for key, factor in factors.items()})


def _times(factor: float, term: Term) -> Term:
    if factor == 1:
        return term
    return factor * term if isinstance(term, Tensor) else term.times(factor)
