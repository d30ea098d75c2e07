from dataclasses import dataclass
from typing import ClassVar

from merging.decompose.compressed import Compressed
from merging.decompose.svd import SVD
from merging.deltas import Delta, LowRank
from merging.experts import Experts
from merging.merged import Merged, Routing
from merging.options import Count, Options
from merging.residual import energy_kept


@dataclass(frozen=True)
class TsvCompress(Options):
    """TSV-Compress: every task by its own leading singular triplets, chosen by the true task id; nothing is merged.

    Gargiulo et al., 2025, arXiv 2412.00081. Every matrix keeps min(m, n) // T triplets per task, which is 1 / T of
    them, not of the numbers: 25 % of a square matrix for T = 8. rank: triplets instead. What is not a matrix, or has
    fewer rows than tasks, is stored whole. Of adapters nothing but their factors is decomposed.
    """

    rank: Count | None = None
    needs: ClassVar[str] = "nothing"

    def __call__(self, experts: Experts) -> Merged:
        specs = experts.specs()
        sides = {key: min(spec.shape) for key, spec in specs.items() if len(spec.shape) == 2}
        ranks = {key: min(side, self.rank or side // len(experts.tasks)) for key, side in sides.items()}
        ranks = {key: rank for key, rank in ranks.items() if rank}

        def truncated(key: str) -> tuple[Delta, list[float]]:
            if (low_rank := experts.low_rank(key)) is not None:
                compressed = Compressed.of(low_rank)
                core = _truncated(experts.svd(compressed.core, ranks[key], kept=False))
                return compressed.lifted(core), energy_kept(compressed.core, core)
            tau = experts.tau(key)
            delta = _truncated(experts.svd(tau, ranks[key]))
            return delta, energy_kept(tau, delta)

        parts = experts.in_threads(truncated, list(ranks))
        deltas = {key: parts[key][0] if key in parts else experts.delta(key) for key in specs}
        energy = {key: shares for key, (_, shares) in parts.items()}
        return experts.merged({}, deltas=deltas, routing=Routing("oracle"), energy=energy)


def _truncated(parts: list[SVD]) -> LowRank:
    return LowRank.of((part.u * part.s for part in parts), (part.vh for part in parts))
