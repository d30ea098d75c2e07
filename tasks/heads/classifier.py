"""Classifiers that come with an expert: the head of its checkpoint or a file, and the order of its classes."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from merging.errors import UserError
from merging.preflight import some

PLACEHOLDER = "LABEL_"  # how transformers calls classes that nobody named


class MLP(nn.Module):
    """Dense, tanh, projection: the classification head of RoBERTa and its kin."""

    def __init__(self, dense: nn.Linear, out_proj: nn.Linear):
        super().__init__()
        self.dense, self.out_proj = dense, out_proj

    def forward(self, features: Tensor) -> Tensor:
        return self.out_proj(torch.tanh(self.dense(features)))


def classifier(state: Mapping[str, Tensor], where: str) -> nn.Module:
    """The head whose parameters these are: `weight` and `bias`, or `dense.*` and `out_proj.*`, behind any prefix.

    Raises UserError for parameters of no such head.
    """
    prefix = _prefix(list(state))
    layers = {name.removeprefix(prefix): tensor.float() for name, tensor in state.items()}
    parts = sorted({name.rpartition(".")[0] for name in layers})
    if parts == [""] and _is_linear(layers, ""):
        return _linear(layers, "").eval()
    if parts == ["dense", "out_proj"] and all(_is_linear(layers, f"{part}.") for part in parts):
        return MLP(_linear(layers, "dense."), _linear(layers, "out_proj.")).eval()
    raise UserError(
        f"{where} holds no classifier: it has {some(sorted(state)) or 'nothing beside the model'}. What works: one "
        f"linear layer (weight and bias), or two as in RoBERTa (dense and out_proj, a tanh between)."
    )


def _prefix(names: Sequence[str]) -> str:
    """The leading parts of names, up to a dot, that all of them have."""
    shared = []
    for parts in zip(*(name.split(".")[:-1] for name in names), strict=False):
        if len(set(parts)) > 1:
            break
        shared.append(parts[0])
    return "".join(f"{part}." for part in shared)


def _is_linear(layers: Mapping[str, Tensor], start: str) -> bool:
    return f"{start}weight" in layers and layers[f"{start}weight"].ndim == 2


def _linear(layers: Mapping[str, Tensor], start: str) -> nn.Linear:
    weight, bias = layers[f"{start}weight"], layers.get(f"{start}bias")
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias is not None).requires_grad_(False)
    layer.weight.copy_(weight)
    if bias is not None:
        layer.bias.copy_(bias)
    return layer


def class_names(folder: Path) -> tuple[str, ...] | None:
    """Names of the outputs of a Hugging Face classifier in their order, None where config.json does not name them."""
    config = folder / "config.json"
    labels = json.loads(config.read_text("utf-8")).get("id2label") if config.is_file() else None
    names = tuple(labels[key] for key in sorted(labels, key=int)) if labels else ()
    return None if not names or any(str(name).startswith(PLACEHOLDER) for name in names) else names


def check_order(names: Mapping[str, tuple[str, ...] | None], classes: Mapping[str, Sequence[str]]) -> None:
    """Raises UserError where a head has its task's classes in another order, or two heads the same in two orders.

    names: task -> classes of its head, in their order; classes: task -> those of its labels, empty if not known.
    """
    first: dict[frozenset[str], tuple[str, list[str]]] = {}
    for task, order in names.items():
        if order is None:
            continue
        head, labels = ([_plain(name) for name in some_names] for some_names in (order, classes.get(task, ())))
        if labels and sorted(head) == sorted(labels) and head != labels:
            raise _disagree(f"The head of {task} and its labels", order, classes[task])
        other, before = first.setdefault(frozenset(head), (task, head))
        if not labels and before != head:
            raise _disagree(f"The heads of {other} and {task}", names[other] or (), order)


def _disagree(which: str, one: Sequence[str], other: Sequence[str]) -> UserError:
    index = next(place for place, pair in enumerate(zip(one, other, strict=True)) if _plain(pair[0]) != _plain(pair[1]))
    return UserError(
        f"{which} have the same classes in another order: class {index} is {one[index]!r} in one and {other[index]!r} "
        f"in the other. Reorder the rows of the head, or name the classes in its order (suite.sources.<task>.classes)."
    )


def _plain(name: str) -> str:
    return " ".join(str(name).lower().replace("_", " ").split())
