"""Heads: parameters that belong to a task and are never merged, mapping a model's features to outputs."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn
from torch.nn import functional

from merging.checkpoints import StateDict
from merging.errors import UserError


class ZeroShot(nn.Module):
    """Cosine classifier: logits = unit features [N, D] @ weight.T, the weight [C, D] scaled by a temperature."""

    weight: Tensor

    def __init__(self, weight: Tensor):
        super().__init__()
        self.register_buffer("weight", weight)

    def forward(self, features: Tensor) -> Tensor:
        return functional.normalize(features.float(), dim=-1) @ self.weight.T


class HeadSource(Protocol):
    """Where the head of a task comes from."""

    def open(self, task: str, classes: Sequence[str]) -> nn.Module: ...
    def content(self, task: str, classes: Sequence[str]) -> str: ...  # id of all that decides it


@dataclass(frozen=True)
class Given:
    """A head that is there already."""

    head: nn.Module

    def open(self, task: str, classes: Sequence[str]) -> nn.Module:
        return self.head.eval().requires_grad_(False)

    def content(self, task: str, classes: Sequence[str]) -> str:
        return StateDict(dict(self.head.state_dict())).id[:16]


def outputs_of(head: nn.Module) -> int | None:
    """How many outputs a head has, by its last matrix; None where it has none."""
    matrices = [tensor for tensor in head.state_dict().values() if tensor.ndim == 2]
    return len(matrices[-1]) if matrices else None


def check_head(task: str, classes: Sequence[str], head: nn.Module) -> None:
    """Raises UserError for a head with another number of outputs than the task has classes."""
    count = outputs_of(head)
    if classes and count is not None and count != len(classes):
        raise UserError(
            f"The head of {task} has {count} outputs, and the task has {len(classes)} classes. Take the head that was "
            f"trained on these classes, or name the classes that it knows in its order."
        )


def classes_in(folder: Path) -> tuple[str, ...]:
    """Classes of a Hugging Face classifier in the order of its outputs; none where config.json does not name them."""
    config = folder / "config.json"
    return class_names(json.loads(config.read_text("utf-8"))) if config.is_file() else ()


def check_class_orders(heads: Mapping[str, Sequence[str]], labels: Mapping[str, Sequence[str]]) -> None:
    """Raises UserError where a head has its task's classes in another order, or two heads the same in two orders.

    heads: task -> classes of its head, in their order; labels: task -> those of its labels. Empty where not known.
    """
    first: dict[frozenset[str], str] = {}
    plain = {task: tuple(_plain(name) for name in names) for task, names in heads.items()}
    for task, names in plain.items():
        classes = tuple(_plain(name) for name in labels.get(task, ()))
        if set(classes) == set(names):
            check_class_order(task, classes, names, f"its expert, unlike in the labels of {task}")
        other = first.setdefault(frozenset(names), task)
        if not classes:
            check_class_order(task, names, plain[other], other)


def class_names(config: Mapping[str, Any]) -> tuple[str, ...]:
    """The classes of a model's config.json in the order of its outputs, none where it does not say."""
    names = {int(index): str(name) for index, name in (config.get("id2label") or {}).items()}
    ordered = tuple(names[index] for index in sorted(names))
    unnamed = ordered == tuple(f"LABEL_{index}" for index in sorted(names))  # transformers' default
    return () if unnamed else ordered


def check_class_order(task: str, first: Sequence[str], second: Sequence[str], where: str) -> None:
    """Raises UserError where both name their classes, and in another order or others."""
    if not first or not second or tuple(first) == tuple(second):
        return
    index = next((i for i, pair in enumerate(zip(first, second, strict=False)) if pair[0] != pair[1]), None)
    index = min(len(first), len(second)) if index is None else index
    one, other = (names[index] if index < len(names) else "nothing" for names in (first, second))
    raise UserError(
        f"{task}: output {index} is {one}, and in the head of {where} it is {other}. Heads are scored by the order of "
        f"their outputs, which is not changed in silence: save that head with the rows of its last layer, and id2label "
        f"of its config.json, for {', '.join(first)} in this order."
    )


def _plain(name: str) -> str:
    return " ".join(str(name).lower().replace("_", " ").split())
