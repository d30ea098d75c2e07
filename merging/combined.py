"""Sums of task vectors that stay factors where experts are adapters of low rank."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from merging.deltas import LowRank

Changes = Mapping[str, Tensor]


class Mix(NamedTuple):
    """sum_t weights_t tau_t of the task vectors of one parameter, as factors."""

    low_rank: LowRank
    weights: Tensor  # [T]


@dataclass(frozen=True)
class Combined(Mapping[str, Tensor]):
    """Changes of parameters by name; those that are a Mix are made dense when asked for."""

    terms: Mapping[str, Tensor | Mix]

    def __getitem__(self, key: str) -> Tensor:
        term = self.terms[key]
        return term.low_rank.mix(term.weights) if isinstance(term, Mix) else term

    def __iter__(self) -> Iterator[str]:
        return iter(self.terms)

    def __len__(self) -> int:
        return len(self.terms)


def mix_of(changes: Changes, key: str) -> Mix | None:
    """A change as the mix that it is, None for a dense one."""
    term = changes.terms.get(key) if isinstance(changes, Combined) else None
    return term if isinstance(term, Mix) else None


def total(*terms: tuple[float, Changes]) -> Changes:
    """The sum of factor * changes; of low rank where all terms are."""
    summed: dict[str, Tensor | Mix] = {}
    for key in dict.fromkeys(key for _, changes in terms for key in changes):
        here = [(factor, changes) for factor, changes in terms if key in changes]
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
    return Combined({key: _times(factor, mix_of(changes, key) or changes[key]) for key, factor in factors.items()})


def _times(factor: float, term: Tensor | Mix) -> Tensor | Mix:
    if isinstance(term, Mix):
        return Mix(term.low_rank, factor * term.weights)
    return term if factor == 1 else factor * term
