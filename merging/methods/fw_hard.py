import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal

import torch
from torch import Tensor

from merging.context import Context
from merging.errors import UserError
from merging.experts import Experts
from merging.fit.coefficients import Coefficients, Shape, columns, combination
from merging.fit.descent import Descent, Losses, seeded
from merging.fit.objectives import CrossEntropy, Objective
from merging.fit.samples import opened
from merging.merged import Merged
from merging.methods.method import Method, static
from merging.methods.task_arithmetic import TaskArithmetic
from merging.options import Count, Options, Share, Within
from merging.regression import change_of


@dataclass(frozen=True)
class FwHard(Options):
    """FW-Merging, hard: from another merge in steps of Frank-Wolfe, each a little towards one expert.

    Chen et al., 2025, arXiv 2503.12649, by the authors' code. Of the mean loss on labelled samples the gradient is
    taken at the present weights; chosen is the candidate, an expert or the start, whose weights have the smallest
    cosine to it, summed over parameters (granularity "model") or for every parameter alone ("parameter"); the weights
    go 2 scale rate / (step + 2) of the way there. The cosines, of weights and not of what is between them, are the
    authors' linear oracle; a parameter of zeros or without a gradient counts nothing (theirs then choose nothing).
    start: a static method; theirs is Task Arithmetic at 0.3, for the published numbers AdaMerging. steps, rate, samples
    a task: the defaults of their code, which go an eighth of the way at most; published 3 steps at a rate of 0.01,
    parameter by parameter. objective: Entropy does without labels. batch: samples of a task whose gradients are taken
    together.
    """

    start: Method = field(default_factory=TaskArithmetic)
    granularity: Literal["model", "parameter"] = "model"
    steps: Count = 10
    rate: Share = 0.1
    scale: Annotated[float, Within(0.0, 1.0)] = 0.3
    samples: Count = 100
    batch: Count = 20
    objective: Objective = field(default_factory=CrossEntropy)
    split: Literal["train", "val", "calibration", "test"] = "calibration"

    @property
    def needs(self) -> str:
        return self.objective.needs

    @property
    def splits(self) -> tuple[str, ...]:
        return (self.split,)

    def __call__(self, experts: Experts, context: Context) -> Merged:
        """Raises UserError without samples, for a `start` that is not static, and where the loss is not finite."""
        begin = static(self.start, experts, context, "Where Frank-Wolfe starts")
        experts = replace(experts, separate_qkv=False)  # weights as the model has them
        data = opened(context, self.split, self.needs)

        def stream(keys: Sequence[str] | None) -> Iterator[tuple[str, Tensor]]:
            """Changes of all candidates, the start last."""
            yield from ((key, torch.cat([tau, change_of(begin, key)[None]])) for key, tau in experts.stream(keys))

        column, count = columns(experts, self.granularity == "parameter"), len(experts.tasks) + 1
        width = max((place.stop for place in column.values()), default=1)
        first = torch.eye(count)[:, -1:].repeat(1, width)  # all of the start
        with seeded(context.seed):  # a module starts at random weights
            model = Point(experts, data.data, stream, Shape(column, first))
        size = min(self.samples, max(data.data.sizes))
        rounds = math.ceil(size / self.batch)
        descent = Descent([self.objective], batch=math.ceil(size / rounds))
        losses = Losses(descent, data, experts, context.seed)
        for step in range(self.steps):
            chosen = self._cosines(model, losses, rounds, context, step).argmin(0)
            model.go(torch.eye(count)[:, chosen], 2 * self.scale * self.rate / (step + 2))
        values = model.learned
        changes = {key: combination(values[:, column[key]], tau) for key, tau in stream(None)}
        return experts.merged(changes, remarks=begin.remarks)

    def _cosines(self, model: "Point", losses: Losses, rounds: int, context: Context, step: int) -> Tensor:
        """Of every candidate and column, [1 + T, P]."""
        model.fold()
        loss = 0.0
        for _ in range(rounds):
            part = losses.next(model)[0] / rounds
            part.backward()
            loss += float(part.detach())
        if not math.isfinite(loss):
            raise UserError(f"The loss of {context.who} is {loss} at step {step}: lower scale={self.scale} or rate.")
        context.log({f"fw_hard/{self.objective.name}": loss}, step)
        total = torch.zeros_like(model.learned, dtype=torch.float64)
        for key, changes, gradient in model.gradients():
            base, norm = model.experts.base(key).to(gradient.device), gradient.norm()
            for row, change in zip(total[:, model.shape.column[key]], changes, strict=True):
                weight = base + change
                length = float(norm * weight.norm())
                row += float((gradient * weight).sum()) / length if length else 0.0
        return total


class Point(Coefficients):
    """Learnable (merging.fit) whose weights keep the sum of their gradients until they are folded again."""

    def features(self, inputs: Sequence[Any]) -> Sequence[Tensor]:
        return [self.data.features(self.module, some) for some in inputs]

    @torch.no_grad()
    def go(self, target: Tensor, share: float) -> None:
        """Go a share of the way to coefficients [T, P]."""
        self.free += share * (target.to(self.free.device) - self.free)
