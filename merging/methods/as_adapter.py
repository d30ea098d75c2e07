from dataclasses import dataclass, field
from typing import ClassVar

import torch

from merging.combined import Changes, Combined, Mix, Term, mix_of, terms
from merging.context import ALONE, Context
from merging.decompose.compressed import Compressed
from merging.decompose.svd import svd
from merging.deltas import LowRank
from merging.experts import Experts
from merging.merged import Merged
from merging.methods.method import Method, static
from merging.methods.task_arithmetic import TaskArithmetic
from merging.options import Count, Options


@dataclass(frozen=True)
class AsAdapter(Options):
    """What another method makes of LoRA experts as one adapter: every change truncated to its leading triplets.

    The "svd" combinations of the peft library: with then=task_arithmetic its svd, with TIES or DARE its ties_svd and
    dare_ties_svd on whole products. then: any static method. rank: of the result; null is the largest rank that an
    expert has for the matrix, and of whole experts all. Sums stay factors and are never multiplied out. What is no
    matrix, or was trained in full beside the adapters, stays as `then` left it.
    """

    then: Method = field(default_factory=TaskArithmetic)
    rank: Count | None = None
    needs: ClassVar[str] = "nothing"
    additive: ClassVar[bool] = True  # factors in, factors out

    def __call__(self, experts: Experts, context: Context = ALONE) -> Merged:
        """Raises UserError where `then` is not static."""
        merged = static(self.then, experts, context, "as_adapter: then")
        shared, fixed = (self._truncated(experts, changes) for changes in (merged.shared, merged.fixed))
        return experts.merged(shared, merged.scale, fixed=fixed, remarks=merged.remarks)

    def _truncated(self, experts: Experts, changes: Changes) -> Combined:
        def one(key: str) -> Term | None:
            factors, mix = experts.factors(key), mix_of(changes, key)
            rank = self.rank or (factors.rank if factors is not None else None)
            shape = experts.specs()[key].shape
            if rank is None or (factors is not None and (len(shape) != 2 or in_full(factors))):
                return terms(changes)[key] if rank is None or changes[key].any() else None
            if mix is not None:
                return _least(mix, rank)
            change = changes[key]
            if factors is not None and not change.any():
                return None
            if change.ndim != 2 or (factors is None and rank >= min(change.shape)):
                return change
            u, s, vh = svd(change.to(experts.device), rank)
            return Mix(LowRank.of([(u * s).cpu()], [vh.cpu()]), torch.ones(1))

        found = experts.in_threads(one, list(changes))
        return Combined({key: term for key, term in found.items() if term is not None})


def in_full(factors: LowRank) -> bool:
    """Whether an expert has a matrix that was trained in full beside its adapters: one of its factors is the identity,
    see checkpoints.lora."""
    members = (factor for task in range(factors.parts) for factor in factors.factors(task))
    return any(len(each) == each.shape[1] and torch.equal(each, torch.eye(len(each))) for each in members)


def _least(mix: Mix, rank: int) -> Mix:
    """A sum of factors at a rank at most."""
    if len(mix.low_rank.down) <= rank or len(mix.shape) != 2:
        return mix
    compressed = Compressed.of(mix.low_rank)
    u, s, vh = svd(torch.einsum("t,tpq->pq", mix.weights, compressed.core), rank)
    lifted = compressed.lifted(LowRank.of([u * s], [vh]))
    assert isinstance(lifted, LowRank)
    return Mix(lifted, torch.ones(1))
