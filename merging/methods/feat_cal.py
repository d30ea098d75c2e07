from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor

from merging.affine import Gain, Layer, Terms
from merging.applied import as_applied, as_stored
from merging.calibration import Calibration
from merging.context import Context
from merging.experts import Experts
from merging.merged import Merged
from merging.methods.method import Method, static
from merging.methods.task_arithmetic import TaskArithmetic
from merging.options import Count, Options, Share, Within
from merging.regression import Normaliser, change_of
from merging.resumed import Streams, calibrated


@dataclass(frozen=True)
class FeatCal(Options):
    """FeatCal: a merged model calibrated block by block, so that its layers give what the experts' own give.

    Gu et al., 2026, arXiv 2605.13030, as in its code (egangu/featcal). With inputs x of a layer in the model calibrated
    so far and y in expert t, the layer is to make W_t (x + mix (y - x)) of x: least squares over all tasks, each
    divided by the norm of its Gram matrix, plus `ridge` times the distance to the anchor W_0 + extrapolation (W_merged
    - W_0). Biases follow from the means, gains and shifts of norms from two equations per feature. All of a block is
    solved at once; what lies outside the blocks stays as merged. then: what is calibrated, Task Arithmetic at 0.3.
    unread: weight of all tokens but the first in the last block, but for keys and values; null is 0.01 (theirs) for
    images whose first token is read alone, else 1. samples: per task. Defaults are the code's; the paper's text has mix
    0.3, extrapolation 2. normaliser: others than theirs, and fp64, are ours. In memory are two models, and what the
    last calibrated block and its counterpart in the experts make of all inputs.
    """

    ridge: Annotated[float, Within(0.0, 1e12)] = 0.05
    extrapolation: Annotated[float, Within(-100.0, 100.0)] = 2.2
    mix: Share = 0.25
    unread: Share | None = None
    samples: Count = 256
    normaliser: Normaliser = "frobenius"
    then: Method = field(default_factory=TaskArithmetic)
    needs: ClassVar[str] = "inputs"

    def __call__(self, experts: Experts, context: Context) -> Merged:
        """Raises UserError without inputs, for names that no table has, and where `then` depends on the input."""
        start = static(self.then, experts, context, "What FeatCal calibrates")
        experts = replace(experts, separate_qkv=False)
        data, changes = context.unlabelled(), {key: change_of(start, key) for key in experts.specs()}
        unread = self._unread(data)

        def solve(
            streams: Streams, block: Sequence[str], changes: Mapping[str, Tensor], last: bool
        ) -> Mapping[str, Tensor]:
            return self._calibrated(streams, block, changes, unread if last else 1.0)

        solved = calibrated(experts, data, changes, self.samples, solve)
        return experts.merged(solved, remarks=start.remarks)

    def _unread(self, data: Calibration) -> float:
        if self.unread is not None:
            return self.unread
        inputs: Any = next(data.batches(0, 1))
        first = isinstance(inputs, Tensor) and inputs.ndim == 4
        return 0.01 if first and data.backbone.get("readout", "first") in ("first", "pooled") else 1.0

    def _calibrated(
        self, streams: Streams, block: Sequence[str], changes: Mapping[str, Tensor], unread: float
    ) -> dict[str, Tensor]:
        """New changes of the parameters of one block."""
        experts, weights = streams.experts, [key for key in block if key.endswith("weight")]
        keys = [key for key in weights if experts.param(key).family in ("ffn", "attention", "norm")]
        layers: dict[tuple[str, bool], Layer | Gain] = {}
        for task in range(len(experts.tasks)):
            every, read = streams.pairs(task, keys, unread)
            for key in keys:
                for weighed in _weighed(experts.param(key).kind):
                    pair, expert = (read if weighed else every)[key].means(), terms_of(experts, key, task)
                    layer = layers.get((key, weighed), Gain() if pair.gram.ndim == 1 else Layer())
                    layers[key, weighed] = layer.plus(pair, expert, self.mix, self.normaliser)
        solutions: dict[str, Tensor] = {}
        for key in keys:
            solutions |= self._solution(experts, key, layers, changes)
        return solutions

    def _solution(
        self, experts: Experts, key: str, layers: Mapping[tuple[str, bool], Layer | Gain], changes: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """New changes of a weight and its bias, as stored."""
        bias = bias_of(key)
        tau = self.extrapolation * as_applied(experts, key, changes[key]).double()
        shift = self.extrapolation * changes[bias].double() if bias in changes else torch.zeros(len(tau)).double()
        anchor, variants = Terms(tau, shift, tau), _weighed(experts.param(key).kind)
        if bias not in changes and isinstance(gain := layers[key, variants[0]], Gain):
            return {key: as_stored(experts, key, gain.without_shift(anchor, self.ridge))}
        solved = [layers[key, weighed].solved(anchor, self.ridge) for weighed in variants]
        rows = [len(tau)] if len(variants) == 1 else [len(tau) // 3, len(tau) - len(tau) // 3]  # queries come first
        starts = [sum(rows[:index]) for index in range(len(rows))]
        parts = [
            [part[start : start + count] for part in both]
            for both, start, count in zip(solved, starts, rows, strict=True)
        ]
        weight, shift = (torch.cat(part) for part in zip(*parts, strict=True))
        return {key: as_stored(experts, key, weight)} | ({bias: shift.float()} if bias in changes else {})


def _weighed(kind: str) -> list[bool]:
    """Whether tokens that nobody reads behind the block count less; both where queries, keys and values are one."""
    return [True, False] if kind == "attention_qkv" else [kind not in ("attention_k", "attention_v")]


def bias_of(key: str) -> str:
    """The name of the bias beside a weight."""
    return key.removesuffix("weight") + "bias"


def terms_of(experts: Experts, key: str, task: int) -> Terms:
    """An expert's layer, as it is applied."""
    tau = as_applied(experts, key, experts.task_vector(key, task)).double()
    known = bias_of(key) in experts.specs()
    bias = experts.task_vector(bias_of(key), task).double() if known else torch.zeros(len(tau)).double()
    return Terms(tau, bias, as_applied(experts, key, experts.base(key)).double() + tau)
