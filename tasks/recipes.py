"""How an expert is trained: optimizer, schedule, batch, length."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from torch import nn

from merging.errors import UserError
from merging.preflight import check_range
from tasks.adapters import Adapter

OPTIMIZERS = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam}
Schedule = Literal["cosine", "cosine_after_warmup", "constant"]
RANGES = {
    "steps": (1, 10**9), "batch": (1, 10**6), "lr": (0.0, 1.0), "warmup": (0, 10**9), "weight_decay": (0.0, 10**6),
    "clip": (0.0, math.inf), "epochs": (0.0, 10**6), "head_lr": (0.0, 1.0),
}  # fmt: skip
ABOVE = ("lr", "clip", "epochs", "head_lr")  # must be above the lower bound


@dataclass(frozen=True)
class Recipe:
    """One learning rate for all parameters of the tower, with a linear warm-up; the defaults are those of mini8.

    optimizer: adamw | adam. schedule: cosine falls while it warms up, cosine_after_warmup from the peak to zero,
    constant stays. clip: gradient norm, None is any. accumulate: pieces of a batch, to save memory; the result is the
    same up to rounding. frozen: parameters that keep their values. epochs: instead of steps, passes over the training
    samples. head_lr: peak rate of a linear head that starts at zero and is trained too, without weight decay; None
    keeps the task's head as it is. group_by_length: batches of samples near to each other in the split, whose texts
    are in order of length, so that less is padded. adapter: what is trained in place of the tower's weights, None is
    the weights themselves.
    """

    steps: int = 80
    batch: int = 64
    lr: float = 5.0e-4
    warmup: int = 20
    weight_decay: float = 0.01
    clip: float | None = 1.0
    optimizer: Literal["adamw", "adam"] = "adamw"
    schedule: Schedule = "cosine"
    accumulate: int = 1
    frozen: Sequence[str] = ()
    epochs: float | None = None
    head_lr: float | None = None
    group_by_length: bool = False
    adapter: Adapter | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "frozen", tuple(self.frozen))
        if self.adapter is not None and self.frozen:
            raise UserError("recipe: frozen and adapter are both set. An adapter trains none of the tower's weights.")
        for name, (low, high) in {**RANGES, "accumulate": (1, self.batch)}.items():
            if (value := getattr(self, name)) is not None:
                check_range(f"recipe: {name}", value, low, high, open_low=name in ABOVE)
        for name, known in (("optimizer", tuple(OPTIMIZERS)), ("schedule", get_args(Schedule))):
            if getattr(self, name) not in known:
                raise UserError(f"recipe: {name}={getattr(self, name)} is unknown. Choose one of {', '.join(known)}.")

    def rate(self, step: int) -> float:
        """Learning rate of a step, counted from 0."""
        warm = min(1.0, (step + 1) / max(self.warmup, 1))
        if self.schedule == "cosine":
            return self.lr * warm * 0.5 * (1 + math.cos(math.pi * step / self.steps))
        if step < self.warmup or self.schedule == "constant":
            return self.lr * warm
        return self.lr * 0.5 * (1 + math.cos(math.pi * (step - self.warmup) / (self.steps - self.warmup)))

    def tuned(self, tower: nn.Module) -> list[nn.Parameter]:
        """The parameters to train, those of an adapter put in now; the others are set to need no gradient.

        Raises UserError for a frozen name that the tower does not have, and where nothing is left to train.
        """
        if self.adapter is not None:
            return self.adapter.put_into(tower)
        named = dict(tower.named_parameters())
        if unknown := [name for name in self.frozen if name not in named]:
            raise UserError(f"recipe: frozen names {unknown[0]}, which the tower lacks. It has: {', '.join(named)}.")
        for name, parameter in named.items():
            parameter.requires_grad_(name not in self.frozen)
        chosen = [parameter for parameter in named.values() if parameter.requires_grad]
        if not chosen:
            raise UserError("recipe: frozen names every parameter. Leave some to train.")
        return chosen

    def stepper(self, body: Sequence[nn.Parameter], head: Sequence[nn.Parameter] = ()) -> torch.optim.Optimizer:
        """The optimizer; `rate` times a group's share is yet to be set before every step."""
        groups: list[dict[str, Any]] = [{"params": list(body), "weight_decay": self.weight_decay, "share": 1.0}]
        if head:
            groups.append({"params": list(head), "weight_decay": 0.0, "share": (self.head_lr or self.lr) / self.lr})
        return OPTIMIZERS[self.optimizer](groups)

    def for_samples(self, count: int) -> "Recipe":
        """The recipe for that many training samples: epochs become steps, the last one rounded up."""
        if self.epochs is None:
            return self
        return replace(self, steps=max(1, math.ceil(self.epochs * count / self.batch)), epochs=None)

    def for_tasks(self, count: int) -> "Recipe":
        """The recipe for one model of that many tasks: as many times the steps, those of the warm-up included."""
        return replace(self, steps=count * self.steps, warmup=count * self.warmup)


@dataclass(frozen=True)
class ClipRecipe(Recipe):
    """How CLIP is tuned in the literature: the defaults are those of Ilharco et al., 2023, and their successors."""

    steps: int = 2000
    batch: int = 128
    lr: float = 1.0e-5
    warmup: int = 500
    weight_decay: float = 0.1
    schedule: Schedule = "cosine_after_warmup"
