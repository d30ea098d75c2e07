from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from merging.context import ALONE, Context
from merging.deltas import Delta, LowRank
from merging.experts import Experts
from merging.merged import Merged, Routing
from merging.methods.method import Method, static
from merging.methods.task_arithmetic import TaskArithmetic
from merging.options import Count, Options
from merging.residual import share_kept


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
        deltas: dict[str, Delta] = {}
        energy: dict[str, list[float]] = {}

        def decompose(key: str, tau: Tensor) -> Tensor:
            parts = experts.svd(tau, rank)
            up = torch.cat([part.u * part.s for part in parts], 1)
            deltas[key] = LowRank(up, torch.cat([part.vh for part in parts]), len(parts) * rank)
            left = (change - part.u * part.s @ part.vh for change, part in zip(tau, parts, strict=True))
            energy[key] = [share_kept(*pair) for pair in zip(tau, left, strict=True)]
            return torch.empty(0)

        experts.map(decompose, matrices, heavy=True)
        fixed = experts.map(lambda key, tau: self.init * tau.sum(0), [key for key in ffn if key not in deltas])
        deltas, energy = {key: deltas[key] for key in matrices}, {key: energy[key] for key in matrices}
        routing = Routing("learned", init=self.init) if deltas else None
        return experts.merged(rest.shared, rest.scale, deltas, routing, fixed={**rest.fixed, **fixed}, energy=energy)
