"""Gradient descent on whatever is free in a merged model."""

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from itertools import islice
from typing import Annotated, Literal

import torch
from safetensors.torch import load, save
from torch import Tensor

from merging.cache import code, key_of
from merging.calibration import expert_features
from merging.context import Context
from merging.errors import UserError
from merging.experts import Experts
from merging.fit.collapse import CollapseGuard
from merging.fit.learnable import Learnable
from merging.fit.objectives import Batch, Entropy, Objective
from merging.identity import identity
from merging.options import Options, Rate, Within

SECONDS = 30.0  # between two states on disk
ENTROPY: tuple[Objective, ...] = (Entropy(),)


@dataclass(frozen=True)
class Descent(Options, prefix="train."):
    """Adam on the weighted sum of objectives, each summed over the tasks.

    objectives: a list, or by names so that a command line can reach each; those of weight 0 are left out. batch:
    samples per task and step. lr: learning rate. schedule: of lr, a cosine to zero, or constant.
    """

    objectives: Mapping[str, Objective] | Sequence[Objective] = ENTROPY
    steps: Annotated[int, Within(1, 10**7)] = 1000
    batch: Annotated[int, Within(1, 10**6)] = 16
    lr: Rate = 1.0e-4
    schedule: Literal["cosine", "constant"] = "cosine"
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        given = self.objectives.values() if isinstance(self.objectives, Mapping) else self.objectives
        object.__setattr__(self, "objectives", tuple(objective for objective in given if objective.weight))
        if not self.objectives:
            raise UserError("train.objectives has no objective with a weight: there is nothing to learn from.")

    @property
    def terms(self) -> tuple[Objective, ...]:
        """The objectives that count."""
        return self.objectives  # type: ignore[return-value]

    @property
    def needs(self) -> str:
        """inputs, or labels where an objective compares with them."""
        return "labels" if any(objective.needs == "labels" for objective in self.terms) else "inputs"

    def rate(self, step: int) -> float:
        """The learning rate of a step."""
        return cosine(self.lr, step, self.steps) if self.schedule == "cosine" else self.lr


def cosine(lr: float, step: int, steps: int) -> float:
    """A learning rate that falls from `lr` to zero over `steps`."""
    return lr * 0.5 * (1 + math.cos(math.pi * step / steps))


def descend(
    model: Learnable, context: Context, experts: Experts, descent: Descent, split: str, prefix: str = "fit"
) -> list[str]:
    """Train the free numbers of `model` in place; returns the tasks that the collapse guard suspects.

    The context's log gets every objective of every step as `prefix/name`. A descent that was killed goes on from its
    last state where the context keeps unfinished work. Raises UserError where the loss is not finite.
    """
    data, batches = _data(context, experts, descent, split)
    parameters, guard = model.parameters(), CollapseGuard(model.tasks)
    optimizer = torch.optim.Adam(parameters, descent.lr, weight_decay=descent.weight_decay)
    state, written = _State(model, optimizer, guard, context, identity([descent, split, data.ids])), time.monotonic()
    done = state.restore()
    draws = [islice(data.drawn(task, descent.batch, context.seed), done, None) for task in range(len(model.tasks))]
    for step in range(done, descent.steps):
        chosen = [next(draw) for draw in draws]
        optimizer.param_groups[0]["lr"] = descent.rate(step)
        optimizer.zero_grad(set_to_none=True)
        model.before()
        features = model.features([data.images(task, rows) for task, rows in enumerate(chosen)])
        loss, terms = _loss(descent.terms, batches(features, chosen), guard)
        loss.backward()
        model.after()
        optimizer.step()
        if not loss.isfinite():
            raise UserError(f"The loss of {context.who} is {loss.item()} at step {step}: lower train.lr={descent.lr}.")
        context.log({f"{prefix}/{name}": value for name, value in terms.items()}, step)
        if time.monotonic() - written > SECONDS:
            state.store(step + 1)
            written = time.monotonic()
    return guard.collapsed()


def _data(context: Context, experts: Experts, descent: Descent, split: str):
    """The inputs, and how batches are made of features and chosen rows. Labels are opened where they are needed."""
    if descent.needs == "labels":
        data, labels = context.labelled(split)
    else:
        data, labels = context.unlabelled(split), []

    @cache
    def targets() -> Sequence[Tensor]:
        return expert_features(experts.checkpoints, data)

    def batches(features: Sequence[Tensor], chosen: Sequence[Tensor]) -> list[Batch]:
        return [
            Batch(found, lambda x, task=task: data.outputs(task, x),
                  lambda task=task, rows=rows: labels[task][rows.to(labels[task].device)],
                  lambda task=task, rows=rows: targets()[task][rows])
            for task, (found, rows) in enumerate(zip(features, chosen, strict=True))
        ]  # fmt: skip

    return data, batches


def _loss(
    objectives: Sequence[Objective], batches: Sequence[Batch], guard: CollapseGuard
) -> tuple[Tensor, dict[str, float]]:
    """The weighted sum, and what every objective adds up to without its weight."""
    loss, terms = torch.zeros((), device=batches[0].features.device), {}
    for objective in objectives:
        total = sum((objective(batch) for batch in batches), torch.zeros((), device=loss.device))
        loss, terms[objective.name] = loss + objective.weight * total, float(total.detach())
    for task, batch in enumerate(batches):
        guard.note(task, batch.logits)
    return loss, terms


@dataclass(frozen=True)
class _State:
    """What a killed descent goes on from, in the context's place for unfinished work."""

    model: Learnable
    optimizer: torch.optim.Optimizer
    guard: CollapseGuard
    context: Context
    facts: object

    @property
    def _key(self) -> str:
        return key_of("descent", code(("merging",)), self.context.who, self.facts, self.context.seed)

    def store(self, step: int) -> None:
        """Remember that `step` steps are done."""
        if self.context.unfinished is None:
            return
        moments = {
            f"adam.{index}.{name}": torch.as_tensor(value)
            for index, state in self.optimizer.state_dict()["state"].items()
            for name, value in state.items()
        }
        values = {f"parameter.{index}": value.detach() for index, value in enumerate(self.model.parameters())}
        guard = {f"guard.{name}": value for name, value in self.guard.state().items()}
        tensors = {"step": torch.tensor(step), **values, **moments, **guard}
        self.context.unfinished.put(self._key, save({name: tensor.contiguous() for name, tensor in tensors.items()}))

    @torch.no_grad()
    def restore(self) -> int:
        """Put back what was stored; the number of steps that are done."""
        written = None if self.context.unfinished is None else self.context.unfinished.get(self._key)
        if written is None:
            return 0
        stored = load(written)
        parameters, moments = self.model.parameters(), self.optimizer.state_dict()
        for index, value in enumerate(parameters):
            value.copy_(stored[f"parameter.{index}"])
        moments["state"] = {index: _under(stored, f"adam.{index}.") for index in range(len(parameters))}
        self.optimizer.load_state_dict(moments)
        self.guard.restore(_under(stored, "guard."))
        return int(stored["step"])


def _under(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """torch's global generators, which layers draw from, start at `seed` and are put back afterwards."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield
