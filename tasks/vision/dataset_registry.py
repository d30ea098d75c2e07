"""What is published about each task: its data set, class names in label order, prompts, and variants by code base.

One file per task in facts/. A variant is named after the code base whose numbers it reproduces and says only what
differs from fusion_bench.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from merging.errors import UserError
from tasks.suite import known

FACTS = Path(__file__).with_name("facts")
DEFAULT = "fusion_bench"
VARIANTS = (DEFAULT, "task_vectors", "tall_masks", "task_singular_vectors")


@dataclass(frozen=True)
class Facts:
    """One task as one code base has it."""

    name: str
    variant: str
    classes: tuple[str, ...]  # as written into the prompts, in label order
    templates: tuple[str, ...]  # {} marks the class name
    hub: Mapping[str, object] | None  # id, args, image, label, train, test; None where the Hub has no copy
    sizes: Mapping[str, int] = field(default_factory=dict)  # images of the published splits
    labels: tuple[str, ...] = ()  # other names that copies of the data set give its labels, in order
    order: str = "checked"  # free: class names that are published in another order than the labels
    note: str = ""  # why numbers of this variant may not be comparable


def names() -> tuple[str, ...]:
    """The tasks that facts are known of."""
    return tuple(sorted(path.stem for path in FACTS.glob("*.yaml")))


def facts(task: str, variant: str = DEFAULT) -> Facts:
    """Raises UserError for a task or a variant that nothing is known of."""
    known(task, names(), "of published data sets")
    if variant not in VARIANTS:
        raise UserError(f"suite.variant={variant} is not known. Choose one of {', '.join(VARIANTS)}.")
    record = dict(read(FACTS / f"{task}.yaml"))
    variants = record.pop("variants", {})
    record |= variants.get(variant, {})
    for listed in ("classes", "templates", "labels"):
        record[listed] = tuple(record.get(listed, ()))
    return Facts(task, variant, **record)


def published_copy(known: Facts) -> dict[str, object]:
    """Where the published copy lies; validation is drawn from train even where a part for it is there."""
    if known.hub is None:
        raise UserError(
            f"{known.name} of {known.variant} has no known copy on the Hub. Say where yours lies: "
            f"+suite.sources.{known.name}.folder=<folder>."
        )
    rest = {key: value for key, value in known.hub.items() if key != "id"}
    return {"hub": known.hub["id"], "val": False, **rest}


@cache
def read(path: Path) -> Mapping:
    """A YAML file."""
    import yaml

    return yaml.safe_load(path.read_text("utf-8"))


def check_order(facts: Facts, label_names: Sequence[str] | None) -> None:
    """Raises UserError where the label names of a copy are the known ones in another order."""
    have = tuple(map(_plain, label_names or ()))
    lists = [tuple(map(_plain, names)) for names in (facts.classes, facts.labels) if names]
    if label_names is None or facts.order == "free" or have in lists:
        return
    for names in lists:
        if sorted(have) == sorted(names):
            index = next(i for i, pair in enumerate(zip(have, names, strict=True)) if pair[0] != pair[1])
            raise UserError(
                f"The labels of this copy of {facts.name} are in another order than its class names: label {index} is "
                f"{label_names[index]!r}, the zero-shot head has {facts.classes[index]!r} there. Use the published "
                f"copy, or give this one's class names in suite.sources.{facts.name}.classes."
            )


def _plain(name: str) -> str:
    return "".join(letter for letter in name.lower() if letter.isalnum())
