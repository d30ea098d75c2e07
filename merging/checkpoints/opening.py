"""Checkpoints of any kind by path: files are taken for what they hold, whatever their ending."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor, nn

from merging.backbones.base import table_for
from merging.cache import Cache
from merging.checkpoints.base import Checkpoint, StateDict
from merging.checkpoints.file_kinds import kind_of
from merging.checkpoints.pickles import PickleFile
from merging.checkpoints.safetensors_file import SafetensorsFile
from merging.checkpoints.views import View, pieces_of, renamed, selected
from merging.errors import UserError
from merging.preflight import some

Source = str | Path | Mapping[str, Tensor] | Checkpoint
ANYWHERE = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")  # never the name of a model's own part
AROUND = "module."  # of DataParallel and the like: stripped only where all names have it
COUNTER = "n_averaged"  # of torch.optim.swa_utils.AveragedModel, which has `module.` around the rest


def open_checkpoint(source: Source, cache: Cache | None = None) -> Checkpoint:
    """A checkpoint from the path of a file or from a state dict; a checkpoint passes through.

    Raises UserError for anything else.
    """
    if isinstance(source, str | Path):
        return open_file(source, cache)
    if isinstance(source, Mapping):
        return StateDict(source)
    if isinstance(source, nn.Module):
        raise UserError(
            f"A base or an expert is a {type(source).__name__}. Give the weights of the module: module.state_dict()."
        )
    if not isinstance(source, Checkpoint):
        what = f"the class {source.__name__}" if isinstance(source, type) else f"a {type(source).__name__}"
        raise UserError(f"A base or an expert is {what}. Give the path of a file, a state dict or a Checkpoint.")
    return source


def open_file(path: str | Path, cache: Cache | None = None) -> Checkpoint:
    """A safetensors file, a pickle, or by its index a checkpoint of several files; recognised by content.

    Raises UserError for what is missing or damaged, and for anything else, naming what it is.
    """
    opened = {"safetensors": SafetensorsFile, "pickle": PickleFile, "index": Sharded}
    return opened[kind_of(path)](path, cache)


class Sharded(View):
    """A checkpoint in several files, by the index that Hugging Face's libraries write beside them.

    Raises UserError for a file or a tensor that the index names and is not there.
    """

    def __init__(self, path: str | Path, cache: Cache | None = None):
        path = Path(path)
        names: dict[str, str] = json.loads(path.read_bytes())["weight_map"]
        shards = {name: open_file(path.parent / name, cache) for name in sorted(set(names.values()))}
        stored = {name: pieces_of(shard) for name, shard in shards.items()}
        if missing := sorted(key for key, name in names.items() if key not in stored[name]):
            raise UserError(
                f"{path} says that {names[missing[0]]} holds {some(missing)}, which it does not. Index and files "
                f"are not of the same checkpoint: copy or download them again."
            )
        super().__init__({key: stored[name][key] for key, name in names.items()}, *shards.values())
        self.name, self.files = str(path), (path, *self.files)


def open_alike(base: Source, experts: Sequence[Source], cache: Cache | None) -> list[Checkpoint]:
    """Base and experts; where their names differ, without what training wrappers put around names.

    The folder of an adapter is read as the base with its changes. Raises UserError for an adapter as the base.
    """
    from merging.checkpoints.lora import is_adapter, open_lora  # here, because it opens files by this module

    if is_adapter(base):
        raise UserError(f"{base} is an adapter, which cannot be the base. Name the model that it was tuned from.")
    opened = [open_checkpoint(base, cache)]
    for expert in experts:
        adapter = is_adapter(expert)
        opened.append(open_lora(opened[0], expert, cache) if adapter else open_checkpoint(expert, cache))  # type: ignore[arg-type]
    same = all(checkpoint.specs().keys() == opened[0].specs().keys() for checkpoint in opened)
    return opened if same else [unwrapped(checkpoint) for checkpoint in opened]


def unwrapped(checkpoint: Checkpoint) -> Checkpoint:
    """A checkpoint under the names of the bare model, without those of DDP, torch.compile or FSDP around it.

    A remark says what was stripped; itself if nothing was. Raises UserError where two parameters then have one name.
    """
    names = {key: ".".join(part for part in key.split(".") if part not in ANYWHERE) for key in checkpoint.specs()}
    stripped = [f"{part}." for part in ANYWHERE if any(part in key.split(".") for key in names)]
    rest = [key for key in names if key != COUNTER]
    while rest and all(names[key].startswith(AROUND) for key in rest):
        names = {key: names[key].removeprefix(AROUND) for key in rest}
        stripped.append(AROUND)
    if not stripped:
        return checkpoint
    return renamed(checkpoint, names, (f"names without {' and '.join(dict.fromkeys(stripped))}",))


def split_head(checkpoint: Checkpoint, table: str | None) -> tuple[Checkpoint, Checkpoint]:
    """A checkpoint without the parameters that belong to one task, its head, and these alone.

    By the table of that name, else by the one that has all its names. Where there is none nothing is known to be a
    head, and where there would be nothing else no name tells that it is.
    """
    keys = {key: spec.merged for key, spec in checkpoint.specs().items()}
    try:
        inside = set(table_for(table, [key for key, merged in keys.items() if merged]).head_keys(keys))
    except UserError:
        if table is not None:
            raise
        inside = set()
    if not inside or len(inside) == len(keys):
        return checkpoint, selected(checkpoint, ())
    head = [key for key in keys if key in inside]
    return selected(checkpoint, [key for key in keys if key not in inside]), selected(checkpoint, head)
