"""Checkpoints of any kind by path: files are taken for what they hold, whatever their ending."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path

from torch import Tensor, nn

from merging.cache import Cache
from merging.checkpoints import Checkpoint, SafetensorsFile, Spec, StateDict
from merging.checkpoints.base import Over
from merging.checkpoints.file_kinds import kind_of
from merging.checkpoints.pickles import PickleFile
from merging.checkpoints.wrappers import unwrapped
from merging.errors import UserError
from merging.preflight import some

Source = str | Path | Mapping[str, Tensor] | Checkpoint


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
    if isinstance(source, type) or not hasattr(source, "specs"):
        what = f"the class {source.__name__}" if isinstance(source, type) else f"a {type(source).__name__}"
        raise UserError(f"A base or an expert is {what}. Give the path of a file, a state dict or a Checkpoint.")
    return source


def open_file(path: str | Path, cache: Cache | None = None) -> Checkpoint:
    """A safetensors file, a pickle, or by its index a checkpoint of several files; told by content.

    Raises UserError for what is missing or damaged, and for anything else, naming what it is.
    """
    opened = {"safetensors": SafetensorsFile, "pickle": PickleFile, "index": Sharded}
    return opened[kind_of(path)](path, cache)


class Sharded(Over):
    """A checkpoint in several files, by the index that Hugging Face's libraries write beside them.

    `id` is the sha256 of the files' ids. Raises UserError for a file or a tensor that the index names and is not there.
    """

    def __init__(self, path: str | Path, cache: Cache | None = None):
        self.path = Path(path)
        names: dict[str, str] = json.loads(self.path.read_bytes())["weight_map"]
        self._files = {name: open_file(self.path.parent / name, cache) for name in sorted(set(names.values()))}
        if missing := sorted(key for key, name in names.items() if key not in self._files[name].specs()):
            raise UserError(
                f"{self.path} says that {names[missing[0]]} holds {some(missing)}, which it does not. Index and files "
                f"are not of the same checkpoint: copy or download them again."
            )
        super().__init__(*self._files.values())
        self._of = {key: self._files[name] for key, name in names.items()}

    @property
    def name(self) -> str:
        return str(self.path)

    @property
    def files(self) -> tuple[Path, ...]:
        return (self.path, *super().files)

    @property
    def id(self) -> str:
        return self._id

    @cached_property
    def _id(self) -> str:
        return hashlib.sha256(" ".join(file.id for file in self._files.values()).encode()).hexdigest()

    def specs(self) -> Mapping[str, Spec]:
        return {key: file.specs()[key] for key, file in self._of.items()}

    def tensor(self, key: str) -> Tensor:
        return self._of[key].tensor(key)


def open_alike(base: Source, experts: Sequence[Source], cache: Cache | None) -> list[Checkpoint]:
    """Base and experts; where their names differ, without what training wrappers put around names.

    The folder of an adapter is read as the base with its changes. Raises UserError for an adapter as the base.
    """
    from merging.checkpoints.lora import is_adapter, open_lora  # here, because it opens files by this module

    if is_adapter(base):
        raise UserError(f"{base} is an adapter, which cannot be the base. Name the model that it was tuned from.")
    origin = open_checkpoint(base, cache)
    opened = [origin]
    for expert in experts:
        adapter = is_adapter(expert)
        opened.append(open_lora(origin, expert, cache) if adapter else open_checkpoint(expert, cache))  # type: ignore[arg-type]
    same = all(checkpoint.specs().keys() == opened[0].specs().keys() for checkpoint in opened)
    return opened if same else [unwrapped(checkpoint) for checkpoint in opened]
