"""Checkpoints of any kind by path: files are taken for what they hold, whatever their ending."""

import json
from collections import Counter
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
WEIGHTS = (  # of a folder, in the order of transformers
    "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json",
)  # fmt: skip
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

    A folder stands for the weights that Hugging Face's libraries keep in it. Raises UserError for what is missing or
    damaged, and for anything else, naming what it is.
    """
    path = weights_in(path)
    opened = {"safetensors": SafetensorsFile, "pickle": PickleFile, "index": Sharded}
    return opened[kind_of(path)](path, cache)


def weights_in(path: str | Path) -> Path:
    """The weights of a Hugging Face folder, the first of WEIGHTS that is there; anything else is itself."""
    path = Path(path).expanduser()
    return next((path / name for name in WEIGHTS if path.is_dir() and (path / name).exists()), path)


class Sharded(View):
    """A checkpoint in several files, by the index that Hugging Face's libraries write beside them.

    Raises UserError, from headers alone, for a file or a tensor that the index names and is not there, and for a name
    of either that it has twice. What the files hold and the index does not name is left out, with a remark.
    """

    def __init__(self, path: str | Path, cache: Cache | None = None):
        path = Path(path)
        names = _weight_map(path)
        files = sorted(set(names.values()))
        if absent := [name for name in files if not (path.parent / name).exists()]:
            raise UserError(
                f"{path} names {len(files)} files, and {some(absent)} is not there. Copy or download what is missing."
            )
        shards = {name: _shard(path.parent / name, path, cache) for name in files}
        stored = {name: pieces_of(shard) for name, shard in shards.items()}
        if missing := sorted(key for key, name in names.items() if key not in stored[name]):
            raise UserError(
                f"{path} says that {names[missing[0]]} holds {some(missing)}, which it does not. Index and files "
                f"are not of the same checkpoint: copy or download them again."
            )
        others = {key: name for name, pieces in stored.items() for key in pieces if names.get(key) != name}
        if twice := sorted(key for key in others if key in names):
            raise UserError(
                f"{names[twice[0]]} and {others[twice[0]]} of {path} both hold {some(twice)}: which is meant is not "
                f"guessed. Copy or download them again."
            )
        unnamed = (f"without {some(sorted(others))}, which the index does not name",) if others else ()
        super().__init__({key: stored[name][key] for key, name in names.items()}, *shards.values(), remarks=unnamed)
        self.name, self.files = str(path), (path, *self.files)


def _weight_map(path: Path) -> dict[str, str]:
    """Names of tensors -> names of files beside the index. Raises UserError for a name that stands in it twice."""

    def once(pairs: list[tuple[str, object]]) -> dict[str, object]:
        if twice := sorted(key for key, count in Counter(key for key, _ in pairs).items() if count > 1):
            raise UserError(f"{path} names {some(twice)} twice. Copy or download the index again.")
        return dict(pairs)

    names = json.loads(path.read_bytes(), object_pairs_hook=once)["weight_map"]
    for key, name in names.items():
        if not isinstance(name, str) or Path(name).name != name:
            raise UserError(
                f"{path} says that {key} lies in {name!r}. An index names files in its own folder: copy or download it "
                f"again."
            )
    return names


def _shard(path: Path, index: Path, cache: Cache | None) -> Checkpoint:
    if kind_of(path) == "index":
        raise UserError(f"{index} names {path.name}, which is an index itself. Copy or download the files again.")
    return open_file(path, cache)


def open_alike(
    base: Source, experts: Sequence[Source], cache: Cache | None, other_base: bool = False
) -> list[Checkpoint]:
    """Base and experts; where their names differ, without what training wrappers put around names.

    The folder of an adapter is read as the base with its changes. Raises UserError for an adapter as the base, and
    unless `other_base` for one of another base.
    """
    from merging.checkpoints.lora import is_adapter, open_lora  # here, because it opens files by this module

    if is_adapter(base):
        raise UserError(f"{base} is an adapter, which cannot be the base. Name the model that it was tuned from.")
    opened = [open_checkpoint(base, cache)]
    for expert in experts:
        adapter = is_adapter(expert)
        opened.append(open_lora(opened[0], expert, cache, other_base) if adapter else open_checkpoint(expert, cache))  # type: ignore[arg-type]
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
