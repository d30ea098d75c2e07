"""A merge as a folder of Hugging Face: configuration, tokenizer, sharded weights, model card.

A static merge is what `from_pretrained` loads. `duet.safetensors` holds what those libraries do not know: deltas, gates
and the record of the merge, for `merging.load` and `open_merged`; heads of tasks lie in heads/, a single one also among
the weights.
"""

import json
import logging
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from merging import saving_adapter
from merging.backbones.base import ParamInfo, table_for
from merging.checkpoints import Checkpoint, Known, SafetensorsFile, Spec
from merging.checkpoints.lora import WEIGHTS as ADAPTER
from merging.checkpoints.opening import open_file
from merging.checkpoints.safetensors_file import write_safetensors
from merging.checkpoints.vocabulary import Aligned
from merging.errors import UserError
from merging.files import check_room, write_folder
from merging.model_card import model_card
from merging.ops import BLOCK
from merging.saving import HEAD, beside, check_target, dense, dense_specs, ids_of, record, specs_of
from merging.saving_adapter import check_adapters
from merging.tokenizers import Tokenizer, tokenizer_of

if TYPE_CHECKING:
    from merging.merged import Merged

log = logging.getLogger(__name__)
CONFIG, OWN, HEADS, CARD = "config.json", "duet.safetensors", "heads", "README.md"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
COPIED = ("generation_config.json", "preprocessor_config.json", "processor_config.json", "*.py")
PT = {"format": "pt"}  # without which transformers refuses a file
FREE = {  # of config.json, which may differ: names, notes, and what belongs to a head
    "_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version", "use_cache", "id2label",
    "label2id", "num_labels", "problem_type", "finetuning_task", "bos_token_id", "eos_token_id", "pad_token_id",
}  # fmt: skip


def folder_of(checkpoint: Checkpoint | Known) -> Path | None:
    """The folder that a checkpoint lies in, None for one in memory."""
    return checkpoint.files[0].parent if checkpoint.files else None


def check_folder(
    path: str | Path, base: Checkpoint, inputs: Sequence[Checkpoint | Known], tasks: Sequence[str]
) -> None:
    """Raises UserError, before a weight is read, for a merge that cannot become the folder `path`.

    The base must be a folder of transformers, no input may be overwritten, nor a folder that holds anything else, and
    tokenizers must agree.
    """
    check_target(path, (base, *inputs))
    folder = folder_of(base)
    if folder is None or not (folder / CONFIG).is_file() or "model_type" not in config_of(folder):
        raise UserError(
            f"{path} is to be a folder of transformers, and the base ({base.name}) is none: no {CONFIG} with a "
            f"model_type lies beside it. Give a base that is, or save one file: {str(path).rstrip('/')}.safetensors."
        )
    if any(key.startswith("visual.") for key in base.specs()):
        raise UserError(
            f"{path} is to be a folder of transformers, and the merged weights have open_clip's names, which it does "
            f"not load. Save one file: {str(path).rstrip('/')}.safetensors; merging.load reads it."
        )
    target = Path(path)
    if target.is_dir() and any(target.iterdir()) and not (target / OWN).exists():
        raise UserError(f"{path} holds other files, which a merged model would replace. Choose a new folder.")
    tokenizer(base, inputs, tasks)


def check_shard(shard_gb: float) -> None:
    """Raises UserError for a size of files of weights that is not positive."""
    if not shard_gb > 0:
        raise UserError(f"shard_gb={shard_gb} is out of range: a file of weights takes more than 0 GB.")


def config_of(folder: Path) -> dict[str, Any]:
    """The config.json of a folder, empty where there is none."""
    path = folder / CONFIG
    try:
        return json.loads(path.read_text("utf-8")) if path.is_file() else {}
    except ValueError as error:
        raise UserError(f"{path} cannot be read as JSON ({error}). Copy or download it again.") from error


def tokenizer(base: Checkpoint, inputs: Sequence[Checkpoint | Known], tasks: Sequence[str]) -> Tokenizer:
    """The tokenizer of a merge. Raises UserError where those of base and experts contradict each other."""
    if isinstance(base, Aligned):
        return base.tokenizer
    who = ("the base", *tasks[: len(inputs)])
    folders = zip(who, map(folder_of, (base, *inputs)), strict=True)
    return tokenizer_of({name: folder for name, folder in folders if folder is not None})


def write(merged: "Merged", path: str | Path, shard_gb: float = 5.0, adapter: bool = False, **facts: Any) -> Path:
    """Write `merged` as the folder `path`, one parameter in memory at a time. Atomic: it appears whole or not at all.

    shard_gb: size of a file of weights at most. adapter: write one of the base instead of a model, see saving_adapter.
    facts: for the record and the model card, such as `scores`.
    Raises UserError as `check_folder`, for a shard size that is not positive, and for what cannot be written.
    """
    check_shard(shard_gb)
    if adapter:
        check_adapters(merged.inputs, merged.tasks)
    check_folder(path, merged.base, merged.inputs, merged.tasks)
    inputs, words = (merged.base, *merged.inputs), tokenizer(merged.base, merged.inputs, merged.tasks)
    folder = folder_of(merged.base)
    assert folder is not None  # as checked
    extra, about = beside(merged)
    extra = {key: tensor for key, tensor in extra.items() if not key.startswith(HEAD)}
    remarks = [*words.remarks, *([] if adapter else _differing_configs(merged, folder))]
    for remark in remarks:
        log.warning("%s: %s", path, remark)

    def fill(target: Path) -> None:
        if adapter:
            auto = saving_adapter.write(merged, target)
        else:
            auto = _write_model(merged, folder, target, extra, int(shard_gb * 1e9))
        for task, tensors in merged.heads.items():
            write_safetensors(target / HEADS / f"{task}.safetensors", specs_of(tensors), tensors.items(), PT)
        words.write(target)
        known = record(merged, ids_of(inputs), facts)
        (target / CARD).write_text(model_card(Path(path).name, auto, merged, known, remarks), "utf-8")
        write_safetensors(target / OWN, specs_of(extra), extra.items(), about | {"provenance": json.dumps(known)})

    return write_folder(path, fill, replaces=(Path(path) / OWN).exists())


def _write_model(merged: "Merged", folder: Path, target: Path, extra: Mapping[str, torch.Tensor], limit: int) -> str:
    """Weights and configuration, where there is room for `extra` too. Returns the class that loads them."""
    head = next(iter(merged.heads.values())) if len(merged.heads) == 1 else {}
    specs, config = _without_tied(merged, config_of(folder)) | specs_of(head), _config(merged, folder)
    check_room(target, sum(spec.bytes for spec in (*specs.values(), *specs_of(extra).values())))
    _write_shards(target, specs, _tensors(merged, specs, head), limit)
    for source in (file for pattern in COPIED for file in folder.glob(pattern)):
        shutil.copyfile(source, target / source.name)
    (target / CONFIG).write_text(json.dumps(config, indent=2) + "\n", "utf-8")
    return auto_class(config)


def _tensors(merged: "Merged", specs: Mapping[str, Spec], head: Mapping[str, torch.Tensor]) -> Iterator[Any]:
    yield from dense(merged, {key: spec for key, spec in specs.items() if key not in head})
    yield from head.items()


def _without_tied(merged: "Merged", config: Mapping[str, Any]) -> dict[str, Spec]:
    """The dense tensors; of two that the configuration ties and that are equal the one that transformers reads."""
    specs = dense_specs(merged)
    if not config.get("tie_word_embeddings") or merged.deltas:
        return specs
    infos = ((key, _info(merged, key)) for key in specs)
    other = {key: info.tied for key, info in infos if info is not None and info.tied in specs}
    twice = {key for key, first in other.items() if _equal(merged, key, str(first))}
    return {key: spec for key, spec in specs.items() if key not in twice}


def _equal(merged: "Merged", one: str, other: str) -> bool:
    """Whether two merged parameters hold the same numbers, with a block of each in memory."""
    shape = merged.specs[one].shape
    starts = range(0, shape.numel(), BLOCK)
    return shape == merged.specs[other].shape and all(
        torch.equal(merged.block(one, first), merged.block(other, first)) for first in starts
    )


def _info(merged: "Merged", key: str) -> ParamInfo | None:
    """What the table of these weights says of a parameter, None where there is no table."""
    try:
        return table_for(None, [*merged.specs]).find(key)
    except UserError:
        return None


def _write_shards(folder: Path, specs: Mapping[str, Spec], tensors: Iterator[Any], limit: int) -> None:
    """In the order of `specs`, a new file where the next tensor would exceed the limit."""
    shards: list[dict[str, Spec]] = [{}]
    size = 0
    for key, spec in specs.items():
        if shards[-1] and size + spec.bytes > limit:
            shards.append({})
            size = 0
        shards[-1][key] = spec
        size += spec.bytes
    if len(shards) == 1:
        write_safetensors(folder / WEIGHTS, specs, tensors, PT)
        return
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_safetensors(folder / name, shard, (next(tensors) for _ in shard), PT)
        weight_map |= dict.fromkeys(shard, name)
    index = {"metadata": {"total_size": sum(spec.bytes for spec in specs.values())}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", "utf-8")


def _config(merged: "Merged", folder: Path) -> dict[str, Any]:
    """The base's configuration, with a single head that of its expert, and the dtype of what is stored."""
    if len(merged.heads) == 1 and merged.inputs:
        expert = folder_of(merged.inputs[merged.tasks.index(next(iter(merged.heads)))])
        folder = expert if expert is not None and config_of(expert) else folder
    config = {key: value for key, value in config_of(folder).items() if key != "_name_or_path"}
    config |= {"vocab_size": merged.base.rows} if isinstance(merged.base, Aligned) else {}
    sizes: dict[torch.dtype, int] = {}
    for spec in merged.specs.values():
        sizes[spec.dtype] = sizes.get(spec.dtype, 0) + spec.bytes
    name = "dtype" if "dtype" in config else "torch_dtype"
    return config | ({name: str(max(sizes, key=lambda dtype: sizes[dtype])).removeprefix("torch.")} if sizes else {})


def auto_class(config: Mapping[str, Any]) -> str:
    """The class of transformers that loads a model of this configuration."""
    named = "".join(config.get("architectures") or ())
    ends = {"ForCausalLM": "ForCausalLM", "LMHeadModel": "ForCausalLM", "ForConditionalGeneration": "ForSeq2SeqLM",
            "ForSequenceClassification": "ForSequenceClassification", "ForMaskedLM": "ForMaskedLM"}  # fmt: skip
    return "AutoModel" + next((known for end, known in ends.items() if named.endswith(end)), "")


def _differing_configs(merged: "Merged", folder: Path) -> list[str]:
    """What an expert's configuration says otherwise than the base's, which is kept."""
    base, remarks, free = config_of(folder), [], FREE | ({"vocab_size"} if isinstance(merged.base, Aligned) else set())
    for task, expert in zip(merged.tasks, merged.inputs, strict=False):
        where = folder_of(expert)
        other = config_of(where) if where is not None else {}
        keys = [key for key in sorted(base.keys() & other.keys() - free) if base[key] != other[key]]
        if keys:
            told = ", ".join(f"{key} {other[key]} instead of {base[key]}" for key in keys[:3])
            remarks.append(f"the config.json of {task} has {told}; the base's is kept")
    return remarks


def opened(folder: Path) -> tuple[SafetensorsFile, Checkpoint]:
    """The record of a written folder, with deltas and gates, and its weights. Raises UserError for any other folder."""
    if not (folder / OWN).is_file():
        raise UserError(
            f"{folder} was not written by this library: it has no {OWN}. Load it by transformers' from_pretrained."
        )
    if (folder / ADAPTER).is_file():
        raise UserError(f"{folder} is an adapter. Load it by peft's from_pretrained.")
    return SafetensorsFile(folder / OWN), open_file(folder / (WEIGHTS if (folder / WEIGHTS).exists() else INDEX))


def heads_of(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    """Task -> the parameters of its head."""
    files = {path.stem: SafetensorsFile(path) for path in sorted((folder / HEADS).glob("*.safetensors"))}
    return {task: {key: file.tensor(key).clone() for key in file.specs()} for task, file in files.items()}


def facts_of(folder: Path) -> dict[str, Any] | None:
    """The architecture of a written folder, as `merging.backbones.from_facts` takes it; None for a file."""
    config = config_of(folder)
    if not config.get("architectures"):
        return None
    return {"family": "hugging_face", "model": config["architectures"][0], "config": config}
