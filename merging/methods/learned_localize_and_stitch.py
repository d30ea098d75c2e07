from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Annotated, Literal

import torch
from torch import Tensor

from merging.context import Context
from merging.deltas.masked import packed, unpacked
from merging.experts import Experts
from merging.fit.coefficients import Learning
from merging.fit.descent import Descent, descend, seeded
from merging.fit.folded import Folded
from merging.fit.objectives import CrossEntropy
from merging.fit.samples import Samples, opened
from merging.merged import Merged
from merging.methods.localize_and_stitch import stitched, thresholds
from merging.options import Count, Fraction, Within


@dataclass(frozen=True)
class LearnedLocalizeAndStitch(Learning, prefix="learned_localize_and_stitch: "):
    """Localize-and-Stitch as published: a mask of every expert learned from few labels, averaged where several overlap.

    He et al., 2024, arXiv 2408.13656. The logits S of a mask start at bias where a task vector has its largest entries,
    density of the whole model, and at -bias elsewhere. Each task by itself lowers the cross-entropy of W_0 + sigmoid(S)
    tau by gradient descent on all of its samples; every step also moves S away from 0 by push times the slope of the
    sigmoid, as in the authors' code, so that density sets the size of a mask and not push. Entries with S > 0 are kept.
    shots: labelled samples of each class; the authors' 64. Published for CLIP with density 1e-5, rate 1e7 and 10 steps.
    Ours: all parameters of the model are masked, where the authors' list spares those of the text tower.
    """

    density: Fraction = 1e-5
    bias: Annotated[float, Within(0.0, 100.0, open_low=True)] = 5.0
    push: Annotated[float, Within(0.0, 1e6)] = 1.0
    shots: Count | None = 64
    train: Descent = field(default_factory=partial(
        Descent, (CrossEntropy(),), 10, None, 1e7, "constant", 0.0, "sgd"))  # fmt: skip
    split: Literal["train", "val", "calibration", "test"] = "calibration"

    def __call__(self, experts: Experts, context: Context) -> Merged:
        """Raises UserError without inputs or labels, and where the loss is not finite."""
        experts = replace(experts, separate_qkv=False)  # a mask for every parameter as the model has it
        samples, threshold = opened(context, self.split, self.needs).few(self.shots), thresholds(experts, self.density)
        kept = [
            self._localized(experts, context, samples, task, threshold[task, 0]) for task in range(len(experts.tasks))
        ]

        def merge(key: str, tau: Tensor) -> Tensor:
            masks = [unpacked(of_task[key], tau[0].numel()) for of_task in kept]
            return stitched(tau.flatten(1), torch.stack(masks)).view(tau.shape[1:])

        return experts.merged(experts.map(merge))

    def _localized(
        self, experts: Experts, context: Context, samples: Samples, task: int, threshold: Tensor
    ) -> Mapping[str, Tensor]:
        """The mask of every parameter as bits."""
        alone = replace(experts, tasks=experts.tasks[task : task + 1], checkpoints=experts.checkpoints[task : task + 1])
        few = samples.of_task(task)
        tied = {key: first for key, first in experts.tied.items() if {key, first} <= experts.specs().keys()}
        with seeded(context.seed):  # a module starts at random weights
            model = Masked(alone, few, threshold, self, tied)
        context = replace(context, who=f"{context.who}, {experts.tasks[task]}")  # so that no state is another task's
        descend(model, context, alone, self.train, self.split, "learned_localize_and_stitch", few)
        kept = {key: packed(logits.detach().flatten()[None] > 0)[0].cpu() for key, logits in model.logits.items()}
        return kept | {key: kept[first] for key, first in tied.items()}


class Masked(Folded):
    """Learnable (merging.fit): W_0 + sigmoid(`logits`) tau of a single expert; tied names share theirs, the first's."""

    def __init__(
        self, alone: Experts, samples: Samples, threshold: Tensor, method: LearnedLocalizeAndStitch,
        tied: Mapping[str, str],
    ):  # fmt: skip
        super().__init__(alone, samples.data, alone.stream)
        self.push, self.tied = method.push / method.train.lr, tied
        self.logits = {
            key: torch.where(tau[0].abs() > threshold, method.bias, -method.bias).to(samples.data.device)
            for key, tau in alone.stream()
            if key not in tied
        }
        for logits in self.logits.values():
            logits.requires_grad_()

    def parameters(self) -> list[Tensor]:
        return [self.logits[key] for key in dict.fromkeys(map(self.first, self.changed))]

    def change(self, key: str, tau: Tensor) -> Tensor:
        return self.logits[self.first(key)].sigmoid() * tau[0]

    def pull(self, key: str, tau: Tensor, gradient: Tensor) -> None:
        logits = self.logits[self.first(key)]
        soft = logits.detach().sigmoid()
        slope = soft * (1 - soft)
        if logits.grad is None:
            logits.grad = torch.where(logits.detach() > 0, -self.push, self.push) * slope
        logits.grad += gradient * tau[0] * slope
