from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from merging.context import Context
from merging.experts import Experts
from merging.fit.coefficients import Learning, Shape, columns, combination, learn
from merging.fit.descent import Descent
from merging.fit.samples import opened
from merging.merged import Merged
from merging.ops import generator
from merging.options import Coefficient, Count


@dataclass(frozen=True)
class FwSoft(Learning):
    """FW-Merging, soft: rounds of AdaMerging, each from the weights that the one before has reached.

    Chen et al., 2025, arXiv 2503.12649, by the authors' code. A round learns coefficients of the differences from the
    present weights to those of the experts, one per expert and parameter, by lowering the entropy of the predictions.
    The authors choose an expert for every task by labels, none twice: with as many experts as tasks these are all
    experts, so that nothing is chosen here and labels are not asked for. init: of the coefficients in the first round,
    later: in the others, published 0.3 and 0.01 (their code's default is 1e-8). rounds: published 5 (default 10).
    train: of every round, published Adam at 1e-3, 500 steps of 16 samples a task. The first round starts at the base.
    Their variant by Task Arithmetic, which learns nothing, is left out. split: whose inputs; theirs are of test.
    """

    rounds: Count = 5
    init: Coefficient = 0.3
    later: Coefficient = 0.01
    train: Descent = field(default_factory=partial(Descent, lr=1e-3, steps=500, schedule="constant"))
    split: Literal["train", "val", "calibration", "test"] = "calibration"

    def __call__(self, experts: Experts, context: Context) -> Merged:
        """Raises UserError without inputs, and where the loss is not finite."""
        experts = replace(experts, separate_qkv=False, cache=None)  # its key would not tell rounds apart
        column, samples = columns(experts), opened(context, self.split, self.needs)
        values, remarks = torch.zeros(()), list[str]()
        for number in range(self.rounds):
            start = Shape.constant(experts, column, self.later if number else self.init)
            made = replace(start, made=partial(_from, values))
            seed = generator("fw_soft", context.seed, number).initial_seed()
            of_round = replace(context, who=f"{context.who}, round {number + 1}", seed=seed)
            values, said = learn(self, experts, of_round, experts.stream, made, samples)
            remarks += [f"round {number + 1}: {remark}" for remark in said]
        changes = {key: combination(values[:, column[key]], tau) for key, tau in experts.stream()}
        return experts.merged(changes, remarks=tuple(remarks))


def _from(values: Tensor, free: Tensor) -> Tensor:
    """Coefficients of task vectors: `values` [T, P], and from there the shares `free` [T, P] of the way to each."""
    return values.to(free.device) * (1 - free.sum(0)) + free
