"""Sums of task vectors that stay factors where experts are adapters of low rank."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from merging.deltas import LowRank


@dataclass(frozen=True)
class Combined(Mapping[str, Tensor]):
    """Changes of parameters by name: `dense` ones, and sum_t weights_t tau_t of low rank, made dense when asked for."""

    dense: Mapping[str, Tensor]
    low_rank: Mapping[str, LowRank]  # task vectors
    weights: Mapping[str, Tensor]  # [T], of the same names

    def __getitem__(self, key: str) -> Tensor:
        return self.low_rank[key].mix(self.weights[key]) if key in self.low_rank else self.dense[key]

    def __iter__(self) -> Iterator[str]:
        yield from self.dense
        yield from self.low_rank

    def __len__(self) -> int:
        return len(self.dense) + len(self.low_rank)


Changes = Mapping[str, Tensor]


def total(*terms: tuple[float, Changes]) -> Changes:
    """The sum of factor * changes; of low rank where all terms are."""
    dense: dict[str, Tensor] = {}
    low_rank: dict[str, LowRank] = {}
    weights: dict[str, Tensor] = {}
    for key in dict.fromkeys(key for _, changes in terms for key in changes):
        here = [(factor, changes) for factor, changes in terms if key in changes]
        combined = [changes for _, changes in here if isinstance(changes, Combined) and key in changes.low_rank]
        if len(combined) == len(here):
            low_rank[key] = combined[0].low_rank[key]
            pairs = zip(here, combined, strict=True)
            weights[key] = torch.stack([factor * changes.weights[key] for (factor, _), changes in pairs]).sum(0)
        else:
            scaled = [changes[key] if factor == 1 else factor * changes[key] for factor, changes in here]
            dense[key] = sum(scaled[1:], scaled[0])
    return Combined(dense, low_rank, weights) if low_rank else dense


def chosen(changes: Changes, keys: Mapping[str, float]) -> Changes:
    """Those of `keys`, each times its factor."""
    return total(*((factor, only(changes, key)) for key, factor in keys.items()))


def only(changes: Changes, key: str) -> Changes:
    """That of one parameter."""
    if isinstance(changes, Combined) and key in changes.low_rank:
        return Combined({}, {key: changes.low_rank[key]}, {key: changes.weights[key]})
    return {key: changes[key]}


def weights_of(key: str, *terms: tuple[float, Changes]) -> Tensor | float | None:
    """The weights [T] of the task vectors in the sum of factor * changes, 0 for none; None where it is dense."""
    found: Tensor | float = 0.0
    for factor, changes in terms:
        if key in changes:
            if not isinstance(changes, Combined) or key not in changes.low_rank:
                return None
            found = found + factor * changes.weights[key]
    return found
