from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from merging.decompose.compressed import Compressed
from merging.decompose.svd import SVD
from merging.deltas import Delta, LowRank, Positions
from merging.errors import UserError
from merging.experts import Experts
from merging.merged import Merged, Routing
from merging.options import Count, Index, Options
from merging.residual import energy_kept


@dataclass(frozen=True)
class Rmm(Options):
    """Reversible Model Merging: of all tasks' factors a mean and a basis at every place, and coefficients per task.

    After arXiv 2510.14163 (2025), known by its abstract and reviews. The T rows of r numbers at one place of the
    factors U_t, and the T columns at one of V_t, keep their mean, `basis` leading directions and T x basis
    coefficients: (basis (r + T) + r) / (r T) of the factors, all where basis = T - 1. The true task chooses. gauge:
    "svd", of U S V^T both sides with the root of S and the largest entry of each column of U positive, which is ours;
    "stored", the factors that adapters were trained to, unequal ranks filled with zeros. rank: of the factors; null is
    the largest of the adapters', and min(m, n) // T of whole experts, where the paper has 16 to 128. Factors that would
    so take more bytes stay as they are, as does what is no matrix, or was trained in full beside adapters.
    """

    basis: Index = 3
    rank: Count | None = None
    gauge: Literal["svd", "stored"] = "svd"
    needs: ClassVar[str] = "nothing"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.gauge == "stored" and self.rank is not None:
            raise UserError(
                f"rmm: gauge=stored keeps factors as they were trained, and rank={self.rank} would cut them. Leave "
                f"method.rank out, or take gauge=svd."
            )

    def __call__(self, experts: Experts) -> Merged:
        def kept(key: str) -> tuple[Delta, list[float] | None]:
            factors = self._factors(experts, key)
            if factors is None:
                return experts.delta(key), None
            delta = self._positions(*factors)
            low_rank = experts.low_rank(key)
            return delta, energy_kept(experts.tau(key), delta) if low_rank is None else _kept(low_rank, delta)

        specs = experts.specs()
        parts = experts.in_threads(kept, list(specs))
        energy = {key: shares for key, (_, shares) in parts.items() if shares is not None}
        deltas = {key: delta for key, (delta, _) in parts.items()}
        return experts.merged({}, deltas=deltas, routing=Routing("oracle"), energy=energy)

    def _positions(self, ups: Tensor, downs: Tensor) -> LowRank | Positions:
        tasks, _, rank = ups.shape
        count = min(self.basis, tasks - 1, rank)
        if count * (rank + tasks) + rank >= rank * tasks:
            return LowRank.of(ups, downs)
        return Positions.of(ups, downs, count)

    def _factors(self, experts: Experts, key: str) -> tuple[Tensor, Tensor] | None:
        """Of all tasks, [T, m, r] and [T, r, n]; None for what stays as it is."""
        shape, low_rank = experts.specs()[key].shape, experts.low_rank(key)
        if len(shape) != 2 or not min(shape):
            return None
        if low_rank is None:
            rank = min(self.rank or min(shape) // len(experts.tasks), *shape)
            return _split(experts.svd(experts.tau(key), rank)) if rank else None
        if not 0 < low_rank.rank < min(shape):
            return None
        if self.gauge == "stored":
            return _filled(low_rank)
        compressed, rank = Compressed.of(low_rank), min(self.rank or low_rank.rank, low_rank.rank)
        parts = experts.svd(compressed.core, rank, kept=False)
        return _split([SVD(compressed.out @ u, s, vh @ compressed.into.T) for u, s, vh in parts])


def _split(parts: list[SVD]) -> tuple[Tensor, Tensor]:
    """U sqrt(S) and sqrt(S) V^T of all tasks."""
    ups, downs = [], []
    for u, s, vh in parts:
        largest = u.gather(0, u.abs().argmax(0, keepdim=True))[0]
        root = s.sqrt() * torch.where(largest < 0, -1, 1)
        ups.append(u * root)
        downs.append(root[:, None] * vh)
    return torch.stack(ups), torch.stack(downs)


def _filled(low_rank: LowRank) -> tuple[Tensor, Tensor]:
    """The factors themselves, those of lower rank with zeros beside."""
    pairs = [low_rank.factors(task) for task in range(low_rank.parts)]
    ups, downs = ([*factors] for factors in zip(*pairs, strict=True))
    wide = torch.nn.utils.rnn.pad_sequence([up.T for up in ups], batch_first=True).mT
    return wide.contiguous(), torch.nn.utils.rnn.pad_sequence(downs, batch_first=True)


def _kept(low_rank: LowRank, delta: LowRank | Positions) -> list[float]:
    """The share of every change's energy that a delta holds, without a matrix of either."""
    shares = []
    for task in range(low_rank.parts):
        (up, down), (other, along) = (part.factors(task) for part in (low_rank, delta))
        left = _square(torch.cat([up, -other], 1), torch.cat([down, along]))
        shares.append(1 - left / total if (total := _square(up, down)) > 0 else 1.0)
    return shares


def _square(up: Tensor, down: Tensor) -> float:
    """||up down||^2."""
    up, down = up.double(), down.double()
    return float(((up.T @ up) * (down @ down.T)).sum().clamp_min(0))
