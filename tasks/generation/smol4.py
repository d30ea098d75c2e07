"""The smol4 suite: four small tasks that a decoder answers in words, stored beside those of gloss8."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from tasks.generation.task import ChoiceTask, TextTask
from tasks.generation.texts import split_of
from tasks.split import Split
from tasks.suite import Suite, divided, known, sized
from tasks.text.questions import TOPICS
from tasks.text.stored import Stored

DATA = Path(__file__).parents[1] / "text" / "data" / "smol4"
BETWEEN = "|"  # of stored choices
PROMPTS = {
    "word": "Definition: {}\nWord:",
    "order": "Words: {}\nSentence:",
    "topic": "Definition: {}\nTopic:",
    "decade": "Speech: {}\nDecade:",
}
WRITTEN = {"order": (16, "rouge2"), "topic": (4, "exact_match")}  # tokens of the longest, with its end; metric


@dataclass(frozen=True)
class Prompts(Stored):
    """The prompts of one task with their choices and the place of the right one, or with the text that is right."""

    classes: Sequence[str] = ()
    folder: ClassVar[Path] = DATA
    asked: ClassVar[Mapping[str, str]] = PROMPTS

    def made(self, name: str, rows: Sequence[Mapping[str, Any]]) -> Split:
        texts = [alphabetical(row["text"]) if self.task == "order" else row["text"] for row in rows]
        prompts = [PROMPTS[self.task].format(text) for text in texts]
        if self.task == "order":
            return split_of(name, prompts, [f" {row['text']}" for row in rows])
        if self.task == "topic":
            return split_of(name, prompts, [" " + TOPICS[row["label"]].removeprefix("noun.") for row in rows])
        choices = [tuple(f" {choice}" for choice in row["pair"].split(BETWEEN)) for row in rows]
        return split_of(name, list(zip(prompts, choices, strict=True)), [row["label"] for row in rows])


def alphabetical(sentence: str) -> str:
    """Its words in alphabetical order."""
    return " ".join(sorted(sentence.split()))


def build(name: str, tasks: Sequence[str], sizes: Mapping[str, int], held_out: Sequence[str] = ()) -> Suite:
    """The suite of the named tasks, `held_out` among them, which are scored only.

    Raises UserError for an unknown or repeated task, where none is left to merge, and for sizes below 1.
    """
    chosen = sized(name, sizes)
    made = [_task(known(task, tuple(PROMPTS), name), chosen) for task in tasks]
    return divided(name, made, held_out)


def _task(name: str, sizes: tuple[tuple[str, int], ...]) -> ChoiceTask | TextTask:
    data = Prompts(name, sizes)
    if name not in WRITTEN:
        return ChoiceTask(name, data)
    tokens, metric = WRITTEN[name]
    return TextTask(name, data, metrics=(metric,), tokens=tokens)
