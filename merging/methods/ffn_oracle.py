from dataclasses import dataclass, field
from typing import ClassVar

from merging.context import ALONE, Context
from merging.deltas import Delta
from merging.experts import Experts
from merging.merged import Merged, Routing
from merging.methods.method import Method, static
from merging.methods.task_arithmetic import TaskArithmetic


@dataclass(frozen=True)
class FfnOracle:
    """Every task's own FFNs, chosen by the true task id, and the rest merged: the ceiling of all FFN-only methods.

    rest: the method for everything but the FFNs, with a scale of its own.
    """

    rest: Method = field(default_factory=TaskArithmetic)
    needs: ClassVar[str] = "nothing"

    def __call__(self, experts: Experts, context: Context = ALONE) -> Merged:
        ffn = experts.keys("ffn")
        rest = static(self.rest, experts.part(set(experts.specs()) - set(ffn)), context, "ffn_oracle: rest")
        deltas: dict[str, Delta] = {key: experts.delta(key) for key in ffn}
        routing = Routing("oracle")
        return experts.merged(rest.shared, rest.scale, deltas, routing, fixed=rest.fixed, remarks=rest.remarks)
