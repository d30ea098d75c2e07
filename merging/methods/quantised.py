from dataclasses import dataclass, field, replace
from typing import ClassVar

from merging.context import ALONE, Context
from merging.experts import Experts
from merging.merged import Merged
from merging.methods.method import Method, static
from merging.methods.task_arithmetic import TaskArithmetic
from merging.packed import Grid, Packed
from merging.regression import as_applied, matrices

KINDS = ("ffn", "attention")


@dataclass(frozen=True)
class Quantised(Grid, prefix="quantised: "):
    """Any static method with the matrices of its blocks in 4 or 8 bits, every entry at its nearest code. No data.

    Matrices of attention and FFNs, as common; what is no matrix, lies outside, or has several names, stays as merged.
    bits, group, symmetric: a step for so many inputs of a row, see merging.packed.Grid; steps in bf16, and that the
    largest entry is met exactly, are ours. Codes are packed, in memory, in a file and where bytes are counted; forwards
    are those of the numbers they stand for. then: the method, whose scale is that of the whole: at another all is
    rounded anew. What e_pmq has to beat.
    """

    then: Method = field(default_factory=TaskArithmetic)
    needs: ClassVar[str] = "nothing"
    packs: ClassVar[bool] = True

    def __call__(self, experts: Experts, context: Context = ALONE) -> Merged:
        """Raises UserError for a layer narrower than a group, where `then` is not static, and for unknown names."""
        start = static(self.then, experts, context, "What is quantised")
        return self._rounded(replace(experts, separate_qkv=False), start)

    def _rounded(self, experts: Experts, merged: Merged) -> Merged:
        def one(key: str) -> Packed:
            weight, transposed = merged.static(key), experts.param(key).transposed
            matrix = as_applied(experts, key, weight)
            self.check_width(key, matrix.shape[1])
            return self.nearest(matrix, shape=weight.shape, transposed=transposed)

        held = merged.holding(experts.in_threads(one, matrices(experts, KINDS)))
        if merged.scale is None:
            return held
        return replace(held, remade=lambda scale: self._rounded(experts, merged.scaled(scale)))
