"""The smol4 suite: four small tasks that a decoder answers in words, stored beside those of gloss8."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from tasks.generation.task import ChoiceTask, TextTask
from tasks.generation.texts import split_of
from tasks.split import Split
from tasks.suite import Suite, divided, known, sized
from tasks.text.questions import TOPICS

DATA = Path(__file__).parents[1] / "text" / "data" / "smol4"
BETWEEN = "|"  # of stored choices
PROMPTS = {
    "word": "Definition: {}\nWord:",
    "kind": "Word: {}\nA kind of:",
    "topic": "Definition: {}\nTopic:",
    "decade": "Speech: {}\nDecade:",
}
TOPIC_TOKENS = 4  # of the longest, with the end


@dataclass(frozen=True)
class Stored:
    """The prompts of one task. sizes: of every split, at most what is stored; a smaller one is the start of it."""

    task: str
    sizes: tuple[tuple[str, int], ...]
    classes: Sequence[str] = ()

    def split(self, name: str) -> Split:
        """Prompts with their choices and the place of the right one, or with the text that is right."""
        return _split(self.task, name, dict(self.sizes)[name])

    def content(self, split: str) -> str:
        """Id of a split, without reading it."""
        facts = f"{_digest(self.task)} {PROMPTS[self.task]} {split} {dict(self.sizes)[split]}"
        return hashlib.sha256(facts.encode()).hexdigest()[:16]


@cache
def _digest(task: str) -> str:
    return hashlib.sha256((DATA / f"{task}.parquet").read_bytes()).hexdigest()


@cache
def _split(task: str, name: str, size: int) -> Split:
    from pyarrow import parquet

    rows = parquet.read_table(DATA / f"{task}.parquet", filters=[("split", "=", name)]).slice(0, size).to_pylist()
    prompts = [PROMPTS[task].format(row["text"]) for row in rows]
    if task == "topic":
        return split_of(name, prompts, [" " + TOPICS[row["label"]].removeprefix("noun.") for row in rows])
    choices = [tuple(f" {choice}" for choice in row["pair"].split(BETWEEN)) for row in rows]
    return split_of(name, list(zip(prompts, choices, strict=True)), [row["label"] for row in rows])


def build(name: str, tasks: Sequence[str], sizes: Mapping[str, int], held_out: Sequence[str] = ()) -> Suite:
    """The suite of the named tasks, `held_out` among them, which are scored only.

    Raises UserError for an unknown or repeated task, where none is left to merge, and for sizes below 1.
    """
    chosen = sized(name, sizes)
    made = [_task(known(task, tuple(PROMPTS), name), chosen) for task in tasks]
    return divided(name, made, held_out)


def _task(name: str, sizes: tuple[tuple[str, int], ...]) -> ChoiceTask | TextTask:
    data = Stored(name, sizes)
    return TextTask(name, data, tokens=TOPIC_TOKENS) if name == "topic" else ChoiceTask(name, data)
