"""Language models that are asked: prompts as they take them, likelihoods of given answers, answers they write."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from merging.errors import UserError

LOWEST = torch.finfo(torch.float32).min  # the likelihood of a choice that a sample does not have
Ids = Sequence[int]


class Asked(dict[str, Any]):
    """Prompts as a model takes them by name; `read` maps a model to what it answers to them, [B, ...].

    A batch by itself: two of them are not put together, as their answers are not among what the model takes.
    """

    def __init__(self, inputs: Mapping[str, Tensor], read: Callable[[nn.Module, "Asked"], Tensor]):
        super().__init__(inputs)
        self._read = read

    def read(self, module: nn.Module) -> Tensor:
        """What the model answers; differentiable where it scores."""
        return self._read(module, self)


class Speaking:
    """The part of a backbone of transformers that is asked by texts: prompts in, likelihoods or texts out."""

    length: int
    _tokenizer: Any
    _config: Any
    _built: Callable[[], nn.Module]

    @property
    def two_stacks(self) -> bool:
        """Whether a decoder answers what an encoder reads."""
        return bool(self._config.is_encoder_decoder)

    @property
    def context(self) -> int:
        """Tokens that are read at most: `length`, or as many positions as the model has."""
        return min(self.length, getattr(self._config, "max_position_embeddings", None) or self.length)

    def ids(self, texts: Sequence[str]) -> list[list[int]]:
        """The tokens of whole texts, with those that the tokenizer begins and ends a text with."""
        return self._tokenizer(list(texts), verbose=False)["input_ids"]

    def text(self, ids: Sequence[int]) -> str:
        """The text of ids, without special tokens."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=True)

    def asked(self, prompts: Sequence[Ids], read: Callable[[nn.Module, Asked], Tensor]) -> Asked:
        """Prompts of token ids as the model takes them, a decoder's padded on the left. read: what they ask."""
        ids, mask = padded(prompts, left=not self.two_stacks)
        if self.two_stacks:
            start = torch.full((len(ids), 1), self._config.decoder_start_token_id)
            return Asked({"input_ids": ids, "attention_mask": mask, "decoder_input_ids": start}, read)
        positions = (mask.cumsum(1) - 1).clamp_min(0)
        return Asked({"input_ids": ids, "attention_mask": mask, "position_ids": positions}, read)

    def likelihoods(self, module: nn.Module, asked: Asked, choices: Sequence[Sequence[Ids]]) -> Tensor:
        """Log-likelihoods [B, C] of choices, ids[sample][choice], behind prompts; LOWEST where a sample has fewer."""
        return likelihoods(module, beside(module, asked), choices, self._last, self._cache)

    def next_logits(self, module: nn.Module, asked: Asked) -> Tensor:
        """Logits [B, V] of the first token behind prompts."""
        return module(**beside(module, asked), **self._last).logits[:, -1]

    def writes(self, module: nn.Module, asked: Asked, tokens: int, stop: str | None = None) -> list[str | None]:
        """What a model writes greedily behind prompts, at most `tokens`, up to its end or to `stop`.

        None where logits were not numbers.
        """
        rows = written(module, beside(module, asked), tokens, (*self.ends, *self._stops(stop)), self.ends[0])
        return [self._until(row, stop) for row in rows.tolist()]

    def _until(self, row: list[int], stop: str | None) -> str | None:
        if row[0] < 0:
            return None
        count = next((index for index, token in enumerate(row) if token in self.ends), len(row))
        text = self.text(row[:count])
        return text if stop is None else text.partition(stop)[0]

    @cached_property
    def ends(self) -> tuple[int, ...]:
        """Ids that end a text, by the tokenizer and by the configuration. Raises UserError where there is none."""
        known = self._config.eos_token_id
        several = known if isinstance(known, list | tuple) else (known,)
        ends = tuple(dict.fromkeys(end for end in (self._tokenizer.eos_token_id, *several) if end is not None))
        if not ends:
            raise UserError("Neither the tokenizer nor backbone.config has an eos_token_id, so that no text would end.")
        return ends

    def _stops(self, stop: str | None) -> tuple[int, ...]:
        """The tokens that hold `stop`: behind one nothing counts any more."""
        if stop not in self._stopping:
            tokens = range(len(self._tokenizer)) if stop else ()
            self._stopping[stop] = tuple(token for token in tokens if stop in self._tokenizer.decode([token]))  # type: ignore[operator]
        return self._stopping[stop]

    @cached_property
    def _stopping(self) -> dict[str | None, tuple[int, ...]]:
        return {}

    @cached_property
    def _options(self) -> tuple[str, ...]:
        """What the model's forward takes: names differ by version."""
        with torch.device("meta"):
            return tuple(inspect.signature(self._built().forward).parameters)

    @property
    def _last(self) -> dict[str, int]:
        """Options by which the model gives logits at the last position alone."""
        return {name: 1 for name in ("logits_to_keep", "num_logits_to_keep") if name in self._options}

    @property
    def _cache(self) -> str:
        """The name of keys and values."""
        return "cache" if "cache" in self._options else "past_key_values"


def untied(model: Any) -> Any:
    """A model with an output table of its own: transformers 5 ties all T5, unless a file that it loads has both."""
    output, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if output is not None and output.weight is embedding.weight:
        output.weight = nn.Parameter(output.weight.detach().clone())
    return model


def beside(module: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The inputs on the module's device: those of texts are made on the CPU."""
    device = next(getattr(module, "func", module).parameters()).device  # of a partial, given its weights
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in inputs.items()}


def padded(rows: Sequence[Ids], left: bool, fill: int = 0) -> tuple[Tensor, Tensor]:
    """Ids [B, L] and their mask [B, L], the shorter rows filled on the left or on the right."""
    width = max(map(len, rows))
    ids = torch.full((len(rows), width), fill)
    mask = torch.zeros_like(ids)
    for index, row in enumerate(rows):
        place = slice(width - len(row), width) if left else slice(0, len(row))
        ids[index, place], mask[index, place] = torch.tensor(row, dtype=torch.int64), 1
    return ids, mask


def common(rows: Sequence[Ids]) -> int:
    """How many first ids all rows share."""
    return next((i for i, column in enumerate(zip(*rows, strict=False)) if len(set(column)) > 1), min(map(len, rows)))


def likelihoods(
    module: nn.Module,
    inputs: Mapping[str, Tensor],
    choices: Sequence[Sequence[Ids]],
    last: Mapping[str, int],
    cache: str,
) -> Tensor:
    """Log-likelihoods [B, C] of choices, ids[sample][choice], that follow prompts; LOWEST where a sample has fewer.

    A prompt is read once. Its keys and values serve all choices, one after the other, so that a choice costs its own
    tokens but the last. inputs: of a decoder with `position_ids`, of an encoder-decoder with `decoder_input_ids`.
    last: options of the forward that make a model give logits at the last position alone. cache: its name for keys and
    values.
    """
    answer = module(**inputs, **last, use_cache=True)
    first, columns = answer.logits[:, -1].float(), []
    for column in range(max(map(len, choices))):
        rows = [sample[column] if column < len(sample) else () for sample in choices]
        ids, mask = (tensor.to(first.device) for tensor in padded(rows, left=False))
        scores = scored(first[:, None], ids[:, :1])
        if ids.shape[1] > 1:
            rest = continued(module, inputs, answer, ids[:, :-1], mask[:, :-1], cache)
            scores = torch.cat([scores, scored(rest.float(), ids[:, 1:])], 1)
        columns.append((scores * mask).sum(1).masked_fill(mask[:, 0] == 0, LOWEST))
    return torch.stack(columns, 1)


def scored(logits: Tensor, ids: Tensor) -> Tensor:
    """Log-probabilities [B, L] of ids [B, L] under logits [B, L, V]."""
    return logits.gather(-1, ids[..., None])[..., 0] - logits.logsumexp(-1)


def continued(
    module: nn.Module, inputs: Mapping[str, Tensor], answer: Any, ids: Tensor, mask: Tensor, name: str
) -> Tensor:
    """Logits [B, L, V] of ids [B, L] behind a prompt, whose cache is left as it was."""
    cache = answer.past_key_values
    if "decoder_input_ids" in inputs:
        encoder = {"encoder_outputs": (answer.encoder_last_hidden_state,), "attention_mask": inputs["attention_mask"]}
        logits = module(decoder_input_ids=ids, use_cache=True, **{name: cache}, **encoder).logits
    else:
        positions = inputs["position_ids"][:, -1:] + 1 + torch.arange(ids.shape[1], device=ids.device)
        whole = torch.cat([inputs["attention_mask"], mask], 1)
        where = {"attention_mask": whole, "position_ids": positions}
        logits = module(input_ids=ids, use_cache=True, **{name: cache}, **where).logits
    cache.crop(-ids.shape[1])
    return logits


def written(module: Any, inputs: Mapping[str, Tensor], tokens: int, ends: Sequence[int], fill: int) -> Tensor:
    """Ids [B, L] that a model writes greedily behind prompts: at most `tokens`, filled up behind one of `ends`.

    -1 all along a row whose logits were not numbers at some token.
    """
    broken = torch.zeros(len(inputs["input_ids"]), dtype=torch.bool, device=inputs["input_ids"].device)

    def look(ids: Tensor, logits: Tensor) -> Tensor:
        broken.logical_or_(logits.isnan().any(-1))
        return logits

    model, given = getattr(module, "func", module), getattr(module, "keywords", {})  # of a partial, given its weights
    ids = model.generate(
        **inputs, **given, max_new_tokens=tokens, do_sample=False, num_beams=1, eos_token_id=list(ends),
        pad_token_id=fill, logits_processor=[look],
    )  # fmt: skip
    start = inputs.get("decoder_input_ids", inputs["input_ids"]).shape[1]
    return ids[:, start:].masked_fill(broken[:, None], -1)
