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
    order, given = torch.randperm(count, generator=generator("mixed")), None
    prepare = lambda some: backbone.prepare(_moved(gather(splits, some), engine))  # noqa: E731
    if shape.granularity == "group":
        gate = model.gate
        assert gate is not None
        ask = lambda some: gate.logits(gate.features(*seen(model, prepare(some)))).float()  # noqa: E731
        with engine.running():
            logits = torch.cat([ask(some) for some in torch.arange(count).split(engine.batch)]).cpu()
        labels, means = grouped(gate, logits)
        order, given = labels.argsort(stable=True), means[labels]
    answers = []
    for some in order.split(engine.batch):
        features, weights = run(prepare(some), *([] if given is None else [given[some].to(engine.place)]))
        answers.append((features, weights if given is None else given[some]))
    back = order.argsort()
    return torch.cat([features for features, _ in answers])[back], torch.cat([w for _, w in answers])[back]  # type: ignore[arg-type]


def _moved(inputs: Inputs, engine: Engine) -> Inputs:
    return mapped(lambda tensor: tensor.to(engine.place), inputs)
