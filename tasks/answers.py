"""Learning to answer: the loss of a language model on the tokens of an answer alone, not on those of its prompt."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from merging.backbones.hugging_face import beside
from merging.errors import UserError


def asked(task: Any) -> bool:
    """Whether the model itself answers a task in text, so that no head is read: it then has `ask` and `told`."""
    return getattr(task, "ask", None) is not None


def answer_losses(backbone: Any, tower: nn.Module, prompts: Sequence[str], answers: Sequence[str]) -> Tensor:
    """[N] mean over the tokens of an answer, the one that ends a text included, of -log p(token | all before it)."""
    inputs, targets, known = encoded(backbone, prompts, answers)
    count = targets.shape[1]
    inputs = beside(tower, inputs)
    logits = tower(**inputs, logits_to_keep=count, use_cache=False).logits
    targets, known = targets.to(logits.device), known.to(logits.device)
    losses = functional.cross_entropy(logits.float().mT, targets, reduction="none")
    return (losses * known).sum(1) / known.sum(1)


def encoded(backbone: Any, prompts: Sequence[str], answers: Sequence[str]) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """What a decoder takes, padded on the left so that answers end together; the tokens [N, A] to tell; where they are.

    Of a prompt that is too long the beginning is left out. Raises UserError for an answer of no text, or too long.
    """
    tokenizer = backbone._tokenizer
    stated = tokenizer(list(prompts))["input_ids"]
    given = [[*ids, tokenizer.eos_token_id] for ids in tokenizer(list(answers), add_special_tokens=False)["input_ids"]]
    for prompt, answer, ids in zip(prompts, answers, given, strict=True):
        if len(ids) == 1 or len(ids) >= backbone.length:
            raise UserError(
                f"The answer {answer!r} to {prompt!r} has {len(ids) - 1} tokens. It needs at least one, and room "
                f"for its prompt in backbone.length={backbone.length}."
            )
    whole = [
        [*prompt[len(answer) - 1 - backbone.length :], *answer] for prompt, answer in zip(stated, given, strict=True)
    ]
    longest, count = max(map(len, whole)), max(map(len, given))
    ids = torch.tensor([[tokenizer.eos_token_id] * (longest - len(text)) + text for text in whole])
    mask = torch.tensor([[0] * (longest - len(text)) + [1] * (len(text) - 1) for text in whole])
    known = torch.tensor([[0] * (count - len(answer)) + [1] * len(answer) for answer in given])
    places = (mask.cumsum(1) - 1).clamp(min=0)
    return {"input_ids": ids[:, :-1], "attention_mask": mask, "position_ids": places}, ids[:, -count:], known
