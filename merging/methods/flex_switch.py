from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Annotated, Literal

import torch
from torch import Tensor

from merging.context import Context
from merging.deltas import Delta, Dense, Scattered
from merging.experts import Experts
from merging.fit.coefficients import Learning
from merging.fit.descent import Descent, descend, seeded, suspicion
from merging.fit.objectives import LogitDistillation
from merging.fit.samples import Samples, opened
from merging.fit.switches import Range, Switches, kept, switchable, width
from merging.merged import Merged, Routing
from merging.options import Count, Fraction, Within
from merging.residual import energy_kept

Learned = Mapping[str, Tensor]  # of an expert, by parameter, see merging.fit.switches


@dataclass(frozen=True)
class FlexSwitch(Learning, prefix="flex_switch: "):
    """FlexSwitch: the large entries of task vectors in a few bits, both learned per parameter, by the true task id.

    After Gao et al., 2026, arXiv 2604.28109, known by its abstract and digests. Every task and parameter has a gate
    sigmoid((|tau| - threshold) / temperature) with a learned threshold and scale, and learns which of 1, 2, 4 and 8
    bits an entry has; where entries lie is stored by groups of the size that costs the fewest bits. Lowered is the KL
    divergence from a task's own expert on 100 inputs. No published rates, steps, schedules, penalties or quantiser are
    known, and this is no reproduction: ours are those, and all starts. A step folds what would be stored; gates and
    choice pass gradients as if they were soft. Thresholds and temperature are in units of a change's root mean square.
    Codes are the middles of equal parts of the range that is kept, times a number that keeps its norm: with one bit
    that is T-Switch's. penalty: times the stored bits per entry, added to the loss. density, bits: where a parameter
    starts. samples: per task, null for all. routed: a router weighs the tasks' changes in place of the true task; with
    router=retrieval and its learned metric, whose loss is ours, that is Auto-FlexSwitch. What is a single number is
    kept as it is. Tasks are learned one after the other: in memory is one model.
    """

    density: Fraction = 0.4
    bits: Literal[1, 2, 4, 8] = 1
    temperature: Annotated[float, Within(0.0, 100.0, open_low=True)] = 0.1
    penalty: Annotated[float, Within(0.0, 1e6)] = 0.5
    samples: Count | None = 100
    routed: bool = False
    train: Descent = field(default_factory=partial(Descent, objectives=(LogitDistillation(),), steps=200, lr=3e-2))
    split: Literal["train", "val", "calibration", "test"] = "calibration"

    def __call__(self, experts: Experts, context: Context) -> Merged:
        """Raises UserError without inputs, for a model that is not the experts', and where the loss is not finite."""
        experts = replace(experts, separate_qkv=False)  # switches of every parameter as the model has it
        samples = opened(context, self.split, self.needs).few(self.samples)
        learned, collapsed = [], []
        for task in range(len(experts.tasks)):
            free, suspected = self._learned(experts, context, samples, task)
            learned.append(free)
            collapsed += suspected
        deltas: dict[str, Delta] = {}
        energy: dict[str, list[float]] = {}
        for key, tau in experts.stream():
            deltas[key] = stored(tau, [free[key] for free in learned]) if switchable(tau) else Dense(tau.clone())
            energy[key] = energy_kept(tau, deltas[key])
        routing = Routing("learned" if self.routed else "oracle")
        return experts.merged({}, deltas=deltas, routing=routing, energy=energy, remarks=suspicion(collapsed))

    def _learned(self, experts: Experts, context: Context, samples: Samples, task: int) -> tuple[Learned, list[str]]:
        """Switches of one expert, and its task if it is suspected of collapse."""
        alone = replace(experts, tasks=experts.tasks[task : task + 1], checkpoints=experts.checkpoints[task : task + 1])
        own = samples.of_task(task)
        with seeded(context.seed):  # a module starts at random weights
            model = Switches(alone, own.data, self.density, self.bits, self.temperature, self.penalty)
        context = replace(context, who=f"{context.who}, {experts.tasks[task]}")  # so that no state is another task's
        collapsed = descend(model, context, alone, self.train, self.split, f"flex_switch/{experts.tasks[task]}", own)
        return model.learned(experts.keys()), collapsed


def stored(tau: Tensor, learned: list[Tensor]) -> Scattered:
    """What switches make of the changes [T, *shape] of a parameter."""
    places, codes, levels = [], [], []
    for change, free in zip(tau, learned, strict=True):
        where = kept(change, free)
        sizes, steps = Range.of(change.abs(), where).coded(width(free))
        places.append(where.flatten().nonzero()[:, 0])
        codes.append(2 * sizes[where].long() + (change[where] < 0))
        levels.append(free[1] * steps)
    return Scattered.of(places, codes, list(map(width, learned)), torch.stack(levels), tau.shape[1:])
