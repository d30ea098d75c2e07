from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from merging.applied import as_applied, as_stored
from merging.context import Context
from merging.experts import Experts
from merging.merged import Merged
from merging.methods.method import Method, static
from merging.methods.quantised import KINDS, quantisable
from merging.methods.task_arithmetic import TaskArithmetic
from merging.options import Count, Share, Within
from merging.packed import Grid, Packed
from merging.regression import Equations, Normaliser, change_of, equations, matrices
from merging.resumed import Streams, calibrated


@dataclass(frozen=True)
class EPmq(Grid, prefix="e_pmq: "):
    """E-PMQ: a merged model quantised layer by layer, so that the codes give what the experts' own layers give.

    After arXiv 2605.16882 (2026), known by its abstract and digests: expert-guided targets, an anchor at the merged
    weights without which it collapses, GPTQ as the quantiser. With inputs x of a layer in the model quantised so far,
    W* = (sum_t W_t G_t + ridge W_merged) (sum_t G_t + ridge)^-1, G_t = x x^T of task t divided by its norm; GPTQ then
    rounds W* column by column for the Gram matrix of that sum. compensate: false rounds W* to the nearest code. damp:
    GPTQ's, of the mean diagonal. bits, group, symmetric: see merging.packed.Grid. Group, ridge (as good from 1e-4 to
    1e-6 on mini8's validation data, worse above), samples, stream and normaliser are ours, no published values are
    known, and this is no reproduction. Biases, norms and all outside the blocks stay as merged. then: what is
    quantised, Task Arithmetic at 0.3.
    """

    ridge: Annotated[float, Within(0.0, 1e12, open_low=True)] = 1e-4
    damp: Share = 0.01
    compensate: bool = True
    samples: Count = 256
    normaliser: Normaliser = "frobenius"
    then: Method = field(default_factory=TaskArithmetic)
    needs: ClassVar[str] = "inputs"
    packs: ClassVar[bool] = True

    def __call__(self, experts: Experts, context: Context) -> Merged:
        """Raises UserError without inputs, for a layer narrower than a group, and where `then` is not static."""
        fused = replace(experts, separate_qkv=False)
        quantisable(self, fused)
        start, experts = static(self.then, experts, context, "What is quantised"), fused
        packed: dict[str, Packed] = {}

        def solve(
            streams: Streams, block: Sequence[str], changes: Mapping[str, Tensor], _: bool
        ) -> Mapping[str, Tensor]:
            keys = matrices(experts, KINDS, block)
            for key, total in equations(experts, keys, streams.grams, normaliser=self.normaliser).items():
                packed[key] = self._solved(experts, key, total, changes[key])
            return {key: packed[key].opened() - experts.base(key) for key in block if key in packed}

        data, changes = context.unlabelled(), {key: change_of(start, key) for key in experts.specs()}
        calibrated(experts, data, changes, self.samples, solve)
        rest = {key: change for key, change in changes.items() if key not in packed}
        return experts.merged(rest, remarks=start.remarks).holding(packed)

    def _solved(self, experts: Experts, key: str, total: Equations, change: Tensor) -> Packed:
        anchor = as_applied(experts, key, change).double()
        tau = as_stored(experts, key, total.around(anchor).regularised(self.ridge))
        weight = as_applied(experts, key, experts.base(key) + tau).to(experts.device)
        how = {"shape": change.shape, "transposed": experts.param(key).transposed}
        if not self.compensate:
            return self.nearest(weight, **how)
        gram = (total.gram + self.ridge * torch.eye(len(total.gram)).double()).to(experts.device)
        return self.compensated(weight.double(), gram, self.damp, **how)
