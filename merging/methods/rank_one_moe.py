from dataclasses import dataclass, field
from typing import ClassVar

import torch

from merging.context import ALONE, Context
from merging.deltas import LowRank
from merging.experts import Experts
from merging.merged import Merged, Routing
from merging.methods.method import Method, static
from merging.methods.task_arithmetic import TaskArithmetic
from merging.options import Count, Options
from merging.residual import energy_kept


@dataclass(frozen=True)
class RankOneMoe(Options):
    """Rank-one experts: every singular triplet of every task's FFN change has a weight of its own in the gate.

    After the code github.com/EnnengYang/RankOne-MoE. A block's gate gives T * rank weights, task by task; the i-th is
    shared by component i of the first and of the second layer. Biases stay static: the base's plus `init` times the
    summed changes. The rest of the network is merged by `rest`.

    rank: triplets per task and matrix, at most all that every FFN matrix has. init: weight of every component before
    the gates are trained. rest: the method for everything but the FFNs, with a scale of its own.
    """

    rank: Count = 32
    init: float = 0.3
    rest: Method = field(default_factory=TaskArithmetic)
    needs: ClassVar[str] = "nothing"
    routed: ClassVar[bool] = True

    def __call__(self, experts: Experts, context: Context = ALONE) -> Merged:
        specs, ffn = experts.specs(), experts.keys("ffn")
        rest = static(self.rest, experts.part(set(specs) - set(ffn)), context, "rank_one_moe: rest")
        matrices = [key for key in ffn if len(specs[key].shape) == 2 and specs[key].shape.numel()]
        rank = min([self.rank, *(side for key in matrices for side in specs[key].shape)])

        def decomposed(key: str) -> tuple[LowRank, list[float]]:
            tau = experts.tau(key)
            parts = experts.svd(tau, rank)
            up, down = torch.cat([part.u * part.s for part in parts], 1), torch.cat([part.vh for part in parts])
            return LowRank(up, down, len(parts) * rank), energy_kept(tau, LowRank(up, down, len(parts)))

        parts = experts.in_threads(decomposed, matrices)
        fixed = experts.map(lambda key, tau: self.init * tau.sum(0), [key for key in ffn if key not in parts])
        deltas = {key: delta for key, (delta, _) in parts.items()}
        energy = {key: shares for key, (_, shares) in parts.items()}
        routing = Routing("learned", init=self.init) if deltas else None
        more = {"fixed": {**rest.fixed, **fixed}, "energy": energy, "remarks": rest.remarks}
        return experts.merged(rest.shared, rest.scale, deltas, routing, **more)
