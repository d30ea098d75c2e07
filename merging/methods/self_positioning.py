from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Annotated, Literal

import torch
from torch import Tensor

from merging.context import Context
from merging.experts import Experts
from merging.fit.coefficients import Learning, Shape, columns, combination, learn
from merging.fit.descent import Descent
from merging.fit.objectives import CrossEntropy
from merging.fit.samples import opened
from merging.inner_products import products
from merging.merged import Merged
from merging.methods.slerp import arc
from merging.options import Within
from merging.preflight import check_order

SGD = partial(Descent, objectives=(CrossEntropy(),), lr=0.05, steps=200, schedule="constant", optimizer="sgd")


@dataclass(frozen=True)
class SelfPositioning(Learning):
    """Self Positioning: task vectors folded along arcs, at shares and a length that are learned with labels.

    Li et al., 2024, arXiv 2410.15035, by its formulas in a digest: no reproduction. Of whole task vectors, as they are,
    V = tau_1, then one after the other V goes a_k / (mean(a_1 .. a_k-1) + a_k) of the way along its arc to tau_k; the
    change is lambda V. Printed the shares are the other way round, which for more than two is another fold. The paper
    learns a and lambda for embedding models, by SGD on InfoNCE of 32,000 pairs of all tasks; ours is the cross-entropy
    with the labels through the tasks' heads (train.objectives). penalty: times lambda, added to the loss, published
    best below 0.05. length: lambda at the start; a starts at 1; both, and the rate, steps and batch, are ours, as none
    are known. order: of the tasks, on which the result depends; null is by name. Where a cosine is above 0.9995 or
    below -0.9995 the way is straight.
    """

    length: Annotated[float, Within(0.0, 100.0, open_low=True)] = 1.0
    penalty: Annotated[float, Within(0.0, 100.0)] = 0.01
    order: Sequence[str] | None = None
    train: Descent = field(default_factory=SGD)
    split: Literal["train", "val", "calibration", "test"] = "calibration"

    def __call__(self, experts: Experts, context: Context) -> Merged:
        """Raises UserError without samples, for an order of other tasks, and where the loss is not finite."""
        order = sorted(experts.tasks) if self.order is None else list(self.order)
        check_order("self_positioning", order, experts.tasks)
        experts = replace(experts, separate_qkv=False)
        places = torch.tensor([experts.tasks.index(task) for task in order])
        column, count = columns(experts, by_parameter=False), len(order)
        start = torch.cat([torch.ones(count), torch.tensor([self.length])])
        made, penalty = partial(_positioned, gram(experts), places), lambda values: self.penalty * values[0, 1]
        samples = opened(context, self.split, self.needs)
        shape = Shape(column, start, made, penalty)
        values, remarks = learn(self, experts, context, experts.stream, shape, samples)
        changes = {key: combination(values[:, :1], tau) for key, tau in experts.stream()}
        return experts.merged(changes, remarks=remarks)


def gram(experts: Experts) -> Tensor:
    """Products [T, T] fp64 of whole task vectors, tied weights counted once."""
    count = len(experts.tasks)
    parts = (product for key, product in products(experts).items() if key not in experts.tied and len(product))
    return sum((product[0, 1:, 1:] for product in parts), torch.zeros(count, count).double())


def _positioned(gram: Tensor, places: Tensor, free: Tensor) -> Tensor:
    """Coefficients of the task vectors and, which no parameter reads, lambda beside them, [T, 2]; free: a, lambda."""
    shares, length = free[:-1].double(), free[-1]
    inner = gram[places][:, places].to(free.device)
    folded = folded_to(inner, shares)
    values = torch.zeros_like(folded).scatter(0, places.to(free.device), folded)
    return torch.stack([length * values, length.double().expand(len(values))], 1).float()


def folded_to(inner: Tensor, shares: Tensor) -> Tensor:
    """Coefficients [T] of the fold of vectors with products [T, T] at shares a [T], fp64."""
    corners = torch.eye(len(inner), dtype=inner.dtype, device=inner.device)
    folded = corners[0]
    for index in range(1, len(inner)):
        pair = torch.stack([folded, corners[index]])
        share = shares[index] / (shares[:index].mean() + shares[index])
        folded = arc(pair @ inner @ pair.T, share) @ pair
    return folded
