from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from merging.experts import Experts
from merging.merged import Merged


@dataclass(frozen=True)
class TsvM:
    """TSV-Merging: leading singular triplets of every task, made orthogonal to each other's.

    Gargiulo et al., 2025, arXiv 2412.00081. Each matrix keeps min(m, n) // T triplets per task; what is not a matrix,
    or has fewer rows than tasks, is averaged. scale: 0 is the base, 1 is the published data-free setting.
    """

    scale: float = 1.0
    needs: ClassVar[str] = "nothing"

    def __call__(self, experts: Experts) -> Merged:
        def merge(key: str, tau: Tensor) -> Tensor:
            rank = min(tau.shape[1:]) // len(tau) if tau.ndim == 3 else 0
            return orthogonal_sum(experts, tau, [rank] * len(tau)) if rank else tau.mean(0)

        return experts.merged(experts.map(merge, heavy=True), self.scale)


def orthogonal_sum(
    experts: Experts, tau: Tensor, ranks: Sequence[int], weights: Sequence[float] | None = None
) -> Tensor:
    """The leading `ranks` triplets of matrices [T, m, n], made orthogonal; weights: of their singular values."""
    parts = zip(experts.svd(tau, max(ranks)), ranks, strict=True)
    parts = [(u[:, :rank], s[:rank], vh[:rank]) for (u, s, vh), rank in parts]
    u = experts.polar(torch.cat([u for u, _, _ in parts], 1))
    vh = experts.polar(torch.cat([vh for _, _, vh in parts], 0))
    sizes = [s for _, s, _ in parts]
    if weights is not None:
        sizes = [weight * s for weight, s in zip(weights, sizes, strict=True)]
    return (u * torch.cat(sizes)) @ vh
