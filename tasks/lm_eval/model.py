"""lm-eval's model class over a merged module, and over a routed one whose gates see prompts alone."""

import copy
import inspect
import json
from collections.abc import Callable, Sequence
from typing import Any

import torch
from lm_eval.models import huggingface
from torch import Tensor, nn

from merging.backbones.base import Backbone
from merging.errors import UserError
from merging.routing.gates import listening
from merging.routing.routed import Routed
from tasks.engine import Engine
from tasks.evaluate import WEIGHTS, per_sample
from tasks.lm_eval.harness import ROLLING, UNPROMPTED, Requests
from tasks.lm_eval.task import check_gate, tokenizer_of

HFLM: Any = huggingface.HFLM  # registered under its base class


class Answers:
    """Runs requests of documents through one of lm-eval's models."""

    def __init__(self, task: str, model: Any):
        self.task, self.model = task, model

    def answers(self, asked: Sequence[Requests]) -> dict[str, Tensor]:
        """JSON of the answers of each document as bytes [n, W], and its gating weights [n, G] if there are gates."""
        flat = [request for document in asked for request in document]
        kinds = dict.fromkeys(request.request_type for request in flat)
        by_kind = {kind: iter(self._run(kind, flat)) for kind in kinds}
        rows = [json.dumps([next(by_kind[request.request_type]) for request in document]) for document in asked]
        tensors = [torch.tensor([*row.encode()], dtype=torch.uint8) for row in rows]
        answers = {
            "answers": nn.utils.rnn.pad_sequence(tensors, batch_first=True),
            "cut": torch.tensor([any(map(self._cut, document)) for document in asked]),
        }
        if isinstance(self.model, Prompted) and (weights := self.model.weights):
            of_documents = [
                torch.stack([weights[request.args[0]] for request in document]).mean(0) for document in asked
            ]
            answers[WEIGHTS] = torch.stack(of_documents)
        return answers

    def _cut(self, request: Any) -> bool:
        """Whether a request is longer than the context, so that lm-eval leaves out the beginning of its prompt."""
        if request.request_type == ROLLING:
            return False
        prompt, answer = request.args
        if isinstance(answer, str):
            return len(self.model.tok_encode(prompt + answer)) > self.model.max_length + 1
        room = answer.get("max_gen_toks", self.model.max_gen_toks) if isinstance(answer, dict) else 0
        return len(self.model.tok_encode(prompt)) > self.model.max_length - room

    def _run(self, kind: str, requests: Sequence[Any]) -> list[Any]:
        some = [request for request in requests if request.request_type == kind]
        try:
            return getattr(self.model, kind)(some, disable_tqdm=True)
        except AssertionError as error:  # how lm-eval refuses what does not fit into the context
            raise UserError(
                f"lm-eval cannot ask {self.task}: {error or 'an answer is longer than the context'}. Prompts and "
                f"answers have backbone.length={self.model.max_length} tokens at most."
            ) from error


def answerer(task: str, module: nn.Module, backbone: Backbone, engine: Engine) -> Answers:
    """Raises UserError for gates whose weights are not those of one prompt, and as `tokenizer_of`."""
    tokenizer = tokenizer_of(backbone)
    options = {"tokenizer": copy.deepcopy(tokenizer), "batch_size": engine.batch, "max_length": backbone.tokens}
    if not isinstance(module, Routed):
        return Answers(task, HFLM(pretrained=module, **options))
    check_gate(getattr(module.gate, "shape", None))
    return Answers(task, Prompted(module, **options))


class Shell(nn.Module):
    """A routed model as what lm-eval takes for one of transformers."""

    def __init__(self, routed: Routed):
        super().__init__()
        self.routed, self.config = routed, routed.module.config
        self.device = next(routed.parameters()).device

    def tie_weights(self) -> None:
        """What is tied has been when the merge was put in."""

    def generate(self, *inputs: Any, **kwargs: Any) -> Any:
        return self.routed.generate(*inputs, **kwargs)


class Prompted(HFLM):
    """lm-eval's model over a routed one: gates see the prompt of a request, nothing behind it, and no padding.

    Requests run together if their prompts have as many tokens. weights: prompt -> mean weights [G] of its gates.
    """

    def __init__(self, routed: Routed, **options: Any):
        super().__init__(pretrained=Shell(routed), **options)
        self.routed, self.weights, self._prompt, self._texts = routed, dict[str, Tensor](), 0, list[str]()
        accepted = inspect.signature(routed.module.forward).parameters
        self._cache = "cache" if "cache" in accepted else "past_key_values"  # the newer name and that before it

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        raise UserError(UNPROMPTED.format(requests[0].task_name))

    def _loglikelihood_tokens(self, requests: Any, disable_tqdm: bool = False, override_bs: int | None = None) -> Any:
        def kept(request: Any) -> int:
            _, context, continuation = request
            return len(context) - max(len(context) + len(continuation) - self.max_length - 1, 0)

        def run(length: int, some: list[Any]) -> list[Any]:
            self._prompt, self._noted = length, dict[tuple[int, ...], Tensor]()
            answers = HFLM._loglikelihood_tokens(self, some, disable_tqdm, override_bs)
            if self._noted:
                self.weights |= {text[0]: self._noted[tuple(context[-length:])] for text, context, _ in some}
            return answers

        return by_length(requests, kept, run)

    def _model_call(self, inps: Tensor, attn_mask: Any = None, labels: Any = None) -> Tensor:
        """The prompt first, which decides, then what follows it, over the keys and values of the prompt."""
        prompts, rest = inps[:, : self._prompt], inps[:, self._prompt :]
        with listening() as recorded:
            if labels is not None:  # an encoder has the prompt, whole
                logits = self.routed(input_ids=inps, attention_mask=attn_mask, labels=labels).logits
            else:
                first = self.routed(input_ids=prompts, use_cache=True)
                logits = first.logits
        self._noted |= dict(zip(map(tuple, prompts.tolist()), mean_weights(recorded, len(inps)), strict=False))
        if labels is not None or not rest.shape[1]:
            return logits
        behind = self.routed(input_ids=rest, use_cache=True, **{self._cache: first.past_key_values}).logits
        return torch.cat([logits, behind], 1)

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        return by_length(
            requests, lambda request: len(self.tok_encode(request.args[0])),
            lambda _, some: HFLM.generate_until(self, some, disable_tqdm),
        )  # fmt: skip

    def tok_batch_encode(self, strings: list[str], *args: Any, **kwargs: Any) -> Any:
        self._texts = strings
        return super().tok_batch_encode(strings, *args, **kwargs)

    def _model_generate(self, context: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        with listening() as recorded:
            written = super()._model_generate(context, *args, **kwargs)
        self.weights |= dict(zip(self._texts, mean_weights(recorded, len(context)), strict=False))
        return written


def by_length(
    requests: Sequence[Any], length: Callable[[Any], int], run: Callable[[int, list[Any]], list[Any]]
) -> list:
    """The answers of `run` to requests, each time to those of one length of prompt; in the order of the requests."""
    lengths = [length(request) for request in requests]
    answers: dict[int, Any] = {}
    for value in dict.fromkeys(lengths):
        indices = [index for index, of in enumerate(lengths) if of == value]
        answers |= dict(zip(indices, run(value, [requests[index] for index in indices]), strict=True))
    return [answers[index] for index in range(len(requests))]


def mean_weights(recorded: list[Tensor], count: int) -> list[Tensor]:
    """Mean weights [G] of all gates that were asked, per sample; none without gates."""
    if not recorded:
        return []
    return list(torch.stack([per_sample(weights, count) for weights in recorded]).mean(0).float().cpu())
