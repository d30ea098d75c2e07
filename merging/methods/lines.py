from dataclasses import dataclass, field
from typing import Annotated, ClassVar

from merging.combined import Changes, chosen, spans, total
from merging.context import ALONE, Context
from merging.entries import blocks, sweep
from merging.experts import Experts
from merging.kinds import positions
from merging.merged import Merged
from merging.methods.method import Method, static
from merging.methods.task_arithmetic import TaskArithmetic
from merging.ops import BLOCK
from merging.options import Options, Within


@dataclass(frozen=True)
class Lines(Options):
    """LiNeS behind any static method: its change grows linearly with depth.

    Wang et al., 2024, arXiv 2410.17146. The change of block i of L is multiplied by a + scale * i / (L - 1), that of
    all outside the blocks by a = |sum_t tau_t| / |change| / T, in L1 norms, 1/T for Task Arithmetic. scale: what the
    last block has more than the first, by the authors chosen from 0.1 to 1 on validation (1.5 for TIES). That of
    the method behind is not used; what its `kinds` weigh stays as it is. then: that method. As in the published code
    what lies behind the blocks has a alone; every stack of blocks has a depth of its own.
    """

    scale: Annotated[float, Within(-100.0, 100.0)] = 0.5
    then: Method = field(default_factory=TaskArithmetic)
    needs: ClassVar[str] = "nothing"

    def __call__(self, experts: Experts, context: Context = ALONE) -> Merged:
        merged = static(self.then, experts, context, "What LiNeS scales")
        depth = positions(experts, behind=0.0)
        size = _l1(experts, merged.shared)
        shallow = sum(sweep(experts, lambda _, tau: float(tau.sum(0).abs().sum().double()))) / size if size else 0.0
        first = chosen(merged.shared, dict.fromkeys(merged.shared, shallow / len(experts.tasks)))
        deep = chosen(merged.shared, {key: depth[key] for key in merged.shared if depth[key] > 0})
        fixed = total((1.0, merged.fixed), (1.0, first)) if merged.fixed else first
        return experts.merged(deep, self.scale, fixed=fixed, remarks=merged.remarks)


def _l1(experts: Experts, changes: Changes) -> float:
    """The L1 norm of changes, block by block."""
    sizes = {key: spec.shape.numel() for key, spec in experts.specs().items() if key in changes}
    pieces = (spans(changes, key, first, min(first + BLOCK, sizes[key])) or () for key, first in blocks(sizes))
    return sum(float(piece.abs().sum().double()) for block in pieces for piece in block)
