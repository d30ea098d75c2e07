from dataclasses import dataclass, field, replace
from functools import partial
from typing import ClassVar, Literal

import torch

from merging.context import Context
from merging.experts import Experts
from merging.fit.coefficients import Learning, Shape, columns, learn
from merging.fit.descent import Descent
from merging.fit.objectives import CrossEntropy
from merging.fit.samples import opened
from merging.merged import Merged
from merging.methods.cat import side_by_side
from merging.ops import generator
from merging.options import Count


@dataclass(frozen=True)
class LearnedCat(Learning, prefix="learned_cat: "):
    """LoRA Soups as published (CAT): LoRA experts side by side, their weights a softmax per matrix learned from labels.

    Prabhakar et al., 2024, arXiv 2410.13025: sum_t softmax(w)_t s_t B_t A_t of rank sum_t r_t, s_t = alpha / r or that
    of rsLoRA, with factors frozen. init: of w, "equal", 1 / T each, or "random", the authors' standard normal numbers.
    shots: labelled samples of each class, null for all. train: the authors' one epoch at 1e-4 in batches of 6 to 10
    moves w by a fifth at most, so that what they draw first decides; ours starts equal and takes larger steps. Left
    out: their 100 steps of warm-up. What was trained in full beside adapters, or in their place, has weights too, which
    is ours. scale multiplies the whole change; at 1 it is the authors' convex sum.
    """

    init: Literal["equal", "random"] = "equal"
    shots: Count | None = None
    scale: float = 1.0
    train: Descent = field(default_factory=partial(
        Descent, (CrossEntropy(),), 100, 16, 0.05, "constant", 0.0, "adamw"))  # fmt: skip
    split: Literal["train", "val", "calibration", "test"] = "calibration"
    additive: ClassVar[bool] = True  # factors in, factors out

    def __call__(self, experts: Experts, context: Context) -> Merged:
        """Raises UserError without inputs or labels, and where the loss is not finite."""
        experts = replace(experts, separate_qkv=False)  # weights for every parameter as the model has it
        column = columns(experts)
        start = torch.zeros(len(experts.tasks), max((span.stop for span in column.values()), default=1))
        if self.init == "random":
            draws = (generator("learned_cat", context.seed, task) for task in experts.tasks)
            start = torch.stack([torch.randn(start.shape[1], generator=draw) for draw in draws])
        shape = Shape(column, start, lambda free: free.softmax(0))
        samples = opened(context, self.split, self.needs).few(self.shots)
        values, remarks = learn(self, experts, context, experts.stream, shape, samples)
        changes = side_by_side(experts, lambda key: values[:, column[key].start])
        return experts.merged(changes, self.scale, remarks=remarks)
