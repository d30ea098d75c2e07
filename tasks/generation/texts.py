"""Texts as tensors, prompts as the samples of a split, and rules by which answers are compared."""

import math
import re
import string
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from merging.errors import UserError
from merging.preflight import some
from tasks.split import Split, Texts

Question = str | tuple[str, tuple[str, ...]]  # a prompt, or a prompt and the answers to choose from
ARTICLES = re.compile(r"\b(a|an|the)\b")


def encoded(texts: Sequence[str]) -> Tensor:
    """uint8 [N, L]: UTF-8, filled up with zeros."""
    rows = [text.replace("\0", "").encode() for text in texts]
    width = max(1, *map(len, rows)) if rows else 1
    return torch.frombuffer(bytearray(b"".join(row.ljust(width, b"\0") for row in rows)), dtype=torch.uint8).view(
        len(rows), width
    )


def decoded(codes: Tensor) -> list[str]:
    """The texts of `encoded`."""
    return [bytes(row).rstrip(b"\0").decode(errors="replace") for row in codes.to(torch.uint8).tolist()]


def split_of(name: str, questions: Sequence[Question], answers: Sequence[int] | Sequence[str]) -> Split:
    """Prompts and their answers, indices of choices or texts; short prompts first, so that a batch is of like length.

    Raises UserError for an empty prompt and where there are not as many answers.
    """
    if len(questions) != len(answers):
        raise UserError(f"{name} has {len(questions)} prompts and {len(answers)} answers. Give every prompt one.")
    prompts = [prompt if isinstance(prompt, str) else prompt[0] for prompt in questions]
    if empty := [index for index, prompt in enumerate(prompts) if not prompt.strip()]:
        raise UserError(f"Prompt {empty[0]} of {name} is an empty text. Leave it out, or write what is asked.")
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    ordered = [answers[index] for index in order]
    labels = encoded(ordered) if ordered and isinstance(ordered[0], str) else torch.tensor(ordered)  # type: ignore[arg-type]
    return Split(name, Texts(tuple(questions[index] for index in order)), labels)  # type: ignore[arg-type]


def number(text: str) -> float:
    """A text that is a finite number, 0 for any other."""
    try:
        value = float(text)
    except ValueError:
        return 0.0
    return value if math.isfinite(value) else 0.0


RULES: Mapping[str, Callable[[str], str]] = {
    "strip": str.strip,
    "lower": str.lower,
    "first_line": lambda text: text.strip().partition("\n")[0],
    "no_punctuation": lambda text: text.translate(str.maketrans("", "", string.punctuation)),
    "no_articles": lambda text: ARTICLES.sub(" ", text),
    "one_space": lambda text: " ".join(text.split()),
}


def ruled(text: str, rules: Sequence[str]) -> str:
    """A text after the rules, one after the other."""
    for rule in rules:
        text = RULES[rule](text)
    return text


def check_rules(task: str, rules: Sequence[str]) -> None:
    """Raises UserError for a rule that there is not."""
    if unknown := [rule for rule in rules if rule not in RULES]:
        raise UserError(f"The rules of {task} have {some(unknown)}. There are {', '.join(RULES)}.")
