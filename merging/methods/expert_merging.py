from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Annotated, Literal

import torch
from torch import Tensor

from merging.context import Context
from merging.errors import UserError
from merging.experts import Experts
from merging.fit.coefficients import Learning, Shape, columns, combination, learn
from merging.fit.descent import Descent
from merging.fit.objectives import FeatureError, LogitDistillation
from merging.fit.samples import Samples, opened
from merging.merged import Merged
from merging.options import Count, Within

Learned = tuple[Tensor, dict[str, slice], tuple[str, ...]]  # coefficients [T, P], their columns, remarks


@dataclass(frozen=True)
class ExpertMerging(Learning, prefix="expert_merging: "):
    """Expert Merging: a coefficient in (0, 1) per expert and matrix, learned from what experts say to a few inputs.

    Zhang et al., 2025, arXiv 2509.25712. Coefficients are sigmoids that start at init; lowered are the distance to the
    predictions of each input's own expert, the squared error of features, and penalty times the mean distance from
    init. samples: unlabelled ones per task. budget: chunks per matrix on average, null for one each; with a budget
    (Expert Merging++) matrix l has floor(budget L I_l^power / sum_j I_j^power) flat chunks in a second descent, where
    I_l = sum_t |alpha_tl| |tau_tl|_1 of the first, and one without any keeps init. Only matrices of attention and FFNs
    are merged, all else is the base's, as published. train: the authors' AdamW at 0.5 with clipped gradients; their one
    epoch of 5 inputs a task in batches of 8 is a handful of steps, ours sees all inputs in each. Ours: features are
    those in front of the head alone, not of several layers; penalty is off, as the authors' 5 holds the coefficients of
    small models at init. Unknown: the authors' power, and what their budgets of 0.9 to 1.2 multiply. Left out: weights
    of tasks, all 1 in the authors' code.
    """

    init: Annotated[float, Within(1e-6, 1 - 1e-6)] = 0.1
    samples: Count | None = 5
    penalty: Annotated[float, Within(0.0, 1e6)] = 0.0
    budget: Annotated[float, Within(0.0, 1e4, open_low=True)] | None = None
    power: Annotated[float, Within(0.0, 10.0)] = 1.0
    train: Descent = field(default_factory=partial(
        Descent, (LogitDistillation(), FeatureError()), 5, None, 0.5, "constant", 1e-5, "adamw", 1.0))  # fmt: skip
    split: Literal["train", "val", "calibration", "test"] = "calibration"

    def __call__(self, experts: Experts, context: Context) -> Merged:
        """Raises UserError without inputs, without such matrices, and where the loss is not finite."""
        experts = replace(experts, separate_qkv=False)  # a coefficient for every parameter as the model has it
        samples = opened(context, self.split, self.needs).few(self.samples)
        matrices = [key for key, spec in experts.specs().items()
                    if experts.param(key).family in ("ffn", "attention") and len(spec.shape) == 2]  # fmt: skip
        if not matrices:
            raise UserError("expert_merging: these models have no matrix of attention or FFN, and no other is merged.")
        part = experts.part(matrices)
        values, column, remarks = self._learned(part, context, samples, dict.fromkeys(matrices, 1))
        if self.budget is not None:
            chunks = self.chunks(part, {key: values[:, column[key]] for key in matrices})
            chunked = replace(context, who=f"{context.who}, in chunks")  # a state of its own, should it be killed
            values, column, remarks = self._learned(part, chunked, samples, chunks)
        changes = part.map(lambda key, tau: combination(values[:, column[key]], tau))
        return experts.merged(changes, remarks=remarks)

    def _learned(self, experts: Experts, context: Context, samples: Samples, chunks: Mapping[str, int]) -> Learned:
        """With a last column for all parameters without a chunk of their own, which stays at init."""
        tasks, column = len(experts.tasks), columns(experts, chunks=chunks)
        free = max(span.stop for span in column.values())
        column = {key: span if span.stop > span.start else slice(free, free + 1) for key, span in column.items()}
        start = torch.full((tasks, free), self.init).logit()

        def made(raw: Tensor) -> Tensor:
            return torch.cat([raw.sigmoid(), raw.new_full((tasks, 1), self.init)], 1)

        def far(values: Tensor) -> Tensor:  # as in the authors' code, where every sample of every task adds it
            distance = (values[:, :free] - start.to(values.device).sigmoid()).abs().sum() / max(free, 1)
            return self.penalty * tasks * distance

        shape = Shape(column, start, made, far if self.penalty else None)
        values, remarks = learn(self, experts, context, experts.stream, shape, samples)
        return values, column, remarks

    def chunks(self, experts: Experts, values: Mapping[str, Tensor]) -> dict[str, int]:
        """How many every parameter has, by the coefficients [T, 1] of each in one piece."""
        assert self.budget is not None
        sizes = {key: tau.flatten(1).abs().sum(1) for key, tau in experts.stream()}
        importance = torch.stack([values[key][:, 0].abs() @ sizes[key] for key in values]).double()
        shares = (importance / importance.sum().clamp_min(1e-30)) ** self.power
        counts = (self.budget * len(shares) * shares / shares.sum().clamp_min(1e-30) + 1e-9).floor()
        entries = {key: spec.shape.numel() for key, spec in experts.specs().items()}
        return {key: min(int(count), entries[key]) for key, count in zip(values, counts, strict=True)}
