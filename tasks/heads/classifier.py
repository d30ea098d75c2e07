"""Classifiers that come with an expert: whether their classes are in the order of the labels."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from merging.backbones.hugging_face import check_class_order, class_names


def classes_in(folder: Path) -> tuple[str, ...]:
    """Classes of a Hugging Face classifier in the order of its outputs; none where config.json does not name them."""
    config = folder / "config.json"
    return class_names(json.loads(config.read_text("utf-8"))) if config.is_file() else ()


def check_order(heads: Mapping[str, Sequence[str]], labels: Mapping[str, Sequence[str]]) -> None:
    """Raises UserError where a head has its task's classes in another order, or two heads the same in two orders.

    heads: task -> classes of its head, in their order; labels: task -> those of its labels. Empty where not known.
    """
    first: dict[frozenset[str], str] = {}
    plain = {task: tuple(_plain(name) for name in names) for task, names in heads.items()}
    for task, names in plain.items():
        own = tuple(_plain(name) for name in labels.get(task, ()))
        if set(own) == set(names):
            check_class_order(task, own, names, f"its expert, unlike in the labels of {task}")
        other = first.setdefault(frozenset(names), task)
        if not own:
            check_class_order(task, names, plain[other], other)


def _plain(name: str) -> str:
    return " ".join(str(name).lower().replace("_", " ").split())
