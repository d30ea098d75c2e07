"""Gradient descent on whatever is free in a merged model."""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from itertools import islice
from typing import Annotated, Any, Literal, Protocol

import torch
from safetensors.torch import load, save
from torch import Tensor

from merging.cache import code, key_of
from merging.calibration import expert_features
from merging.context import Context, nested
from merging.deltas import below
from merging.errors import UserError
from merging.experts import Experts
from merging.fit.objectives import Batch, Entropy, Objective, mean_entropy
from merging.fit.samples import Samples, opened
from merging.identity import identity
from merging.options import Options, Within

SECONDS = 30.0  # between two states on disk
ENTROPY: tuple[Objective, ...] = (Entropy(),)
OPTIMIZERS = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}


@dataclass(frozen=True)
class Descent(Options, prefix="train."):
    """Adam on the weighted sum of objectives, each summed over the tasks.

    objectives: a list, or by names so that a command line can reach each; those of weight 0 are left out. batch:
    samples per task and step, null for all. lr: learning rate. schedule: of lr, a cosine to zero, or constant.
    optimizer: "adam", whose weight decay is part of the gradient; "adamw", where it stands apart; "sgd". clip: the
    largest norm that the gradient of all free numbers keeps.
    """

    objectives: Mapping[str, Objective] | Sequence[Objective] = ENTROPY
    steps: Annotated[int, Within(1, 10**7)] = 1000
    batch: Annotated[int, Within(1, 10**6)] | None = 16
    lr: Annotated[float, Within(0.0, 1e9, open_low=True)] = 1.0e-4  # above 1 for SGD alone
    schedule: Literal["cosine", "constant"] = "cosine"
    weight_decay: float = 0.0
    optimizer: Literal["adam", "adamw", "sgd"] = "adam"
    clip: Annotated[float, Within(0.0, 1e9, open_low=True)] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.optimizer != "sgd" and self.lr > 1:
            raise UserError(f"train.lr={self.lr} is out of range for {self.optimizer}: at most 1.")
        listed = self.objectives.values() if isinstance(self.objectives, Mapping) else self.objectives
        object.__setattr__(self, "objectives", tuple(objective for objective in listed if objective.weight))
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

    def stepper(self, parameters: list[Tensor]) -> torch.optim.Optimizer:
        """The optimizer of these free numbers."""
        return OPTIMIZERS[self.optimizer](parameters, self.lr, weight_decay=self.weight_decay)

    def rate(self, step: int) -> float:
        """The learning rate of a step."""
        return cosine(self.lr, step, self.steps) if self.schedule == "cosine" else self.lr


def terms_of(method: object, router: object) -> list[Objective]:
    """What a method, those inside it and a router lower, by descents or by steps of their own."""
    parts = [*nested(method), getattr(router, "train", None)]
    descents = [term for part in parts if isinstance(part, Descent) for term in part.terms]
    return descents + [part for part in parts if isinstance(part, Objective)]


def cosine(lr: float, step: int, steps: int) -> float:
    """A learning rate that falls from `lr` to zero over `steps`."""
    return lr * 0.5 * (1 + math.cos(math.pi * step / steps))


class Learnable(Protocol):
    """A merged model some of whose numbers are free."""

    tasks: tuple[str, ...]

    def parameters(self) -> list[Tensor]:
        """The free numbers, leaves with gradients."""
        ...

    def features(self, inputs: Sequence[Any]) -> Sequence[Tensor]:
        """What the heads read, [n, D] per task, of a batch of inputs of every task, under the free numbers."""
        ...

    def after(self) -> None:
        """Called after the backward pass of a step: gather the gradients of the free numbers."""
        ...


def descend(
    model: Learnable, context: Context, experts: Experts, descent: Descent, split: str, prefix: str = "fit",
    samples: Samples | None = None,
) -> list[str]:  # fmt: skip
    """Train the free numbers of `model` in place; returns the tasks suspected of collapse (`collapsed`).

    samples: of the experts' tasks, in place of all of a split. A model may have a `penalty()`, which is added to the
    loss, `shares` [T] of the tasks in it, and `before(step)`, called in front of each. The context's log gets every
    objective of every step as `prefix/name`. A descent that was killed goes on from its last state where the context
    keeps unfinished work. Raises UserError where the loss is not finite.
    """
    samples = samples or opened(context, split, descent.needs)
    optimizer = descent.stepper(model.parameters())
    state, written = _State(optimizer, context, identity([descent, split, samples.data.ids])), time.monotonic()
    done, predictions = state.restore(len(model.tasks))
    losses = Losses(descent, samples, experts, context.seed, done)
    for step in range(done, descent.steps):
        getattr(model, "before", _nothing)(step)
        optimizer.param_groups[0]["lr"] = descent.rate(step)
        optimizer.zero_grad(set_to_none=True)
        loss, terms, seen = losses.next(model)
        for steps, batch in zip(predictions, seen, strict=True):
            steps.append(summary(batch.logits))
        loss.backward()
        model.after()
        if descent.clip is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), descent.clip)
        optimizer.step()
        if not loss.isfinite():
            raise UserError(f"The loss of {context.who} is {loss.item()} at step {step}: lower train.lr={descent.lr}.")
        context.log({f"{prefix}/{name}": value for name, value in terms.items()}, step)
        if time.monotonic() - written > SECONDS:
            state.store(step + 1, predictions)
            written = time.monotonic()
    return [name for name, steps in zip(model.tasks, predictions, strict=True) if collapsed(torch.stack(steps))]


def _nothing(step: int) -> None:
    """What most models do before a step."""


class Losses:
    """What a descent lowers: its objectives on batches of every task, drawn anew for every step from `done` on."""

    def __init__(self, descent: Descent, samples: Samples, experts: Experts, seed: object, done: int = 0):
        self.terms, self.data, self._batches = descent.terms, samples.data, _batches(samples, experts)
        self._draws = [
            islice(self.data.drawn(task, descent.batch or size, seed), done, None)
            for task, size in enumerate(self.data.sizes)
        ]

    def next(self, model: Learnable) -> tuple[Tensor, dict[str, float], list[Batch]]:
        """The weighted sum on the next batches, what every objective adds up to, and the batches."""
        chosen = [next(draw) for draw in self._draws]
        features = model.features([self.data.inputs(task, rows) for task, rows in enumerate(chosen)])
        seen = self._batches(features, chosen)
        return *_loss(self.terms, seen, getattr(model, "penalty", None), getattr(model, "shares", None)), seen


def _batches(samples: Samples, experts: Experts) -> Callable[[Sequence[Tensor], Sequence[Tensor]], list[Batch]]:
    """How batches are made of features and chosen rows of every task."""
    data, labels = samples

    @cache
    def targets() -> Sequence[Tensor]:
        return expert_features(experts.checkpoints, data)

    def batches(features: Sequence[Tensor], chosen: Sequence[Tensor]) -> list[Batch]:
        return [
            Batch(of_task, lambda x, task=task: data.outputs(task, x),
                  lambda task=task, rows=rows: _labelled(labels, task, rows),
                  lambda task=task, rows=rows: targets()[task][rows])
            for task, (of_task, rows) in enumerate(zip(features, chosen, strict=True))
        ]  # fmt: skip

    return batches


def _labelled(labels: Sequence[Tensor], task: int, rows: Tensor) -> Tensor:
    """Labels [n] of some samples. Raises UserError where none are known."""
    if not labels:
        raise UserError(
            "An objective compares with trusted labels, and there are none: pseudo_labels is for atlas, which makes "
            "them. Choose another objective, such as entropy without labels or cross_entropy with them."
        )
    return labels[task][rows.to(labels[task].device)]


def _loss(
    objectives: Sequence[Objective], batches: Sequence[Batch], penalty: Callable[[], Tensor] | None,
    shares: Tensor | None = None,
) -> tuple[Tensor, dict[str, float]]:  # fmt: skip
    """The weighted sum with the penalty, and what every objective adds up to without its weight."""
    loss, terms = torch.zeros((), device=batches[0].features.device), {}
    for objective in objectives:
        parts = [objective(batch) for batch in batches]
        if shares is not None:
            parts = [share * part for share, part in zip(shares, parts, strict=True)]
        total = sum(parts, torch.zeros((), device=loss.device))
        loss, terms[objective.name] = loss + objective.weight * total, float(total.detach())
    return loss if penalty is None else loss + penalty(), terms


def summary(logits: Tensor) -> Tensor:
    """The mean prediction over logits [B, C], and the mean entropy behind it, [C + 1]."""
    logits = logits.detach().float()
    return torch.cat([logits.softmax(-1).mean(0), mean_entropy(logits)[None]])


def collapsed(steps: Tensor) -> bool:
    """Whether a task's predictions fell onto few classes while their entropy went down, by their summaries [n, C + 1].

    So it is when the entropy of the mean prediction over the last quarter of the steps lies below half of log C, and
    the mean entropy is lower than over the first quarter.
    """
    quarter = max(len(steps) // 4, 1)
    first, last = steps[:quarter].mean(0), steps[-quarter:].mean(0)
    return bool(last[-1] < first[-1] and torch.special.entr(last[:-1]).sum() < 0.5 * math.log(len(last) - 1))


def suspicion(collapsed: Sequence[str]) -> tuple[str, ...]:
    """What is to be said of the tasks that the collapse guard suspects."""
    return (f"suspected of collapse: {', '.join(collapsed)}",) if collapsed else ()


@dataclass(frozen=True)
class _State:
    """What a killed descent goes on from, among the context's unfinished work."""

    optimizer: torch.optim.Optimizer
    context: Context
    facts: object

    @property
    def _key(self) -> str:
        return key_of("descent", code(("merging",)), self.context.who, self.facts, self.context.seed)

    @property
    def _parameters(self) -> list[Tensor]:
        return self.optimizer.param_groups[0]["params"]

    def store(self, step: int, predictions: list[list[Tensor]]) -> None:
        """Remember that `step` steps are done, and the summaries of every task."""
        if self.context.unfinished is None:
            return
        tensors = {"step": torch.tensor(step)}
        tensors |= {f"predictions.{task}": torch.stack(steps) for task, steps in enumerate(predictions)}
        for index, parameter in enumerate(self._parameters):
            moments = {name: torch.as_tensor(value) for name, value in self.optimizer.state[parameter].items()}
            tensors |= {f"{index}.{name}": value for name, value in (moments | {"value": parameter.detach()}).items()}
        self.context.unfinished.put(self._key, save({name: tensor.contiguous() for name, tensor in tensors.items()}))

    @torch.no_grad()
    def restore(self, tasks: int) -> tuple[int, list[list[Tensor]]]:
        """Put back what was stored; the number of steps that are done, and the summaries of every task."""
        written = None if self.context.unfinished is None else self.context.unfinished.get(self._key)
        if written is None:
            return 0, [[] for _ in range(tasks)]
        stored, state = load(written), self.optimizer.state_dict()
        for index, parameter in enumerate(self._parameters):
            state["state"][index] = below(stored, f"{index}.")
            parameter.copy_(state["state"][index].pop("value"))
        self.optimizer.load_state_dict(state)
        return int(stored["step"]), [list(stored[f"predictions.{task}"]) for task in range(tasks)]


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """torch's global generators, which layers draw from, start at `seed` and are put back afterwards."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield
