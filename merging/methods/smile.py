from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from merging.applied import is_turned, turned
from merging.deltas import Delta, Dense, LowRank, Rows
from merging.errors import UserError
from merging.experts import Experts
from merging.merged import Merged, Routing
from merging.options import Count, Options
from merging.qkv import cut, fused_name
from merging.residual import energy_kept


@dataclass(frozen=True)
class Smile(Options):
    """SMILE: every token picks experts layer by layer, by how much of it lies in their leading directions. No training.

    Tang et al., 2024, arXiv 2408.10174. Every linear layer of attention and FFNs keeps a truncated decomposition
    U S V^T of each task vector; the weights of a token x are softmax_t ||V_t^T[:gate_rank] x||, the largest kept and
    rescaled to sum 1; biases are mixed whole. All else stays pretrained: norms, embeddings, patches, the projection.

    rank: singular triplets kept per task, at most all there are. gate_rank: those that recognise a token, at most
    `rank`. top_k: experts per token and layer. split_qkv: decompose and route query, key and value apart.
    """

    rank: Count = 32
    gate_rank: Count = 16
    top_k: Count = 1
    split_qkv: bool = True
    needs: ClassVar[str] = "nothing"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.gate_rank > self.rank:
            raise UserError(
                f"smile: gate_rank={self.gate_rank} is above rank={self.rank}: only directions that are kept can "
                f"recognise a token. Lower method.gate_rank or raise method.rank."
            )

    def __call__(self, experts: Experts) -> Merged:
        def decomposed(key: str) -> tuple[Delta, list[float] | None, bool]:
            tau = experts.tau(key)
            delta = self._delta(experts, key, tau)
            return delta, energy_kept(tau, delta) if tau.ndim == 3 else None, bool(tau.any())

        found = experts.in_threads(decomposed, sorted(experts.keys("attention") + experts.keys("ffn")))
        # what no expert changed, as adapters leave most, tells no token; query, key and value stay together
        moved = {fused_name(key) for key, (_, _, changed) in found.items() if changed}
        parts = {key: (delta, shares) for key, (delta, shares, _) in found.items() if fused_name(key) in moved}
        deltas = {key: delta for key, (delta, _) in parts.items()}
        energy = {key: shares for key, (_, shares) in parts.items() if shares is not None}
        routing = Routing("subspace", granularity="token", gate_rank=self.gate_rank, top_k=self.top_k)
        return experts.merged({}, deltas=deltas, routing=routing if deltas else None, energy=energy)

    def _delta(self, experts: Experts, key: str, tau: Tensor) -> Delta:
        if tau.ndim != 3:
            return Dense(tau)
        if self.split_qkv and (blocks := cut(key, tau)):
            return Rows([self._low_rank(experts, key, block) for block in blocks[0]], blocks[1])
        return self._low_rank(experts, key, tau)

    def _low_rank(self, experts: Experts, key: str, tau: Tensor) -> LowRank:
        """U S and V^T of each task, of matrices [out, in], as they are stored.

        The rows of V^T are orthonormal, so that the gate measures lengths with them.
        """
        parts = experts.svd(turned(experts, key, tau), min(self.rank, *tau.shape[1:]))
        delta = LowRank.of((part.u * part.s for part in parts), (part.vh for part in parts))
        return delta.transposed() if is_turned(experts, key) else delta
