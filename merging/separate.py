"""Methods that see query, key and value as three parameters, and merges that have them fused."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from merging.banks import Bank, Dense, Masked, OnDemand, Rows
from merging.merged import Merged
from merging.views import Separate, fused_name, separate_names


@dataclass(frozen=True)
class Joined(Merged):
    """A merge of fused parameters whose `shared` and `fixed` changes are still under the separate names.

    They are joined one parameter at a time, when asked for; a method that works on the result of another one finds in
    them the names that it sees itself. `specs` and `own` have the fused names, `energy` the separate ones.
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


def join_banks(own: Mapping[str, Bank]) -> dict[str, Bank]:
    """Banks by fused names, each fused one in the place of the first of its three.

    Raises ValueError where a method routes some of query, key and value and not the others.
    """
    joined: dict[str, Bank] = {}
    for key, bank in own.items():
        fused = fused_name(key)
        names = separate_names(fused)
        if key not in names:
            joined[key] = bank
        elif missing := [name for name in names if name not in own]:
            raise ValueError(f"{key} has a bank and {missing[0]} has none: query, key and value are routed together")
        elif fused not in joined:
            joined[fused] = join([own[name] for name in names])
    return joined


def join(banks: list[Bank]) -> Bank:
    """One bank of all rows. Whole changes are joined in their own kind, factors are kept apart."""
    shape = torch.Size((sum(bank.shape[0] for bank in banks), *banks[0].shape[1:]))
    dense = [bank for bank in banks if type(bank) is Dense]
    masked = [bank for bank in banks if isinstance(bank, Masked)]
    on_demand = [bank for bank in banks if isinstance(bank, OnDemand)]
    if len(dense) == len(banks):
        return Dense(torch.cat([bank.changes.view(bank.parts, *bank.shape) for bank in dense], 1))
    if len(masked) == len(banks) and all(torch.equal(bank.scales, masked[0].scales) for bank in masked):
        return join_masked(masked)
    if len(on_demand) == len(banks):
        return OnDemand(lambda part: torch.cat([bank.part(part) for bank in on_demand]), shape, banks[0].parts)
    return Rows(banks)


def join_masked(banks: list[Masked]) -> Masked:
    """Of the same scales, which stay the same tensor: all parameters of a model may share it."""
    vector = torch.cat([bank.vector.view(bank.shape) for bank in banks])
    masks = torch.stack([torch.cat([bank.mask(part) for bank in banks]) for part in range(banks[0].parts)])
    return Masked.of(vector, masks, banks[0].scales)
