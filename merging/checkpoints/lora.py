"""LoRA adapters in the files of the peft library: W = W_0 + scale * B A, kept as factors and folded when asked for."""

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import NamedTuple

import torch
from pydantic import PositiveInt, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass
from torch import Tensor

from merging.cache import Cache
from merging.checkpoints.base import Change, Checkpoint, Spec
from merging.checkpoints.base_names import check_base
from merging.checkpoints.opening import open_file
from merging.errors import UserError
from merging.preflight import some

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
OLDER = "adapter_model.bin"  # what peft wrote before safetensors
WRAPPER = "base_model.model."  # what peft puts before the names of the model it wraps
FACTOR = re.compile(r"(.+)\.lora_(?:([AB])\.weight|embedding_([AB]))")
COPY = ".base_layer.weight"  # of an embedding, which peft stores beside its factors
SCOPE = "vision_model."  # adapters made on the inner vision transformer leave it out
WRITES = ("CAUSAL_LM", "SEQ_2_SEQ_LM")  # tasks whose models end in a layer as large as the table of their tokens
MERGE_IT = "merge the adapter with peft's merge_and_unload, save the model and use that as the expert"

PLAIN = {  # what an adapter that is W_0 + scale * B A may say, beside nothing
    "peft_type": ("LORA",), "bias": ("none",), "init_lora_weights": (True, "gaussian", "eva", "orthogonal"),
    **dict.fromkeys((
        "use_dora", "lora_bias", "target_parameters", "layer_replication", "trainable_token_indices",
        "megatron_config", "use_qalora", "use_bdlora", "alora_invocation_tokens", "arrow_config", "kasa_config",
        "velora_config", "monteclora_config",
    ), ()),
}  # fmt: skip


@dataclass(frozen=True)
class LoraConfig:
    """The facts of an adapter_config.json that decide its weights. Patterns are searched as peft does: last names."""

    r: PositiveInt
    lora_alpha: float
    use_rslora: bool = False
    fan_in_fan_out: bool = False
    rank_pattern: Mapping[re.Pattern[str], PositiveInt] | None = None
    alpha_pattern: Mapping[re.Pattern[str], float] | None = None
    target_modules: tuple[str, ...] | re.Pattern[str] | None = None
    task_type: str | None = None
    base_model_name_or_path: str | None = None
    modules_to_save: tuple[str, ...] | None = None  # trained in full, such as a task's head

    @classmethod
    def read(cls, path: Path) -> "LoraConfig":
        """Raises UserError for a file that is no LoRA configuration, or of a kind that is not W_0 + scale * B A."""
        try:
            stored = json.loads(path.read_text("utf-8"))
            for name, plain in PLAIN.items():
                if (value := stored.get(name)) and value not in plain:
                    raise UserError(
                        f"{path}: {name}={value} is not supported: only plain LoRA is, W_0 + scale * B A; {MERGE_IT}."
                    )
            known = {fact.name: stored[fact.name] for fact in fields(cls) if fact.name in stored}
            return TypeAdapter(cls).validate_python(known)
        except OSError as error:
            raise UserError(f"Cannot read {path}: {error.strerror or error}. An adapter needs its {CONFIG}.") from error
        except (ValueError, AttributeError) as error:
            wrong = error.errors() if isinstance(error, ValidationError) else ()
            reasons = [f"{'.'.join(map(str, detail['loc']))}: {detail['msg']}" for detail in wrong] or [repr(error)]
            raise UserError(
                f"{path} is no configuration of a LoRA adapter ({'; '.join(reasons)}). Give the {CONFIG} that peft "
                f"wrote."
            ) from error

    def rank(self, module: str) -> int:
        return int(by_pattern(self.rank_pattern, module, self.r))

    def scale(self, module: str) -> float:
        """lora_alpha / r, with use_rslora lora_alpha / sqrt(r)."""
        rank, alpha = self.rank(module), by_pattern(self.alpha_pattern, module, self.lora_alpha)
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)

    def targets(self, module: str) -> bool:
        """Whether peft would adapt a module of that name; without a list, whatever is in the file."""
        if self.target_modules is None:
            return True
        if isinstance(self.target_modules, re.Pattern):
            return self.target_modules.pattern == "all-linear" or bool(self.target_modules.fullmatch(module))
        return any(f".{module}".endswith(f".{name}") for name in self.target_modules)

    def saves(self, key: str) -> bool:
        """Whether a parameter belongs to a module that was trained in full."""
        return any(within(key, name) for name in self.modules_to_save or ())


def within(key: str, module: str) -> bool:
    """Whether a parameter lies in a module whose name ends so, as peft finds modules_to_save."""
    return f"{module}." in key


def by_pattern(patterns: Mapping[re.Pattern[str], float] | None, module: str, default: float) -> float:
    """The value of the first pattern that is the module's name or its last parts, as peft matches them."""
    matches = (value for name, value in (patterns or {}).items() if re.fullmatch(rf"(.*\.)?({name.pattern})", module))
    return next(matches, default)


class Factors(NamedTuple):
    """Where the change of one weight lies in the adapter."""

    down: str  # A [r, in]
    up: str  # B [out, r]
    scale: float
    turned: bool  # whether the weight is stored as [in, out]: of an embedding, and with fan_in_fan_out


class Lora(Checkpoint):
    """`adapts` plus an adapter, under the base's names; only the factors of the tensor asked for are read.

    What the adapter holds in full takes the place of the base's, which may lack it: the head of a task.

    Raises UserError, from headers alone, for a module that the base lacks, factors that do not fit it, anything in the
    adapter that is no factor, and a change of a table of tokens that an output layer shares.
    """

    adapts: Checkpoint

    def __init__(self, base: Checkpoint, adapter: Checkpoint, config: LoraConfig):
        self.adapts, self._adapter, self._config = base, adapter, config
        self.name, self.remarks = adapter.name, adapter.remarks
        self.files = (*adapter.files, *base.files, *(path.parent / CONFIG for path in adapter.files))
        self._specs, self._stored = dict(base.specs()), adapter.specs()
        self._full: dict[str, str] = {}  # name -> name in the adapter
        self._factors: dict[str, Factors] = {}
        for module, names in self._modules().items():
            key, factors = self._checked(module, names)
            if key in self._factors:
                raise UserError(f"{self.name} changes {key} twice, by {self._factors[key].up} and by {factors.up}.")
            self._factors[key] = factors
        if not self._factors:
            raise UserError(f"{adapter.name} holds no LoRA factors. Give the {WEIGHTS} that peft wrote.")
        for key, factors in self._factors.items():
            shape, dtype = self._specs[key]
            self._specs[key] = Spec(shape, torch.promote_types(dtype, self._stored[factors.up].dtype))
        self._specs |= {key: self._stored[name] for key, name in self._full.items()}

    def _modules(self) -> dict[str, dict[str, str]]:
        """The names of A and B by module."""
        modules: dict[str, dict[str, str]] = {}
        for key in self._stored:
            bare, match = key.removeprefix(WRAPPER), FACTOR.fullmatch(key)
            if match is not None:
                names, factor = modules.setdefault(match[1].removeprefix(WRAPPER), {}), match[2] or match[3]
                if factor in names:
                    raise UserError(f"{self.name} has the same factor twice, as {names[factor]} and as {key}.")
                names[factor] = key
            elif self._config.saves(key):
                self._full[self._base_name(bare) or bare] = key
            elif not (key.endswith(COPY) and self._is_copy(key)):
                raise UserError(
                    f"{self.name} has {key}, which is no factor of a linear layer (lora_A.weight, lora_B.weight) or of "
                    f"an embedding. Only plain LoRA is supported: {MERGE_IT}."
                )
        return modules

    def _is_copy(self, key: str) -> bool:
        """Whether the adapter holds the base's own numbers."""
        stored = self._weight(key.removeprefix(WRAPPER).removesuffix(COPY))
        return torch.equal(self._adapter.tensor(key), self.adapts.tensor(stored))

    def _checked(self, module: str, names: Mapping[str, str]) -> tuple[str, Factors]:
        """The base's name of the weight that is changed, and its factors."""
        if len(names) < 2:
            raise UserError(f"{self.name}: of {module} there is only {next(iter(names.values()))}, not A and B.")
        if not self._config.targets(module):
            raise UserError(
                f"{self.name} changes {module}, which its target_modules {self._config.target_modules} leave out. "
                f"Adapter and configuration are not of the same training."
            )
        key, embedding = self._weight(module), names["A"].endswith("lora_embedding_A")
        factors = Factors(names["A"], names["B"], self._config.scale(module), embedding or self._config.fan_in_fan_out)
        self._check_shapes(module, key, factors)
        if embedding:
            self._check_untied(key)
        return key, factors

    def _weight(self, module: str) -> str:
        """The base's name of a module's weight."""
        if (key := self._base_name(f"{module}.weight")) is None:
            raise UserError(
                f"{self.name} changes {module}, and the base {self.adapts.name} has no {module}.weight (it has "
                f"{some(sorted(self._specs))}). Use the base that the adapter was trained on."
            )
        return key

    def _base_name(self, key: str) -> str | None:
        """The base's name of a parameter: that name, or the only one that it ends in or that ends in it."""
        if name := next((name for name in (key, SCOPE + key, key.removeprefix(SCOPE)) if name in self._specs), None):
            return name
        ends = [name for name in self._specs if f".{key}".endswith(f".{name}") or name.endswith(f".{key}")]
        return ends[0] if len(ends) == 1 else None

    def _check_shapes(self, module: str, key: str, factors: Factors) -> None:
        down, up, weight = self._stored[factors.down].shape, self._stored[factors.up].shape, self._specs[key].shape
        due, product = self._config.rank(module), (*up[:1], *down[1:])
        if (*down[:1], *up[1:]) != (due, due) or weight != product[:: -1 if factors.turned else 1]:
            raise UserError(
                f"{self.name}: the factors of {module} are {tuple(down)} and {tuple(up)}, for rank {due} and {key} of "
                f"shape {tuple(weight)} they should be [r, in] and [out, r]. Adapter, configuration and base are not "
                f"of the same training."
            )

    def _check_untied(self, key: str) -> None:
        """Raises UserError for a table of tokens that is also the output layer: which is to change is not guessed."""
        alike = [name for name, spec in self._specs.items() if name != key and spec.shape == self._specs[key].shape]
        table = self.adapts.tensor(key)
        shared = next((name for name in alike if torch.equal(self.adapts.tensor(name), table)), None)
        if shared or (self._config.task_type in WRITES and not alike):
            raise UserError(
                f"{self.name} changes {key}, which {shared or 'the output layer'} shares. The model that peft trained "
                f"leaves the output layer as it is, and its merge_and_unload changes both: which is meant is not "
                f"guessed. Save the merged model, or one whose output layer is a tensor of its own, and use that."
            )

    def specs(self) -> Mapping[str, Spec]:
        """As the base's; a changed weight has at least the precision of its factors."""
        return self._specs

    @property
    def factors(self) -> Mapping[str, Factors]:
        """Where the changes of low rank lie, by the base's names."""
        return self._factors

    @property
    def full(self) -> Mapping[str, str]:
        """The base's names of what was trained in full, and those in the adapter."""
        return self._full

    @property
    def modules_to_save(self) -> tuple[str, ...]:
        """Of its configuration, the names of modules that were trained in full."""
        return self._config.modules_to_save or ()

    @property
    def id(self) -> str:
        """sha256 of the ids of base and adapter and of the scales."""
        facts = [self.adapts.id, self._adapter.id, sorted(self._factors.items()), sorted(self._full.items())]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    def tensor(self, key: str) -> Tensor:
        """The base's own tensor, or a new one where the adapter changes it; computed in fp32 at least."""
        if key in self._full:
            return self._adapter.tensor(self._full[key])
        weight = self.adapts.tensor(key)
        if key not in self._factors:
            return weight
        up, down = self.change(key)
        return (weight.to(up.dtype) + up @ down).to(self._specs[key].dtype)

    def change(self, key: str) -> Change:
        """scale * B A of one weight, fp32 at least, of rank 0 where the adapter changes nothing."""
        if key in self._full:
            difference = self.tensor(key).float() - self.adapts.tensor(key).float()
            matrix = difference.reshape(len(difference) if difference.ndim else 1, -1)
            return Change(matrix, torch.eye(matrix.shape[1]))
        if (factors := self._factors.get(key)) is None:
            return Change.none(self._specs[key].shape)
        dtype = torch.promote_types(self._specs[key].dtype, torch.float32)
        up, down = (self._adapter.tensor(name).to(dtype) for name in (factors.up, factors.down))
        change = Change(factors.scale * up, down)
        return change.T if factors.turned else change

    def release(self) -> None:
        for checkpoint in (self._adapter, self.adapts):
            checkpoint.release()


def is_adapter(source: object) -> bool:
    """Whether it is the path of a folder with an adapter."""
    return isinstance(source, str | Path) and (Path(source).expanduser() / CONFIG).is_file()


def open_lora(base: Checkpoint, folder: str | Path, cache: Cache | None = None, other_base: bool = False) -> Checkpoint:
    """`base`, in Hugging Face's names, with the adapter_config.json and adapter_model.* of `folder`.

    other_base: whether it may be another one than the adapter names, see base_names.
    """
    folder = Path(folder).expanduser()
    older = not (folder / WEIGHTS).exists() and (folder / OLDER).exists()
    adapter, config = open_file(folder / (OLDER if older else WEIGHTS), cache), LoraConfig.read(folder / CONFIG)
    remarks = () if other_base else check_base(folder, config.base_model_name_or_path, base, cache)
    lora = Lora(base, adapter, config)
    lora.remarks += remarks
    return lora
