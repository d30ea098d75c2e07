"""GLUE as texts that a Flan-T5 writes, as fusion_bench asks it; the prompts are in facts/flan_t5_glue.yaml."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import yaml

from tasks.generation.task import TextTask
from tasks.generation.texts import encoded
from tasks.hub import HubFile
from tasks.split import Split, Texts, Uncached
from tasks.suite import Suite, divided
from tasks.text import glue

FACTS = Path(__file__).parent / "facts" / "flan_t5_glue.yaml"
TOKENS = 9  # of an answer: fusion_bench writes 10, of which the first starts the decoder


@cache
def facts() -> Mapping[str, Any]:
    """flan_t5_glue.yaml."""
    return yaml.safe_load(FACTS.read_text("utf-8"))


@dataclass(frozen=True)
class Prompted(Uncached):
    """The samples of a task of GLUE as prompts, and their labels as texts."""

    samples: glue.Glue
    classes: Sequence[str] = ()  # answers are texts

    def split(self, name: str) -> Split:
        split, known = self.samples.split(name), facts()[self.samples.task]
        columns, answers = self.samples.facts["texts"], known["answers"]
        rows = [(item,) if isinstance(item, str) else item for item in split.inputs.items]  # type: ignore[union-attr]
        prompts = [known["prompt"].format(**dict(zip(columns, row, strict=True))) for row in rows]
        written = answers.format if isinstance(answers, str) else answers.__getitem__
        return Split(name, Texts(tuple(prompts)), encoded([written(label) for label in split.labels.tolist()]))

    def content(self, split: str) -> str:
        """Id of a split, without reading its rows."""
        made = self.samples.content(split).encode() + FACTS.read_bytes()
        return hashlib.sha256(made).hexdigest()[:16]

    @property
    def is_local(self) -> bool:
        """Whether nothing of it is asked of the Hub."""
        return self.samples.is_local

    def files(self, splits: Sequence[str]) -> list[HubFile]:
        """What the splits are in, on the Hub."""
        return self.samples.files(splits)

    def expected(self, split: str) -> int:
        """How many samples a split has by the published sizes."""
        return self.samples.expected(split)

    def notes(self) -> Iterator[str]:
        """What a reader of the numbers should know of the samples that were read."""
        return self.samples.notes()


def build(
    name: str, tasks: Sequence[str], val: int = 1000, calibration: int = 512, first: int | None = None,
    long: Literal["refuse", "cut"] = "cut", held_out: Sequence[str] = (), folder: str | None = None,
    revision: str | None = None, text: None = None,
) -> Suite:  # fmt: skip
    """The suite of the named tasks; conf/suite/t5_glue8.yaml explains the options. Raises UserError as glue.build."""
    plain = glue.build(name, tasks, val, calibration, first, "glue", (), folder, revision)
    made = [
        TextTask(task.name, Prompted(task.data), None, metrics_of(task.name), long, TOKENS, None, ())  # type: ignore[attr-defined]
        for task in plain.tasks
    ]
    return divided(name, made, held_out)


def metrics_of(task: str) -> tuple[str, ...]:
    """As fusion_bench scores: the same text, or Spearman's correlation of numbers."""
    return ("spearman",) if isinstance(facts()[task]["answers"], str) else ("exact_match",)
