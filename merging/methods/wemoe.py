from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from merging.context import ALONE, Context
from merging.deltas import Delta, Dense
from merging.experts import Experts
from merging.merged import Merged, Routing
from merging.methods.method import Method, static
from merging.methods.task_arithmetic import TaskArithmetic
from merging.ops import keep_largest, rows
from merging.options import Fraction, Options


@dataclass(frozen=True)
class Wemoe(Options):
    """WEMoE: the whole task vectors of every FFN, weights and biases, mixed per input; the rest merged statically.

    Tang et al., 2024, arXiv 2402.00433; with density below 1 and a shared gate E-WEMoE (arXiv 2410.21804).
    density: share of its entries, the largest and at least one, that each task vector of a parameter keeps; 1 keeps
    all. init: weight of every expert before the gates are trained. rest: the method for everything but the FFNs, with
    a scale of its own.
    """

    density: Fraction = 1.0
    init: float = 0.3
    rest: Method = field(default_factory=TaskArithmetic)
    needs: ClassVar[str] = "nothing"
    routed: ClassVar[bool] = True

    def __call__(self, experts: Experts, context: Context = ALONE) -> Merged:
        ffn = experts.keys("ffn")
        rest = static(self.rest, experts.part(set(experts.keys()) - set(ffn)), context, "wemoe: rest")
        deltas: dict[str, Delta] = {key: Dense(self._pruned(tau).clone()) for key, tau in experts.stream(ffn)}
        routing = Routing("learned", init=self.init) if deltas else None
        return experts.merged(rest.shared, rest.scale, deltas, routing, fixed=rest.fixed, remarks=rest.remarks)

    def _pruned(self, tau: Tensor) -> Tensor:
        """`tau` [T, *shape] with the small entries of each task zero, in place; of equal ones the first are kept."""
        size = tau[0].numel()
        if self.density == 1 or size < 2:
            return tau
        keep_largest(rows(tau), max(1, round(self.density * size)))
        return tau
