from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from merging.combined import Combined, Term, terms
from merging.entries import Entry, entrywise, kept, sweep
from merging.experts import Experts
from merging.kinds import ByKind
from merging.merged import Merged
from merging.ops import KeepLargest
from merging.options import Fraction
from merging.threads import Scratch


@dataclass(frozen=True)
class Ties(ByKind, prefix="ties: "):
    """TIES-Merging: trim, elect a sign per entry, merge those that agree. Yadav et al., 2023, arXiv 2306.01708.

    density: share of its largest entries that each task vector keeps, over the whole model; 1 trims nothing.
    merge: "sum" of the agreeing entries (usual for vision, scale about 0.3) or their "mean" (the paper's, scale about
    1). scale: 0 is the base. kinds: coefficients by kind of parameter and depth, see ByKind.
    """

    density: Fraction = 0.2
    merge: Literal["sum", "mean"] = "sum"
    scale: float = 0.3
    needs: ClassVar[str] = "nothing"
    streams: ClassVar[bool] = True

    def __call__(self, experts: Experts) -> Merged:
        if not any(spec.shape.numel() for spec in experts.specs().values()):
            return self.weighed(experts, {}, self.scale)
        trim = self._trim(experts)
        changes = (
            self._once(experts, trim) if kept(experts) else dict(terms(entrywise(experts, self._again(experts, trim))))
        )
        return self.weighed(experts, alike(experts, changes), self.scale)

    def merging(self, experts: Experts) -> Callable[[Entry, Tensor], Tensor]:
        """What this method makes of the entries from one on, tau [T, n], which are overwritten, before the scale."""
        return self._again(experts, self._trim(experts))

    def _trim(self, experts: Experts) -> KeepLargest:
        total = sum(spec.shape.numel() for spec in experts.specs().values())
        count = min(int(total * self.density) + 1, total)  # the published threshold entry is kept too
        return KeepLargest.find(partial(sweep, experts), count)

    def _once(self, experts: Experts, trim: KeepLargest) -> dict[str, Term]:
        """In one pass: entries that cancel exactly take the majority sign of the model, known only after it."""
        merged = {key: torch.empty(spec.shape) for key, spec in experts.specs().items()}
        scratch = Scratch()

        def merge(name: Entry, tau: Tensor) -> Piece:
            out = merged[name.key].view(-1)[name.first : name.first + tau.shape[1]]
            return self._disjoint(trim(name, tau), out, scratch.like(tau))

        votes, undecided = 0, []
        for piece in sweep(experts, merge):
            votes += piece.votes
            undecided += [piece] * bool(len(piece.cancelled))
        for piece in undecided if votes > 0 else ():
            piece.merged[piece.cancelled] = piece.positive
        return dict[str, Term](merged)

    def _again(self, experts: Experts, trim: KeepLargest) -> Callable[[Entry, Tensor], Tensor]:
        """Entry by entry, whenever they are asked for, after a pass for the majority sign alone."""
        votes = sum(sweep(experts, lambda name, tau: int(trim(name, tau).sum(0).sign_().sum())))
        scratch = Scratch()

        def merge(name: Entry, tau: Tensor) -> Tensor:
            piece = self._disjoint(trim(name, tau), scratch.of(tau.shape[1:], 1), scratch.like(tau))
            if votes > 0:
                piece.merged[piece.cancelled] = piece.positive
            return piece.merged

        return merge

    def _disjoint(self, tau: Tensor, out: Tensor, scratch: Tensor) -> "Piece":
        """Merge trimmed [T, n] into `out` [n]; entries that cancel exactly count as negative."""
        total = tau.sum(0)
        votes = total.sign()
        elected = votes.mul(2).sub_(1).clamp_min_(-1)  # 1 or -1
        torch.mul(self._agreeing(torch.mul(tau, elected, out=scratch)), elected, out=out).add_(0.0)  # no negative zero
        cancelled = torch.from_numpy(np.flatnonzero((total.numpy() == 0) & (out.numpy() != 0)))
        return Piece(int(votes.sum()), out, cancelled, self._agreeing(tau[:, cancelled]))

    def _agreeing(self, tau: Tensor) -> Tensor:
        """Merge the positive entries of [T, n], a tensor of its own, to [n]."""
        merged = tau.clamp_min_(0).sum(0)
        return merged if self.merge == "sum" else merged.div_((tau != 0).sum(0).clamp_min_(1))


class Piece(NamedTuple):
    """A merged piece, and what to change if the positive sign wins over the model."""

    votes: int  # sum of the elected signs
    merged: Tensor
    cancelled: Tensor  # entries whose task vectors sum to zero
    positive: Tensor  # their values under a positive sign


def alike(experts: Experts, changes: Mapping[str, Term]) -> Combined:
    """The same changes, but that all names of a tied parameter have those of the first one.

    Of equals at the threshold of a trim one name may keep what another drops.
    """
    return Combined({key: changes.get(experts.tied.get(key, key), change) for key, change in changes.items()})


def agreeing(experts: Experts, density: float) -> Iterator[tuple[str, Tensor]]:
    """(key, tau [T, *shape]): task vectors trimmed to a share of the model and to the entries of the elected sign.

    All of them are in memory.
    """
    specs = experts.specs()
    total = sum(spec.shape.numel() for spec in specs.values())
    trim = KeepLargest.find(partial(sweep, experts), min(int(total * density) + 1, total))
    kept = {key: torch.empty(len(experts.tasks), spec.shape.numel()) for key, spec in specs.items()}

    def work(name: Entry, tau: Tensor) -> int:
        kept[name.key][:, name.first : name.first + tau.shape[1]] = trim(name, tau)
        return int(tau.sum(0).sign().sum())

    majority = 1 if sum(sweep(experts, work)) > 0 else -1
    for key, tau in kept.items():
        votes = tau.sum(0).sign()
        elected = torch.where(votes == 0, torch.tensor(float(majority)), votes)
        yield key, (tau * (tau * elected > 0)).view(len(tau), *specs[key].shape)
