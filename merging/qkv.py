"""Methods that see query, key and value as three parameters, and merges that have them fused."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from merging.checkpoints.views import Separate, fused_name, separate_names
from merging.deltas import Delta, Dense, Masked, OnDemand, Rows
from merging.merged import Merged


@dataclass(frozen=True)
class Joined(Merged):
    """A merge of fused parameters whose `shared` and `fixed` changes are still under the separate names.

    They are joined one parameter at a time, when asked for; a method that works on the result of another one finds in
    them the names that it sees itself. `specs` and `deltas` have the fused names, `energy` the separate ones.
    """

    def pieces(self, key: str) -> tuple[Tensor, Tensor | None]:
        names = separate_names(key)
        if not names:
            return super().pieces(key)
        apart = Merged(Separate(self.base), self.tasks, {}, self.shared, fixed=self.fixed)
        still, moves = zip(*map(apart.pieces, names), strict=True)
        if all(each is None for each in moves):
            return torch.cat(still), None
        filled = (torch.zeros_like(weight) if each is None else each for weight, each in zip(still, moves, strict=True))
        return torch.cat(still), torch.cat(list(filled))


def join_deltas(deltas: Mapping[str, Delta]) -> dict[str, Delta]:
    """Deltas by fused names, each fused one in the place of the first of its three.

    Raises ValueError where a method routes some of query, key and value and not the others.
    """
    joined: dict[str, Delta] = {}
    for key, delta in deltas.items():
        fused = fused_name(key)
        names = separate_names(fused)
        if key not in names:
            joined[key] = delta
        elif missing := [name for name in names if name not in deltas]:
            raise ValueError(f"{key} has a delta and {missing[0]} has none: query, key and value are routed together")
        elif fused not in joined:
            joined[fused] = join([deltas[name] for name in names])
    return joined


def join(deltas: list[Delta]) -> Delta:
    """One delta of all rows. Whole changes are joined in their own kind, factors are kept apart."""
    shape = torch.Size((sum(delta.shape[0] for delta in deltas), *deltas[0].shape[1:]))
    dense = [delta for delta in deltas if type(delta) is Dense]
    masked = [delta for delta in deltas if isinstance(delta, Masked)]
    on_demand = [delta for delta in deltas if isinstance(delta, OnDemand)]
    if len(dense) == len(deltas):
        return Dense(torch.cat([delta.changes.view(delta.parts, *delta.shape) for delta in dense], 1))
    if len(masked) == len(deltas) and all(torch.equal(delta.scales, masked[0].scales) for delta in masked):
        return join_masked(masked)
    if len(on_demand) == len(deltas):
        return OnDemand(lambda part: torch.cat([delta.part(part) for delta in on_demand]), shape, deltas[0].parts)
    return Rows(deltas)


def join_masked(deltas: list[Masked]) -> Masked:
    """Of the same scales, which stay the same tensor: all parameters of a model may share it."""
    vector = torch.cat([delta.vector.view(delta.shape) for delta in deltas])
    masks = torch.stack([torch.cat([delta.mask(part) for delta in deltas]) for part in range(deltas[0].parts)])
    return Masked.of(vector, masks, deltas[0].scales)
