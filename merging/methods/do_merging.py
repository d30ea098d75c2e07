from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from merging.applied import is_turned, turned
from merging.combined import Combined, Mix
from merging.context import ALONE, Context
from merging.deltas import LowRank
from merging.experts import Experts
from merging.interference import descend
from merging.merged import Merged
from merging.options import Options, Rate, Within

TINY = 1e-15  # length of a column that has no direction


@dataclass(frozen=True)
class DoMerging(Options):
    """DO-Merging: magnitudes and directions of LoRA experts apart, after their factors were made nearly orthogonal.

    arXiv 2505.15875, by reviews and two re-implementations, as its code is not public: no reproduction. Of every
    product B_t A_t, alpha and rank folded in and |A_t| = |B_t|, Adam lowers sum_{i != j} |A_i A_j^T|^2 + penalty sum
    |delta_i|^2 over A_i + delta_i, and B alike, at lr times the root mean square of the entries. With v_t the column
    norms of B_t A_t the change is scale / T^2 (sum_t v_t) * (sum_t B_t A_t / v_t), one adapter again. Whole experts
    have no factors: of their matrices magnitudes and directions are merged all the same, without the first step, which
    is ours. All else stays the base's. Unknown: the authors' penalty, steps and rate, and whether scale is tuned.
    """

    penalty: Annotated[float, Within(0.0, 1e6)] = 1.0
    steps: Annotated[int, Within(0, 10**6)] = 100
    lr: Rate = 0.01
    scale: float = 1.0
    needs: ClassVar[str] = "nothing"
    additive: ClassVar[bool] = True  # factors in, factors out

    def __call__(self, experts: Experts, context: Context = ALONE) -> Merged:
        keys = [key for key, spec in experts.specs().items() if len(spec.shape) == 2]
        whole = bool(keys) and experts.low_rank(keys[0]) is None
        weight = 1 / len(experts.tasks) ** 2

        def merge(key: str) -> Tensor | Mix | None:
            if (low_rank := experts.low_rank(key)) is not None:
                if not low_rank.rank:
                    return None
                turn = is_turned(experts, key)
                apart = self._apart(low_rank.transposed() if turn else low_rank, context.device)
                return Mix(apart.transposed() if turn else apart, torch.full((apart.parts,), weight))
            tau = turned(experts, key, experts.tau(key))
            lengths = tau.norm(dim=1)
            moved = weight * lengths.sum(0) * sum(tau * directions(lengths)[:, None], torch.zeros(()))
            return turned(experts, key, moved)

        found = experts.in_threads(merge, keys)
        changes = Combined({key: change for key, change in found.items() if change is not None})
        return experts.merged(changes, self.scale, remarks=(WHOLE,) if whole else ())

    def _apart(self, low_rank: LowRank, device: torch.device) -> LowRank:
        """Factors whose sum, without weights, is (sum_t v_t) * (sum_t B_t A_t / v_t)."""
        pairs = [balanced(*low_rank.factors(task)) for task in range(low_rank.parts)]
        ranks = low_rank.ranks
        ups = self.orthogonal(torch.cat([up for up, _ in pairs], 1).T.to(device), ranks).T.cpu()
        downs = self.orthogonal(torch.cat([down for _, down in pairs]).to(device), ranks).cpu()
        lengths = torch.stack([columns(*pair) for pair in zip(ups.split(ranks, 1), downs.split(ranks), strict=True)])
        shares = lengths.sum(0) * directions(lengths)
        scaled = [down * share for down, share in zip(downs.split(ranks), shares, strict=True)]
        return LowRank(ups, torch.cat(scaled), low_rank.parts, low_rank.shape, ranks)

    def orthogonal(self, rows: Tensor, ranks: tuple[int, ...]) -> Tensor:
        """Rows [R, n] of all tasks, `ranks` of each, nearer to orthogonal between tasks."""
        if not rows.any():
            return rows
        others = 1 - torch.block_diag(*(torch.ones(rank, rank) for rank in ranks)).to(rows)

        def gradient(delta: Tensor) -> Tensor:
            moved = rows + delta
            return 4 * (moved @ moved.T * others) @ moved + 2 * self.penalty * delta

        rate = self.lr * float(rows.square().mean().sqrt())
        return rows + descend(torch.zeros_like(rows), gradient, self.steps, rate)


WHOLE = "experts that are no adapters have no factors to make orthogonal: that step of DO-Merging was left out"


def balanced(up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    """The same product of factors of equal norms."""
    sizes = up.norm(), down.norm()
    ratio = (sizes[1] / sizes[0]).sqrt() if min(sizes) > 0 else torch.ones(())
    return up * ratio, down / ratio


def columns(up: Tensor, down: Tensor) -> Tensor:
    """Norms [n] of the columns of up down, without the product."""
    gram = up.double().T @ up.double()
    return (gram @ down.double() * down).sum(0).clamp_min(0).sqrt().float()


def directions(lengths: Tensor) -> Tensor:
    """1 / lengths, 0 for those of columns without a direction."""
    return torch.where(lengths > TINY, 1 / lengths, 0)
