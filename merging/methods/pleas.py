from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from merging.applied import as_applied, as_stored
from merging.context import Context
from merging.errors import UserError
from merging.experts import Experts
from merging.merged import Merged
from merging.methods.feat_cal import bias_of
from merging.options import Count, Fraction, Options, Within
from merging.permutations import STREAM, Couple, Moments, matched, orders_of_heads, turned
from merging.regression import TINY, Equations, by_block, expert_model, expert_weight, matrices, put

KINDS = ("ffn", "attention", "projection")
READ = ("attention_q", "attention_qkv", "ffn_in", "ffn_gate")  # one of all that read the same features
SAME = 1e-3  # relative, of features: how far a model with its units in another order may be off
Weights = Mapping[str, Tensor]


@dataclass(frozen=True)
class Pleas(Options):
    """PLeaS: two models with their hidden units matched, averaged, and every layer solved for the mean of its outputs.

    Nasery et al., 2024, arXiv 2407.02447, as in its code (SewoongLab/PLeaS-Merging), also for experts of different
    initialisation. Units whose activations on the inputs of both tasks are nearest belong together: hidden neurons of
    FFNs, where `stream` the features that run through all blocks, and where `heads` attention: heads as a whole, inside
    them values, and queries with their keys. ratio: the share of hidden neurons that is merged; of the least alike the
    first model's stay alone, which is ours: the authors keep both, and the model grows. Every matrix of attention, FFNs
    and projections, with its bias, is to make of the mean of both inputs the mean of both outputs, by least squares
    around the average with a ridge of `ridge` mean diagonals; theirs takes 400 steps of Adam. solve: without it the
    matched models are averaged, and that is all. Heads are ours, the authors' code is for ResNets; they are left out
    where attention does not say how many it has (T5, Llama and its kin). samples: per task.
    """

    ratio: Fraction = 1.0
    stream: bool = True
    heads: bool = True
    solve: bool = True
    ridge: Annotated[float, Within(0.0, 1e12, open_low=True)] = 1e-3
    samples: Count = 256
    needs: ClassVar[str] = "inputs"
    takes: ClassVar[range] = range(2, 3)  # experts

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.solve and self.ratio < 1:
            raise UserError("pleas: solve=false averages all neurons. Leave ratio at 1.")

    def __call__(self, experts: Experts, context: Context) -> Merged:
        """Raises UserError where features cannot be put in another order."""
        experts, data = replace(experts, separate_qkv=False), context.unlabelled()
        couple = Couple(data, self.samples, *(expert_model(experts, data, task) for task in (0, 1)))
        first, second = ({key: expert_weight(experts, key, task) for key in experts.specs()} for task in (0, 1))
        width = self._width(experts)
        orders, shares = self._matched(experts, couple, (first, second), width)
        second = turned(experts, second, orders, width)
        before = couple.features()
        put(couple.second, second)
        if (couple.features() - before).norm() > SAME * before.norm():
            raise UserError(
                "pleas: with its units in another order this model gives other outputs: its heads read the features "
                "between blocks, or its table does not know all that does. Take method.stream=false, or, where "
                "attention has positions of its own, method.heads=false."
            )
        changes = {key: (first[key] + second[key]) / 2 - experts.base(key) for key in experts.specs()}
        for keys in by_block(experts, matrices(experts, KINDS)) if self.solve else ():
            for key, moments in couple.moments(keys).items():
                changes |= self._solved(experts, key, moments, (first, second), shares)
        return experts.merged(changes)

    def _width(self, experts: Experts) -> int:
        """Of the features between blocks."""
        key = next(key for key in experts.specs() if key.endswith("weight") and experts.param(key).kind in READ)
        return as_applied(experts, key, experts.base(key)).shape[1]

    def _matched(
        self, experts: Experts, couple: Couple, models: tuple[Weights, Weights], width: int
    ) -> tuple[Weights, Weights]:
        """The second model's order of units by group, and how much of each hidden neuron is the first model's."""
        orders, shares, stream = {}, {}, torch.zeros(width, width).double()
        for keys in by_block(experts, matrices(experts, ("ffn_out", "attention_out", *READ))):
            measured = couple.moments(keys)
            for key, moments in measured.items():
                info = experts.param(key)
                if info.kind in READ:
                    stream += moments.likeness()
                if info.kind != "ffn_out":
                    continue
                order = matched(likeness := moments.likeness(), f"The FFN of {info.block}")
                alike = likeness.gather(1, order[:, None])[:, 0]
                merged = alike.argsort(descending=True, stable=True)[: round(self.ratio * len(alike))]
                orders[str(info.block)] = order
                shares[str(info.block)] = torch.ones(len(alike)).double().index_fill(0, merged, 0.5)
            if self.heads:
                orders |= orders_of_heads(experts, couple, measured, models)
        return orders | ({STREAM: matched(stream, "What runs through the blocks")} if self.stream else {}), shares

    def _solved(
        self, experts: Experts, key: str, moments: Moments, models: tuple[Weights, Weights], shares: Weights
    ) -> Weights:
        """New changes of a matrix and its bias, as stored."""
        info, bias = experts.param(key), bias_of(key)
        one, two = (as_applied(experts, key, weights[key]).double() for weights in models)
        out, into = (torch.full((side,), 0.5).double() for side in one.shape)
        if info.hidden_axis is not None:
            out, into = (shares[str(info.block)], into) if info.hidden_axis == 0 else (out, shares[str(info.block)])
        known = bias in models[0]
        xx, yy, yx, x, y = moments.centred() if known else moments
        rest, mine, theirs = 1 - into, out[:, None], 1 - out[:, None]
        left, right = xx * into + yx.T * rest, yx * into + yy * rest  # x z^T and y z^T of z, the mean of both inputs
        gram = into[:, None] * left + rest[:, None] * right
        moved = mine * (one @ left) + theirs * (two @ right)
        anchor = mine * one + theirs * two * (rest > 0)
        weight = Equations(gram, moved).around(anchor).regularised(self.ridge * gram.diagonal().mean().clamp_min(TINY))
        changes = {key: as_stored(experts, key, weight) - experts.base(key)}
        if known:
            outputs = (side * (matrix @ mean + weights[bias].double()) for side, matrix, mean, weights in
                       zip((out, 1 - out), (one, two), (x, y), models, strict=True))  # fmt: skip
            changes[bias] = (sum(outputs) - weight @ (into * x + rest * y)).float() - experts.base(bias)
        return changes
