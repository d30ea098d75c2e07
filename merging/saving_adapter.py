"""A merge of LoRA adapters as one adapter of the peft library: factors side by side, exact, where the method adds."""

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from merging.checkpoints import Checkpoint, Known
from merging.checkpoints.lora import CONFIG, WEIGHTS, WRAPPER, Factors, Lora, within
from merging.checkpoints.safetensors_file import write_safetensors
from merging.checkpoints.views import View, pieces_of, source_of
from merging.combined import Mix, mix_of, total
from merging.errors import UserError
from merging.methods import discovered
from merging.options import snake_case
from merging.saving import specs_of

if TYPE_CHECKING:
    from merging.merged import Merged

log = logging.getLogger(__name__)
PATTERNS = ("rank_pattern", "alpha_pattern")
RESET = {  # what said how an expert was trained, and is in the factors now
    "use_rslora": False, "modules_to_save": None, "layers_to_transform": None, "layers_pattern": None,
    "exclude_modules": None, "init_lora_weights": True, "lora_dropout": 0.0, "inference_mode": True,
}  # fmt: skip
AUTO = {"CAUSAL_LM": "AutoPeftModelForCausalLM", "SEQ_2_SEQ_LM": "AutoPeftModelForSeq2SeqLM",
        "SEQ_CLS": "AutoPeftModelForSequenceClassification"}  # fmt: skip
WHOLE = "Save the whole model instead: save_adapter=false on the command line, adapter=False in the library."


def check_adapters(experts: Sequence[Checkpoint | Known], tasks: Sequence[str], method: object = None) -> None:
    """Raises UserError unless every expert is an adapter of the base, and for a method that makes none of them.

    method: where it is still to be called; one that makes an adapter says `additive`.
    """
    if method is not None and not getattr(method, "additive", False):
        raise UserError(
            f"An adapter is to be saved, and {type(method).__name__} makes whole matrices. {_able()} {WHOLE}"
        )
    whole = [task for task, expert in zip(tasks, experts, strict=False) if _adapter(expert) is None]
    if whole or not experts:
        raise UserError(
            f"An adapter is to be saved, and the expert for {', '.join(whole or tasks)} is a whole model. {WHOLE}"
        )


def _able() -> str:
    """Which methods make an adapter of adapters, in a sentence."""
    able = sorted(snake_case(name) for name, method in discovered().items() if getattr(method, "additive", False))
    return f"Of adapters {', '.join(able[:-1])} and {able[-1]} make an adapter."


def _adapter(expert: Checkpoint | Known) -> Lora | None:
    source = source_of(expert) if isinstance(expert, Checkpoint) else None
    return source if isinstance(source, Lora) else None


def write(merged: "Merged", folder: Path) -> str:
    """Write adapter_model.safetensors and adapter_config.json into a folder. Returns the class of peft that loads them.

    Modules that an expert has trained in full are written whole, merged; a head of a task where there is a single one.
    Raises UserError for a merge whose weights depend on the input, and a change that is no product of factors.
    """
    check_adapters(merged.inputs, merged.tasks)
    if not merged.is_static:
        raise UserError(f"The merge depends on the input or the task, and an adapter does not. {WHOLE}")
    if merged.packed:
        raise UserError(f"The merge is quantised, and an adapter is added to whole numbers. {WHOLE}")
    places, whole, ranks = _places(merged, "factors"), _places(merged, "full"), dict[str, int]()
    tensors = {name: merged.static(key).to(merged.specs[key].dtype) for key, name in whole.items()} | _head(merged)
    saved = [name for name in dict.fromkeys(name for expert in merged.inputs for name in _modules_to_save(expert))
             if any(within(key, name) for key in tensors)]  # fmt: skip
    changes = total((1.0 if merged.scale is None else merged.scale, merged.shared), (1.0, merged.fixed))
    for key in changes.keys() - whole.keys():
        if (mix := mix_of(changes, key)) is None:
            raise UserError(
                f"{key} is changed by a whole matrix, which is no product of a few columns and rows. {_able()} {WHOLE}"
            )
        up, down = (factor.to(merged.specs[key].dtype) for factor in _factors(mix))
        one, other = (down.T, up.T) if places[key].turned else (up, down)
        tensors |= {places[key].up: one.contiguous(), places[key].down: other.contiguous()}
        ranks[_module(places[key])] = len(down)
    write_safetensors(folder / WEIGHTS, specs_of(tensors), tensors.items(), {"format": "pt"})
    config = _config(merged, ranks) | ({"modules_to_save": saved} if saved else {})
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", "utf-8")
    log.info("adapter of rank %s on %d modules", _said(ranks.values()), len(ranks))
    return AUTO.get(str(config.get("task_type")), "AutoPeftModel")


def _factors(mix: Mix) -> tuple[Tensor, Tensor]:
    """up [m, R] and down [R, n] whose product is the sum."""
    return mix.low_rank.up * mix.low_rank.spread(mix.weights), mix.low_rank.down


def _head(merged: "Merged") -> dict[str, Tensor]:
    """A single head of a task under the names of its adapter, where it was trained with it."""
    if len(merged.heads) != 1:
        return {}
    ((task, head),) = merged.heads.items()
    adapter = _adapter(merged.inputs[merged.tasks.index(task)])
    return {} if adapter is None else {adapter.full[key]: head[key] for key in head if key in adapter.full}


def _modules_to_save(expert: Checkpoint | Known) -> Sequence[str]:
    return () if (adapter := _adapter(expert)) is None else adapter.modules_to_save


def _places(merged: "Merged", what: str) -> dict[str, Any]:
    """Where peft keeps the `factors` of a parameter or what was trained in `full`, by the first expert that has it."""
    places: dict[str, Any] = {}
    for expert in reversed(merged.inputs):
        if (adapter := _adapter(expert)) is None:
            continue
        stored = {key: piece.key for key, piece in pieces_of(expert).items()} if isinstance(expert, View) else {}
        names = {stored.get(key, key): key for key in merged.specs}
        places |= {names[name]: place for name, place in getattr(adapter, what).items() if name in names}
    return places


def _module(place: Factors) -> str:
    return place.up.removeprefix(WRAPPER).removesuffix(".lora_B.weight").removesuffix(".lora_embedding_B")


def _config(merged: "Merged", ranks: Mapping[str, int]) -> dict[str, Any]:
    """The first expert's configuration with these ranks, factors at their full size."""
    stored = json.loads((merged.inputs[0].files[0].parent / CONFIG).read_text("utf-8"))
    rank = max(ranks.values(), key=[*ranks.values()].count, default=1)
    pattern = {module: other for module, other in ranks.items() if other != rank}
    sizes = {"r": rank, "lora_alpha": rank, "target_modules": sorted(ranks)} | dict.fromkeys(PATTERNS, pattern)
    return stored | {name: value for name, value in RESET.items() if name in stored} | sizes


def _said(ranks: Any) -> str:
    low, high = min(ranks, default=0), max(ranks, default=0)
    return str(low) if low == high else f"{low} to {high}"
