"""Runs models whose gate looks at samples of several tasks at once."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from merging.backbones.base import Backbone
from merging.merged import Merged
from merging.ops import generator
from merging.routing.gate_features import seen
from merging.routing.groups import grouped
from merging.routing.routed import Routed
from tasks.engine import Engine
from tasks.split import Inputs, Split, gather, mapped

MIXED = ("mixed", "group")  # granularities that look at samples of several tasks at once
Run = Callable[..., tuple[Tensor, Tensor | None]]  # (inputs, gating weights if given) -> features, weights


def mixes_tasks(merged: Merged) -> bool:
    """Whether the scores of a task depend on the samples of the others."""
    return merged.routing is not None and merged.routing.granularity in MIXED


@torch.inference_mode()
def run_together(
    model: Routed, merged: Merged, splits: Sequence[Split], backbone: Backbone, engine: Engine, run: Run
) -> tuple[Tensor, Tensor]:
    """Features [n, D] and weights [n, G] of the samples of all splits, in their order.

    mixed: shuffled batches, each with one w. group: what the gate gives all samples is known first, and groups of
    similar ones share the mean of their weights.
    """
    shape = merged.routing.gate if merged.routing is not None else None
    assert shape is not None
    count = sum(map(len, splits))
    order, group_weights = torch.randperm(count, generator=generator("mixed")), None
    prepare = lambda some: backbone.prepare(_moved(gather(splits, some), engine))  # noqa: E731
    if shape.granularity == "group":
        gate = model.gate
        assert gate is not None
        ask = lambda some: gate.logits(gate.features(*seen(model, prepare(some)))).float()  # noqa: E731
        with engine.running():
            logits = torch.cat([ask(some) for some in torch.arange(count).split(engine.batch)]).cpu()
        labels, means = grouped(gate, logits)
        order, group_weights = labels.argsort(stable=True), means[labels]
    outputs = []
    for some in order.split(engine.batch):
        gate_weights = () if group_weights is None else (group_weights[some].to(engine.torch_device),)
        features, weights = run(prepare(some), *gate_weights)
        outputs.append((features, weights if group_weights is None else group_weights[some]))
    features, weights = (torch.cat(column)[order.argsort()] for column in zip(*outputs, strict=True))
    return features, weights


def _moved(inputs: Inputs, engine: Engine) -> Inputs:
    return mapped(lambda tensor: tensor.to(engine.torch_device), inputs)
