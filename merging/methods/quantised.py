from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

from merging.applied import as_applied
from merging.context import ALONE, Context
from merging.experts import Experts
from merging.merged import Merged
from merging.methods.method import Method, static
from merging.methods.task_arithmetic import TaskArithmetic
from merging.packed import Grid, Packed
from merging.regression import matrices

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
        fused = replace(experts, separate_qkv=False)
        keys = quantisable(self, fused)
        return self._rounded(fused, keys, static(self.then, experts, context, "What is quantised"))

    def _rounded(self, experts: Experts, keys: Sequence[str], merged: Merged) -> Merged:
        def one(key: str) -> Packed:
            weight, transposed = merged.static(key), experts.param(key).transposed
            return self.nearest(as_applied(experts, key, weight), shape=weight.shape, transposed=transposed)

        held = merged.holding(experts.in_threads(one, keys))
        if merged.scale is None:
            return held
        return replace(held, remade=lambda scale: self._rounded(experts, keys, merged.scaled(scale)))


def quantisable(grid: Grid, experts: Experts) -> list[str]:
    """The matrices of blocks. Raises UserError for one that is narrower than a group."""
    keys, specs = matrices(experts, KINDS), experts.specs()
    for key in keys:
        grid.check_width(key, specs[key].shape[0 if experts.param(key).transposed else 1])
    return keys
