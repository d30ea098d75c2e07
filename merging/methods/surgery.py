from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from merging.calibration import Calibration
from merging.combined import total
from merging.context import Context
from merging.correction import Correction
from merging.experts import Experts
from merging.fit.coefficients import Learning
from merging.fit.descent import Descent, descend
from merging.fit.folded import weights_of
from merging.fit.objectives import FeatureL1
from merging.fit.samples import opened
from merging.merged import Merged, Routing
from merging.methods.method import Method, static
from merging.methods.task_arithmetic import TaskArithmetic
from merging.options import Count


@dataclass(frozen=True)
class Surgery(Learning):
    """Representation Surgery: a small adapter per task behind another merge's encoder, chosen by the true task id.

    Yang et al., 2024, arXiv 2402.02705. In front of its head every task has z - up relu(down z), without biases, which
    begins as z and learns to give the features of the task's own expert. then: what merges the encoder, at its own
    coefficient. rank: of down, published 16. train: the descent; published the mean absolute difference (l1), Adam at
    1e-3, 16 samples, 500 rounds of two steps for every task, which its own Adam steps equal, as tasks share no number.
    The encoder does not move, so that it is run once on every sample. split: whose inputs; the authors' are the test
    inputs, "test" is that transductive setting.
    """

    then: Method = field(default_factory=TaskArithmetic)
    rank: Count = 16
    train: Descent = field(
        default_factory=partial(Descent, objectives=(FeatureL1(),), lr=1e-3, steps=1000, schedule="constant")
    )
    split: Literal["train", "val", "calibration", "test"] = "calibration"

    def __call__(self, experts: Experts, context: Context) -> Merged:
        """Raises UserError without inputs, for a `then` that is not static, and a model that is not the experts'."""
        merged = static(self.then, experts, context, "What surgery corrects")
        samples = opened(context, self.split, self.needs)
        weights_of(experts, samples.data.tower())
        model = Behind(merged, samples.data, self.rank, context.seed)
        descend(model, context, experts, self.train, self.split, "surgery", samples._replace(data=model.data))
        corrections = {task: made.cpu().requires_grad_(False) for task, made in model.corrections.items()}
        scale = 1.0 if merged.scale is None else merged.scale
        changes = total((scale, merged.shared), (1.0, merged.fixed))
        return replace(
            merged,
            shared={},
            fixed=changes,
            scale=None,
            remade=None,
            corrections=corrections,
            routing=Routing("oracle"),
        )


class Behind:
    """Learnable (merging.fit): the corrections of a static merge. Inputs are tasks and rows, looked up in `known`."""

    def __init__(self, merged: Merged, data: Calibration, rank: int, seed: int):
        self.tasks = merged.tasks
        self.known = features_of(merged, data)
        self.data = replace(
            data,
            inputs=lambda task, rows: (task, rows),
            read=lambda module, place: data.read(module, data.inputs(*place)),
        )
        self.corrections = {
            task: Correction.untrained(known.shape[-1], rank, seed, task).to(data.device)
            for task, known in zip(self.tasks, self.known, strict=True)
        }

    def parameters(self) -> list[Tensor]:
        return [number for correction in self.corrections.values() for number in correction.parameters()]

    def features(self, inputs: Sequence[Any]) -> Sequence[Tensor]:
        return [self.corrections[self.tasks[task]](self.known[task][rows]) for task, rows in inputs]

    def after(self) -> None:
        """The corrections have their gradients."""


@torch.no_grad()
def features_of(merged: Merged, data: Calibration) -> list[Tensor]:
    """What heads read of a static merge on all inputs of every task, [n, D] each."""
    module = data.model(merged.base)
    state = module.state_dict()
    for key, weight in merged.state():
        if key in state:
            state[key].copy_(weight)
    tasks = range(len(merged.tasks))
    return [torch.cat([data.features(module, inputs) for inputs in data.batches(task)]) for task in tasks]
