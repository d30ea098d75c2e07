"""LoRA adapters in the files of the peft library, folded into their base tensor by tensor: W = W_0 + scale * B A."""

import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from merging.cache import Cache
from merging.checkpoints import Checkpoint, Spec
from merging.checkpoints.opening import open_file
from merging.checkpoints.views import remarks_of
from merging.errors import UserError
from merging.preflight import some

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
OLDER = "adapter_model.bin"  # what peft wrote before safetensors
WRAPPER = "base_model.model."  # what peft puts before the names of the model it wraps
FACTOR = re.compile(r"(.+)\.lora_([AB])\.weight")
SCOPE = "vision_model."  # adapters made on the inner vision transformer leave it out
PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")  # initialisations that leave the base as it is

OTHER_KINDS = (
    "use_dora", "lora_bias", "modules_to_save", "target_parameters", "layer_replication", "trainable_token_indices",
    "megatron_config", "use_qalora", "use_bdlora", "alora_invocation_tokens", "arrow_config", "kasa_config",
    "velora_config", "monteclora_config",
)  # fmt: skip


@dataclass(frozen=True)
class LoraConfig:
    """The facts of an adapter_config.json that decide its weights. Patterns are searched as peft does: last names."""

    r: int
    lora_alpha: float
    use_rslora: bool = False
    fan_in_fan_out: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    target_modules: tuple[str, ...] | str | None = None

    @classmethod
    def read(cls, path: Path) -> "LoraConfig":
        """Raises UserError for a file that is no LoRA configuration, or of a kind that is not W_0 + scale * B A."""
        try:
            stored = json.loads(path.read_text("utf-8"))
            return cls.of(stored, str(path))
        except OSError as error:
            raise UserError(f"Cannot read {path}: {error.strerror or error}. An adapter needs its {CONFIG}.") from error
        except (ValueError, KeyError, TypeError, AttributeError, re.error) as error:
            raise UserError(
                f"{path} is no configuration of a LoRA adapter ({error!r}). Give the {CONFIG} that peft wrote."
            ) from error

    @classmethod
    def of(cls, stored: Mapping[str, Any], where: str) -> "LoraConfig":
        """From the parsed file; `where` names it in messages."""
        for what in unsupported(stored):
            raise UserError(
                f"{where}: {what} is not supported: only plain LoRA is, W_0 + scale * B A. Merge the adapter with "
                f"peft's merge_and_unload, save the model and use that as the expert."
            )
        targets = stored.get("target_modules")
        config = cls(
            int(stored["r"]),
            float(stored["lora_alpha"]),
            bool(stored.get("use_rslora", False)),
            bool(stored.get("fan_in_fan_out", False)),
            dict(stored.get("rank_pattern") or {}),
            dict(stored.get("alpha_pattern") or {}),
            targets if targets is None or isinstance(targets, str) else tuple(targets),
        )
        if min([config.r, *config.rank_pattern.values()]) < 1:
            raise UserError(f"{where}: r={config.r} is no rank. Ranks, also those of rank_pattern, are 1 or more.")
        for pattern in (*config.rank_pattern, *config.alpha_pattern):
            re.compile(pattern)
        config.targets("any")
        return config

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
        if isinstance(self.target_modules, str):
            return self.target_modules == "all-linear" or bool(re.fullmatch(self.target_modules, module))
        return any(module == name or module.endswith(f".{name}") for name in self.target_modules)


def unsupported(stored: Mapping[str, Any]) -> Iterator[str]:
    """What of a configuration makes the adapter something else than W_0 + scale * B A."""
    if (kind := stored.get("peft_type", "LORA")) != "LORA":
        yield f"peft_type={kind}"
    if (bias := stored.get("bias", "none")) != "none":
        yield f"bias={bias}"
    if (start := stored.get("init_lora_weights", True)) not in PLAIN_STARTS:
        yield f"init_lora_weights={start} (it changes the base)"
    yield from (f"{name}={stored[name]}" for name in OTHER_KINDS if stored.get(name))


def by_pattern(patterns: Mapping[str, float], module: str, default: float) -> float:
    """The value of the first pattern that is the module's name or its last parts, as peft matches them."""
    found = (value for pattern, value in patterns.items() if re.match(rf"(.*\.)?({pattern})$", module))
    return next(found, default)


class Change(NamedTuple):
    """Where the change of one weight lies in the adapter."""

    down: str  # A [r, in]
    up: str  # B [out, r]
    scale: float


class Lora:
    """`base` plus an adapter, under the base's names; only the factors of the tensor asked for are read.

    Raises UserError, from headers alone, for a module that the base lacks, factors that do not fit it, and anything in
    the adapter that is no factor.
    """

    def __init__(self, base: Checkpoint, adapter: Checkpoint, config: LoraConfig):
        self._base, self._adapter, self._config, self.remarks = base, adapter, config, remarks_of(adapter)
        self._changes: dict[str, Change] = {}
        for key, change in self._found():
            if key in self._changes:
                raise UserError(f"{self.name} changes {key} twice, by {self._changes[key].up} and by {change.up}.")
            self._changes[key] = change
        if not self._changes:
            raise UserError(f"{adapter.name} holds no LoRA factors. Give the {WEIGHTS} that peft wrote.")

    def _found(self) -> Iterator[tuple[str, Change]]:
        modules: dict[str, dict[str, str]] = {}
        for key in self._adapter.specs():
            match = FACTOR.fullmatch(key)
            if match is None:
                raise UserError(
                    f"{self.name} has {key}, which is no factor of a linear layer (lora_A.weight, lora_B.weight). Only "
                    f"plain LoRA is supported: merge the adapter with peft's merge_and_unload and use the result."
                )
            factors = modules.setdefault(match[1].removeprefix(WRAPPER), {})
            if match[2] in factors:
                raise UserError(f"{self.name} has the same factor twice, as {factors[match[2]]} and as {key}.")
            factors[match[2]] = key
        for module, factors in modules.items():
            if len(factors) < 2:
                raise UserError(f"{self.name}: of {module} there is only {next(iter(factors.values()))}, not A and B.")
            if not self._config.targets(module):
                raise UserError(
                    f"{self.name} changes {module}, which its target_modules {self._config.target_modules} leave out. "
                    f"Adapter and configuration are not of the same training."
                )
            change = Change(factors["A"], factors["B"], self._config.scale(module))
            yield self._checked(module, change), change

    def _checked(self, module: str, change: Change) -> str:
        """The base's name of the weight that is changed."""
        base, adapter = self._base.specs(), self._adapter.specs()
        known = [f"{name}.weight" for name in (module, SCOPE + module, module.removeprefix(SCOPE))]
        key = next((name for name in known if name in base), None)
        if key is None:
            raise UserError(
                f"{self.name} changes {module}, and the base {self._base.name} has no {known[0]} (it has "
                f"{some(sorted(base))}). Use the base that the adapter was trained on."
            )
        (rank, into), (out, other) = ((*adapter[name].shape, 0, 0)[:2] for name in (change.down, change.up))
        shape = (into, out) if self._config.fan_in_fan_out else (out, into)
        if rank != other or rank != self._config.rank(module) or base[key].shape != shape:
            raise UserError(
                f"{self.name}: the factors of {module} are {tuple(adapter[change.down].shape)} and "
                f"{tuple(adapter[change.up].shape)}, for rank {self._config.rank(module)} and {key} of shape "
                f"{tuple(base[key].shape)} they should be [r, in] and [out, r]. Adapter, configuration and base are "
                f"not of the same training."
            )
        return key

    @property
    def name(self) -> str:
        return self._adapter.name

    @property
    def files(self) -> tuple[Path, ...]:
        return (*self._base.files, *self._adapter.files, *(path.parent / CONFIG for path in self._adapter.files))

    @property
    def id(self) -> str:
        """sha256 of the ids of base and adapter and of the scales."""
        facts = [self._base.id, self._adapter.id, self._config.fan_in_fan_out, sorted(self._changes.items())]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    def specs(self) -> Mapping[str, Spec]:
        """As the base's; a changed weight has at least the precision of its factors."""
        return {key: Spec(spec.shape, self._dtype(key, spec)) for key, spec in self._base.specs().items()}

    def _dtype(self, key: str, spec: Spec) -> torch.dtype:
        change = self._changes.get(key)
        return spec.dtype if change is None else torch.promote_types(spec.dtype, self._adapter.specs()[change.up].dtype)

    def tensor(self, key: str) -> Tensor:
        """The base's own tensor, or a new one where the adapter changes it; computed in fp32 at least."""
        weight, change = self._base.tensor(key), self._changes.get(key)
        if change is None:
            return weight
        dtype = self._dtype(key, self._base.specs()[key])
        exact = torch.promote_types(dtype, torch.float32)
        product = self._adapter.tensor(change.up).to(exact) @ self._adapter.tensor(change.down).to(exact)
        product = product.T if self._config.fan_in_fan_out else product
        return (weight.to(exact) + change.scale * product).to(dtype)

    def release(self) -> None:
        self._base.release()
        self._adapter.release()


def open_lora(base: Checkpoint, folder: str | Path, cache: Cache | None = None) -> Checkpoint:
    """`base`, in Hugging Face's names, with the adapter_config.json and adapter_model.* of `folder`."""
    folder = Path(folder)
    older = not (folder / WEIGHTS).exists() and (folder / OLDER).exists()
    return Lora(base, open_file(folder / (OLDER if older else WEIGHTS), cache), LoraConfig.read(folder / CONFIG))
