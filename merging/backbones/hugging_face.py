"""Models of transformers, built from their configuration."""

import copy
import hashlib
import json
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from merging.backbones import attention
from merging.backbones.base import Backbone, Table, count_macs, normalised, tables
from merging.backbones.language import Speaking, beside, untied
from merging.errors import UserError

READOUTS = ("pooled", "first", "mean", "last")
FIRST_USE = threading.Lock()  # transformers imports a class when it is asked for, and another thread then finds none
POOLED = ("image_embeds", "text_embeds", "pooler_output")


@dataclass(frozen=True)
class HuggingFace(Speaking, Backbone):
    """Any model class of transformers. A head that belongs to a task is left off: it stays with the task.

    model: the class, such as RobertaForSequenceClassification or AutoModel. config: its configuration as far as it
    differs from the defaults, `model_type` among them. readout: what heads read, "pooled" as the model gives it, the
    "first" token, the "mean" over tokens that are not padding, or the "last" of them. tokenizer: folder or name on the
    Hub, for tasks that give texts. length: tokens of a text at most. mean, std: per channel, of values in [0, 1].
    """

    name: str
    model: str
    config: Mapping[str, Any]
    readout: str = "pooled"
    tokenizer: str | None = field(default=None, metadata={"identity": False})  # its content counts
    length: int = 128
    mean: Sequence[float] = (0.5, 0.5, 0.5)
    std: Sequence[float] = (0.5, 0.5, 0.5)

    def __post_init__(self) -> None:
        if self.readout not in READOUTS:
            raise UserError(f"backbone.readout={self.readout} is unknown. Choose one of {', '.join(READOUTS)}.")

    @property
    def table(self) -> str:
        """Raises UserError for a model type that no table is for."""
        if self._table is None:
            known = sorted(model for table in tables().values() for model in table.models)
            raise UserError(
                f"There is no table of the parameters of {self.config.get('model_type')}, which backbone.config."
                f"model_type names. There are some for {', '.join(known)}; merging/backbones/architectures takes more."
            )
        return self._table.name

    @property
    def _table(self) -> Table | None:
        model_type = self.config.get("model_type")
        return next((table for table in tables().values() if model_type in table.models), None)

    def facts(self) -> dict[str, object]:
        named = {"model": self.model, "config": dict(self.config), "readout": self.readout}
        return {"family": "hugging_face", **named}

    def identity(self) -> dict[str, object]:
        settings = {"length": self.length, "mean": list(self.mean), "std": list(self.std)}
        if self.tokenizer is not None:
            words = [type(self._tokenizer).__name__, sorted(self._tokenizer.get_vocab().items())]
            settings["tokenizer"] = hashlib.sha256(json.dumps(words).encode()).hexdigest()
        return self.facts() | settings

    @cached_property
    def _config(self) -> Any:
        if "model_type" not in self.config:
            raise UserError("backbone.config names no model_type, such as bert, gpt2 or vit.")
        try:
            return library().AutoConfig.for_model(**self.config)
        except ValueError as error:
            raise UserError(f"backbone.config names a model_type that transformers does not know: {error}") from error

    @cached_property
    def _tokenizer(self) -> Any:
        if self.tokenizer is None:
            raise UserError(
                f"{self.name} is given texts and has no tokenizer. Set backbone.tokenizer=<folder or name>."
            )
        try:
            tokenizer = library().AutoTokenizer.from_pretrained(self.tokenizer)
        except (OSError, ValueError) as error:
            reason = " ".join(str(error).split()).rstrip(".")
            raise UserError(
                f"backbone.tokenizer={self.tokenizer} holds none that transformers reads: {reason}. Name a folder that "
                f"its save_pretrained wrote, or a model of the Hub."
            ) from error
        if self.length > tokenizer.model_max_length:
            raise UserError(
                f"backbone.length={self.length} is longer than the context of {self.name}, "
                f"{tokenizer.model_max_length} tokens by its tokenizer. Texts are cut at a length of at most that."
            )
        if tokenizer.pad_token is None:  # decoders have none; what is padded is masked
            tokenizer.pad_token = tokenizer.eos_token
        return tokenizer

    @cached_property
    def _heads(self) -> tuple[str, ...]:
        """The names of the modules that are a task's head."""
        with torch.device("meta"):
            keys = self._built().state_dict() if self._table is not None else ()
        return tuple(dict.fromkeys(key.partition(".")[0] for key in keys and self.head_keys(keys)))

    def _built(self) -> nn.Module:
        with FIRST_USE:
            made = getattr(library(), self.model, None)
            attention.install()
        config = copy.deepcopy(self._config)  # models write into theirs
        if made is None:
            raise UserError(f"backbone.model={self.model} is no class of transformers {library().__version__}.")
        dtype = getattr(torch, str(config.dtype).removeprefix("torch."), torch.float32)
        config.dtype = torch.float32  # for another transformers sets torch's default, of all threads, for a while
        model = made.from_config(config) if self.model.startswith("Auto") else made(config)
        for parameter in model.parameters() if self.model.startswith("Auto") else ():
            parameter.data = parameter.data.to(dtype)  # one at a time; buffers stay as exact as they are
        config.dtype = dtype
        return untied(model) if self.config.get("tie_word_embeddings") is False else model

    def build(self) -> nn.Module:
        module = self._built()
        for name in self._heads:
            setattr(module, name, nn.Identity())
        return module.eval()

    def in_memory(self, key: str) -> str:
        """The name in the module of a parameter in a file: transformers 5 has other names in memory for some models."""
        return self._renamed(key)

    @cached_property
    def _renamed(self) -> Callable[[str], str]:
        try:
            from transformers.conversion_mapping import get_model_conversion_mapping
            from transformers.core_model_loading import WeightRenaming, rename_source_key
        except ImportError:  # before transformers 5 they are the same
            return str
        with torch.device("meta"):
            mapping = get_model_conversion_mapping(self._built())  # type: ignore[arg-type]
        renamings = [rule for rule in mapping if isinstance(rule, WeightRenaming)]
        return lambda key: rename_source_key(key, renamings, [])[0]

    @property
    def _image_size(self) -> int | None:
        return getattr(getattr(self._config, "vision_config", self._config), "image_size", None)

    @property
    def tokens(self) -> int:
        """Of an image, the class token included; of a text, its greatest length."""
        if self._image_size is None:
            return self.length
        patch = getattr(self._config, "vision_config", self._config).patch_size
        return (self._image_size // patch) ** 2 + 1

    def example(self, count: int) -> Any:
        size = self._image_size
        if size is not None:
            return torch.zeros(count, 3, size, size, dtype=torch.uint8)
        if not self._config.is_encoder_decoder:
            return {"input_ids": torch.zeros(count, self.length, dtype=torch.int64)}
        ids = torch.full((count, self.length), self._config.eos_token_id)  # some heads read where a text ends
        return {"input_ids": ids} | ({} if self._heads else {"decoder_input_ids": ids[:, :1]})

    @cached_property
    def macs(self) -> int:
        """Multiply-accumulates of one sample; where a head is left off, of what is in front of it."""
        with torch.device("meta"):
            module: Any = self.build()
            inputs = self.prepare(self.example(1))
            module.config.pad_token_id = None  # or some warn of padding, for which they read numbers
            if self._heads and self._config.is_encoder_decoder:
                inputs["decoder_input_ids"] = inputs["input_ids"]
            return count_macs(getattr(module, "base_model", module) if self._heads else module, inputs)

    def prepare(self, batch: Any) -> dict[str, Any]:
        """uint8 images [N, 3, H, W], texts or pairs of texts, ids [N, L], or a mapping of what the model takes.

        Raises UserError for texts without a tokenizer and for anything else.
        """
        if isinstance(batch, Mapping):
            return dict(batch)
        if isinstance(batch, Tensor):
            if batch.ndim == 2:
                return {"input_ids": batch}
            images = normalised(batch, self.mean, self.std) if batch.dtype == torch.uint8 else batch
            return {"pixel_values": images}
        if isinstance(batch, Sequence) and batch and all(isinstance(text, str | tuple | list) for text in batch):
            return self._tokenised(list(batch))
        raise UserError(
            f"{self.name} is given a {type(batch).__name__}. It takes uint8 images [N, 3, H, W], ids [N, L], texts, "
            f"pairs of texts, or a mapping of inputs."
        )

    def _tokenised(self, texts: list[Any]) -> dict[str, Tensor]:
        options = {"padding": True, "truncation": True, "max_length": self.length, "return_tensors": "pt"}
        inputs = dict(self._tokenizer(*columns(texts), **options))
        if not inputs["attention_mask"].any(1).all():
            raise UserError(
                f"{self.name} is given a text without a token, an empty one, and has no token that stands for it. "
                f"Leave empty texts out."
            )
        return inputs

    def cut(self, texts: tuple[Any, ...]) -> int:
        """How many of texts, or pairs of them, are longer than `length` tokens and lose the rest."""
        if self.tokenizer is None or not texts:
            return 0
        if texts not in self._cut:
            ids = self._tokenizer(*columns(list(texts)), verbose=False)["input_ids"]
            self._cut[texts] = sum(len(tokens) > self.length for tokens in ids)
        return self._cut[texts]

    @cached_property
    def _cut(self) -> dict[tuple[Any, ...], int]:
        return {}

    def features(self, module: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
        """Raises UserError where the model gives nothing that `readout` reads."""
        answer = module(**beside(module, inputs))
        tokens = answer.get("logits" if self._heads else "last_hidden_state")  # logits of the head that is left off
        if tokens is not None and tokens.ndim == 2:  # pooled by the model in front of its head
            return tokens
        if self.readout == "pooled":
            tokens = next((answer[name] for name in POOLED if answer.get(name) is not None), None)
        if tokens is None:
            raise UserError(
                f"{self.model} gives nothing that backbone.readout={self.readout} reads. Choose another of "
                f"{', '.join(READOUTS)}, or its class without a language head."
            )
        return tokens if self.readout == "pooled" else read(tokens, self.readout, inputs.get("attention_mask"))

    def outputs(self, module: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
        return module(**beside(module, inputs)).logits


def columns(texts: list[Any]) -> tuple[list[str], ...]:
    """Texts as a tokenizer takes them: all, or all first and all second ones of pairs."""
    return (texts,) if isinstance(texts[0], str) else tuple(map(list, zip(*texts, strict=True)))


def library() -> Any:
    """transformers. Raises UserError where it is not installed."""
    try:
        import transformers
    except ImportError as error:
        raise UserError(
            "Models of Hugging Face need the package transformers. Install it: pip install 'duet-merging[language]'."
        ) from error
    return transformers


def read(hidden: Tensor, readout: str, mask: Tensor | None) -> Tensor:
    """Features [N, D] of hidden states [N, L, D]; mask [N, L] is 0 for padding, on whichever side."""
    mask = hidden.new_ones(hidden.shape[:2]) if mask is None else mask.to(hidden)
    if readout == "mean":
        return (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
    position = mask.argmax(1) if readout == "first" else mask.shape[1] - 1 - mask.flip(1).argmax(1)
    return hidden[torch.arange(len(hidden), device=hidden.device), position]


def head_of(state: Mapping[str, Tensor]) -> nn.Module:
    """The head in an expert's tensors, features [N, D] -> outputs [N, C]: linear, or dense, tanh and out_proj.

    The names may start with that of the module (`classifier.`, `score.`). Raises UserError for any other head.
    """
    layers: dict[str, dict[str, Tensor]] = {}
    for key, tensor in state.items():
        owner, _, kind = key.rpartition(".")
        layers.setdefault(owner.rpartition(".")[2], {})[kind] = tensor
    if len(layers) == 1 and "weight" in (only := next(iter(layers.values()))) and only["weight"].ndim == 2:
        return linear(only)
    if set(layers) == {"dense", "out_proj"}:
        return nn.Sequential(linear(layers["dense"]), nn.Tanh(), linear(layers["out_proj"]))
    raise UserError(
        f"A head of the tensors {', '.join(state) or '(none)'} is not known: it is one linear layer, or two named "
        f"dense and out_proj with tanh between. Give the head as a module of its own."
    )


def linear(tensors: Mapping[str, Tensor]) -> nn.Linear:
    weight, bias = tensors["weight"], tensors.get("bias")
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    layer.load_state_dict(dict(tensors), assign=True)
    return layer.requires_grad_(False).eval()
