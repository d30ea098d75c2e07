"""One task or group of lm-eval as one of ours; lm-eval itself is imported where it is needed."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from merging.backbones.base import Backbone
from merging.errors import UserError
from tasks.engine import Engine
from tasks.journal import Page
from tasks.score import Score
from tasks.split import Split, Texts, Uncached
from tasks.task import Predict, Predictions

WHOLE = ("batch", "mixed", "group", "token")  # granularities without a w of a prompt
MEASURED = 32  # documents whose prompts are counted before a run
UNLABELLED = -100  # what losses and metrics leave out: the answers are known to lm-eval alone


@dataclass(frozen=True)
class Asking:
    """How the tasks of a suite are asked, and how many documents that are not scored serve routers and coefficients."""

    include_path: str | None = None
    num_fewshot: int | None = None
    chat: str | None = None  # the tokenizer whose chat template is put around prompts
    limit: int | None = None
    calibration: int = 256
    val: int = 200


@dataclass(frozen=True)
class LmEvalTask(Uncached):
    """A task or group of lm-eval: it makes the prompts, judges what the model answers, and gives the standard error.

    Samples are its documents, their inputs the prompts, which routers in training see as they are scored, worked
    examples included. What is scored is its test split, or validation where it has none.
    """

    name: str
    asking: Asking = Asking()
    metric: str | None = None
    reserve: float = 0.0
    classes: Sequence[str] = ()
    prompts_only: ClassVar[bool] = True  # nothing to learn from but what is asked
    is_local: bool = False  # its YAML names its data sets, not the configuration

    def head(self) -> nn.Module | None:
        return None

    def decide(self, outputs: Tensor) -> Predictions:
        raise UserError(
            f"{self.name} is a task of lm-eval, which judges answers itself: bare logits say nothing of it."
        )

    def split(self, name: str) -> Split:
        """Raises UserError where no documents are left for it, and where gates would learn without prompts."""
        asked = harness().requests(self, name)
        if name == "calibration" and asked[0][0].request_type == harness().ROLLING:
            raise UserError(harness().UNPROMPTED.format(self.name))
        prompts = Texts(tuple(harness().prompt(self, requests) for requests in asked))
        return Split(name, prompts, torch.full((len(asked),), UNLABELLED), harness().content(self, name))

    def content(self, what: str) -> str:
        """Id of everything that decides a split; there is no head."""
        return "none" if what == "head" else harness().content(self, what)

    def check(self, backbone: Backbone, splits: Sequence[str] = ()) -> None:
        """Raises UserError for what lm-eval does not have, data that it cannot read, no language model, and splits
        without documents or prompts."""
        tokenizer_of(backbone)
        harness().check(self.name, self.asking.include_path)
        harness().loaded(self.name, self.asking.include_path)
        for split in splits:
            self.split(split)

    def reads(self, split: str, backbone: Backbone) -> int:
        """Tokens of the prompts of a split, by a few of its documents; 0 for a split that there is not."""
        try:
            asked = harness().requests(self, split)
        except UserError:
            return 0
        some = asked[:: max(1, len(asked) // MEASURED)]
        texts = [text for document in some for text in dict.fromkeys(request.args[0] for request in document)]
        lengths = map(len, tokenizer_of(backbone)(texts, verbose=False)["input_ids"])
        return round(sum(min(length, backbone.tokens) for length in lengths) * len(asked) / len(some))

    def notes(self) -> list[str]:
        return [f"{self.name}: {note}." for note in harness().notes(self)]

    def run(self, module: nn.Module, backbone: Backbone, engine: Engine, samples: Split, page: Page) -> Predictions:
        """Answers to the requests of every document, JSON as bytes [N, W], those on the page not asked again."""
        from tasks.lm_eval.model import answerer

        asked = harness().requests(self, samples.name)
        model = answerer(self.name, module, backbone, engine)
        for start in range(page.done, len(asked), engine.batch):
            with torch.no_grad(), engine.running():
                page.add(model.answers(asked[start : start + engine.batch]))
        page.store()
        return page.together()

    def evaluate(self, predict: Predict, split: str) -> Score:
        """What lm-eval makes of the answers."""
        from tasks.lm_eval.scoring import score as score_of

        kept = predict(self.split(split))
        answers = [json.loads(bytes(row.tolist()).rstrip(b"\0")) for row in kept["answers"]]
        score = score_of(self, split, answers)
        if not (cut := int(kept["cut"].sum())):
            return score
        note = f"{cut} of {len(answers)} prompts are longer than the model's context: their beginning is left out"
        return replace(score, notes=(*score.notes, note))


def check_gate(shape: Any) -> None:
    """Raises UserError for gates of a shape whose weights are not those of one prompt."""
    granularity = getattr(shape, "granularity", "sample")
    if granularity in WHOLE:
        raise UserError(
            f"router.gate.granularity={granularity} gives no weights of one prompt, by which lm-eval's requests are "
            f"routed. Set router.gate.granularity=sample."
        )


def tokenizer_of(backbone: Backbone) -> Any:
    """The tokenizer of a backbone. Raises UserError where it has none."""
    if getattr(backbone, "tokenizer", None) is None:
        raise UserError(
            f"lm-eval asks language models, and the backbone {backbone.name} has no tokenizer. Name its folder, "
            f"backbone.tokenizer=<folder or name>, or choose another backbone."
        )
    return backbone._tokenizer  # type: ignore[attr-defined]


def harness() -> ModuleType:
    """tasks.lm_eval.harness. Raises UserError where lm-eval is not installed."""
    try:
        from tasks.lm_eval import harness
    except ImportError as error:
        raise UserError(
            f"Tasks of lm-eval need the package lm_eval ({error}). Install it: pip install 'duet-merging[llm]'."
        ) from error
    return harness
