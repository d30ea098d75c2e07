from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from merging.context import Context
from merging.experts import Experts
from merging.merged import Merged
from merging.methods.reg_mean import KINDS, averaged, regression_means
from merging.options import Count, Options, Share
from merging.regression import expert_weight, matrices, put, stages
from merging.resumed import Kept
from merging.statistics import gram_sums


@dataclass(frozen=True)
class RegMeanPp(Options):
    """RegMean++: RegMean block by block, on what the blocks merged so far make of the inputs.

    Nguyen et al., 2025, arXiv 2508.03121; steps as in FusionBench. Inputs pass the averaged embeddings and the blocks
    that are merged already, then the block of expert t, where G_t is measured; the sums are RegMean's. rho: scale of
    the off-diagonal entries of G_t, 0.95 FusionBench's, 0.1 in another public comparison. samples: per task.
    Projections behind the blocks come last, in the same way, and all else is averaged; FusionBench leaves what lies
    behind the blocks as the base has it. In memory are one model, and what its last merged block makes of all inputs.
    """

    rho: Share = 0.95
    samples: Count = 256
    needs: ClassVar[str] = "inputs"

    def __call__(self, experts: Experts, context: Context) -> Merged:
        """Raises UserError without inputs, and for names that no table has."""
        experts = replace(experts, separate_qkv=False)  # rows are solved one by one: it makes no difference
        data = context.unlabelled()
        order = stages(experts, data)
        changes = averaged(experts, [key for stage in order for key in matrices(experts, KINDS, stage)])
        model = data.model(experts.origin)
        put(model, {key: experts.base(key) + change for key, change in changes.items()})
        done: list[str] = []
        kept = [Kept() for _ in experts.tasks]
        for stage in order:

            def measure(task: int, keys: Sequence[str], stage: Sequence[str] = stage) -> tuple[dict[str, Tensor], dict]:
                put(model, {key: expert_weight(experts, key, task) for key in stage})
                with kept[task].behind(model, done):
                    return gram_sums(model, keys, data.batches(task, self.samples))

            changes |= regression_means(experts, matrices(experts, KINDS, stage), measure, self.rho)
            put(model, {key: experts.base(key) + changes[key] for key in stage})
            done.append(str(experts.param(stage[0]).block))
        return experts.merged(changes)
