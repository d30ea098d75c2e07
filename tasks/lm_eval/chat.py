"""The chat template of a tokenizer around lm-eval's prompts, as lm-eval's own model class puts it there."""

from collections.abc import Callable
from functools import cache
from types import SimpleNamespace
from typing import Any

from merging.errors import UserError


@cache
def tokenizer_at(path: str) -> Any:
    """Raises UserError for one that cannot be read, and without a chat template."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split()).rstrip(".")
        raise UserError(
            f"suite.tokenizer={path} holds none that transformers reads: {reason}. Name the folder of the model."
        ) from error
    if not tokenizer.chat_template:
        raise UserError(
            f"suite.chat_template=true, and the tokenizer {path} has no chat template. Set suite.chat_template=false, "
            f"which asks with bare prompts, or name a tokenizer that has one: suite.tokenizer=<folder or name>."
        )
    return tokenizer


def template_of(path: str) -> Callable[..., str]:
    """Messages -> text. Raises UserError as `tokenizer_at`."""
    from lm_eval.models.huggingface import HFLM

    model: Any = SimpleNamespace(tokenizer=tokenizer_at(path), chat_template_args={})
    return lambda history, **options: HFLM.apply_chat_template(model, history, **options)


def unbegun(text: str, path: str) -> str:
    """A prompt without the token that begins it, where the tokenizer puts that before every text: it is read once."""
    tokenizer = tokenizer_at(path)
    begin = tokenizer.bos_token or ""
    return text.removeprefix(begin) if tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id] else text
