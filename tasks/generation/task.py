"""Tasks of language models: one of several answers is chosen, or an answer is written."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import partial
from itertools import accumulate, pairwise
from typing import Any, ClassVar, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from merging.backbones.language import Asked, common
from merging.errors import UserError
from merging.preflight import check_range
from tasks.generation.texts import check_rules, decoded, encoded, number, ruled
from tasks.metrics import measure, metric
from tasks.score import Score
from tasks.split import Inputs, Split, take
from tasks.task import LabelledTask, Predict, Predictions, Reading

Ids = list[int]
Long = Literal["refuse", "cut"]
Per = Literal["answer", "token", "character"]
CHUNK = 1024  # texts that are tokenised at once
OTHERS = ("name", "data", "heads")  # fields that say nothing of how a model is asked and its answers are compared


class Tokens(NamedTuple):
    """Questions as ids. cut: how many prompts lost their beginning."""

    prompts: list[Ids]
    choices: list[list[Ids]]
    cut: int = 0


@dataclass(frozen=True)
class LanguageTask(LabelledTask):
    """A task whose inputs are prompts: no head reads the model, it is asked. No chat template is put around a prompt.

    long: what is done with prompts that do not fit into the model with their answers: "refuse", or "cut" the beginning.
    """

    ask: ClassVar[str]
    metrics: Sequence[str] = ("accuracy",)
    long: Long = "refuse"

    def __post_init__(self) -> None:
        check_one("long", self.long, get_args(Long))

    def content(self, what: str) -> str:
        """Of the "head": how the model is asked and its answers are compared."""
        if what != "head":
            return super().content(what)
        facts = {one.name: getattr(self, one.name) for one in fields(self) if one.name not in OTHERS}
        return hashlib.sha256(json.dumps([self.ask, facts], default=list).encode()).hexdigest()[:16]

    def notes_on(self, backbone: Any, inputs: Inputs) -> list[str]:
        """How many prompts are cut. Raises UserError for one that does not fit and is not to be cut."""
        count = len(inputs)
        chunks = (take(inputs, slice(start, start + CHUNK)) for start in range(0, count, CHUNK))
        cut = sum(self.tokens_of(backbone, chunk).cut for chunk in chunks)
        lost = (
            f"{cut} of {count} prompts lost their beginning, to fit into {backbone.context} tokens with their answers"
        )
        return [lost] if cut else []

    def tokens_of(self, backbone: Any, inputs: Inputs) -> Tokens:
        raise NotImplementedError

    def _fitted(self, backbone: Any, prompts: list[Ids], texts: Sequence[str], answers: Sequence[int]) -> Tokens:
        """Prompts in whose context an answer of so many tokens has room."""
        cut = 0
        for index, (ids, answer) in enumerate(zip(prompts, answers, strict=True)):
            room = backbone.context - (0 if backbone.two_stacks else answer)
            if len(ids) <= room:
                continue
            if self.long == "refuse" or room < 1:
                raise UserError(
                    f"A prompt of {self.name} has {len(ids)} tokens, and {room} fit: {texts[index][:60]!r}. Set "
                    f"backbone.length, to what the model was made for at most, or long=cut, to leave out beginnings."
                )
            prompts[index], cut = ids[len(ids) - room :], cut + 1
        return Tokens(prompts, [], cut)


@dataclass(frozen=True)
class ChoiceTask(LanguageTask):
    """The answer is the likeliest of several texts behind the prompt, as they are: most begin with a space.

    Inputs are prompts, or prompts with choices of their own; labels are indices. choices: those of all prompts. per:
    what a likelihood is divided by: nothing ("answer"), its "token"s, or its "character"s.
    """

    ask: ClassVar[str] = "choices"
    choices: Sequence[str] = ()
    per: Per = "answer"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_one("per", self.per, get_args(Per))

    def questions(self, inputs: Inputs) -> list[tuple[str, tuple[str, ...]]]:
        """Prompts and choices. Raises UserError where there are none, or an empty one."""
        pairs = [(item, tuple(self.choices)) if isinstance(item, str) else item for item in inputs]  # type: ignore[union-attr]
        if odd := next((prompt for prompt, choices in pairs if not choices or not all(choices)), None):
            raise UserError(f"{self.name} asks {odd[:60]!r} with an empty choice, or none. Give every prompt texts.")
        return pairs  # type: ignore[return-value]

    def told(self, inputs: Inputs, labels: Tensor) -> tuple[list[str], list[str]]:
        """Prompts and their right answers."""
        pairs = self.questions(inputs)
        return [prompt for prompt, _ in pairs], [pairs[i][1][label] for i, label in enumerate(labels.tolist())]

    def tokens_of(self, backbone: Any, inputs: Inputs) -> Tokens:
        """A decoder's prompt is what the tokens of all its texts, prompt and choice in one, begin with."""
        pairs = self.questions(inputs)
        texts, prompts = [prompt for prompt, _ in pairs], backbone.ids([prompt for prompt, _ in pairs])
        whole = backbone.ids([("" if backbone.two_stacks else text) + one for text, many in pairs for one in many])
        ends = accumulate((len(many) for _, many in pairs), initial=0)
        choices = [whole[start:end] for start, end in pairwise(ends)]
        if not backbone.two_stacks:
            shared = [common([ids, *rows]) for ids, rows in zip(prompts, choices, strict=True)]
            choices = [[ids[size:] for ids in rows] for size, rows in zip(shared, choices, strict=True)]
            prompts = [ids[:size] for size, ids in zip(shared, prompts, strict=True)]
        for text, ids, rows in zip(texts, prompts, choices, strict=True):
            if not ids or not all(rows):
                raise UserError(
                    f"{self.name} asks {text[:60]!r}, and no token is left of it before its choices, or none of one "
                    f"of them behind it. Write longer prompts, and choices that are not what they end with."
                )
        fitted = self._fitted(backbone, prompts, texts, [max(map(len, rows)) for rows in choices])
        return fitted._replace(choices=choices)

    def reading(self, backbone: Any) -> Reading:
        def prepare(inputs: Inputs) -> Asked:
            tokens = self.tokens_of(backbone, inputs)
            divide = partial(divided, sizes=self._sizes(inputs, tokens))
            scores = lambda module, asked: divide(backbone.likelihoods(module, asked, tokens.choices))  # noqa: E731
            return backbone.asked(tokens.prompts, scores)

        return Reading(prepare, lambda module, asked: asked.read(module), partial(self.notes_on, backbone))

    def _sizes(self, inputs: Inputs, tokens: Tokens) -> list[list[int]]:
        """By what likelihoods are divided."""
        if self.per == "token":
            return [list(map(len, rows)) for rows in tokens.choices]
        return [[len(one) if self.per == "character" else 1 for one in many] for _, many in self.questions(inputs)]


def divided(scores: Tensor, sizes: Sequence[Sequence[int]]) -> Tensor:
    """[B, C] over sizes, ragged; what is left out is as it was."""
    most = scores.shape[1]
    return scores / torch.tensor([[*row, *[1] * (most - len(row))] for row in sizes], device=scores.device)


@dataclass(frozen=True)
class TextTask(LanguageTask):
    """The answer is a text that the model writes greedily; labels are texts, see `texts.encoded`.

    tokens: of an answer at most. stop: text at which an answer ends, beside the end that the model itself writes.
    rules: what is done to answers and labels before they are compared. Metrics of numbers compare texts that are
    numbers, and take others for 0.
    """

    ask: ClassVar[str] = "text"
    metrics: Sequence[str] = ("exact_match",)
    tokens: int = 16
    stop: str | None = "\n"
    rules: Sequence[str] = ("strip",)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(f"tokens of {self.name}", self.tokens, 1, 10**5)
        check_rules(self.name, self.rules)

    def told(self, inputs: Inputs, labels: Tensor) -> tuple[list[str], list[str]]:
        """Prompts and their right answers."""
        return list(inputs), decoded(labels)  # type: ignore[arg-type]

    def tokens_of(self, backbone: Any, inputs: Inputs) -> Tokens:
        texts = list(inputs)
        return self._fitted(backbone, backbone.ids(texts), texts, [self.tokens] * len(texts))  # type: ignore[arg-type]

    def reading(self, backbone: Any) -> Reading:
        def write(module: nn.Module, asked: Asked) -> Tensor:
            texts = backbone.writes(module, asked, self.tokens, self.stop)
            broken = torch.tensor([text is None for text in texts])
            return encoded([text or "" for text in texts]).float().masked_fill(broken[:, None], torch.nan)

        prepare = lambda inputs: backbone.asked(self.tokens_of(backbone, inputs).prompts, backbone.next_logits)  # noqa: E731
        return Reading(prepare, write, partial(self.notes_on, backbone))

    def decide(self, outputs: Tensor) -> Predictions:
        """The texts; empty where the model's logits were not finite."""
        return {"predicted": outputs.nan_to_num(0).to(torch.uint8)}

    def evaluate(self, predict: Predict, split: str) -> Score:
        samples: Split = self.split(split)
        answers, labels = ([ruled(text, self.rules) for text in decoded(codes)]
                           for codes in (predict(samples)["predicted"], samples.labels))  # fmt: skip
        if metric(self.metrics[0]).compares == "numbers":
            predicted, truth = (torch.tensor(list(map(number, texts))) for texts in (answers, labels))
        else:
            predicted, truth = encoded([*answers, *labels]).split(len(labels))
        return measure(self.metrics, self.name, predicted, truth, self.classes)


def check_one(option: str, value: str, known: Sequence[str]) -> None:
    """Raises UserError for a value that there is not."""
    if value not in known:
        raise UserError(f"{option}={value!r} is unknown. Choose one of {', '.join(known)}.")
