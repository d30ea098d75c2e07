"""Where and how a command writes its merged model: one file or a folder of Hugging Face, and the Hub."""

import logging
import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from launchers.callback import check_writable
from merging.checkpoints import Known
from merging.errors import UserError
from merging.experts import Experts
from merging.files import check_room
from merging.merged import Merged
from merging.saving import check_target, dtype_of, is_folder
from merging.saving_adapter import check_adapters
from merging.saving_folder import check_folder, check_shard
from tasks.score import Score

Facts = dict[str, Any]
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Save:
    """The options of a command on what it writes. path, dtype, shard_gb, adapter: as `Merged.save` takes them."""

    path: str
    dtype: str | None = None
    shard_gb: float = 5.0
    adapter: bool = False
    push: str | None = None  # user/name on the Hub
    command: str | None = None  # that repeats it

    def check(self, experts: Experts, method: object, others: Sequence[Known] = ()) -> None:
        """Raises UserError, before a weight is read, for what cannot be written. others: more files that are read."""
        inputs = (*experts.inputs, *others)
        if self.adapter:
            check_adapters(experts.inputs, experts.tasks, method)
        check_shard(self.shard_gb)
        if is_folder(self.path):
            check_folder(self.path, experts.origin, experts.inputs, experts.tasks)
        check_target(self.path, (experts.origin, *inputs))
        check_room(self.path, self.size(experts))

    def size(self, experts: Experts) -> int:
        """Bytes that are written at least, by headers alone; an adapter is as large as all that it is made of."""
        if self.adapter:
            return sum(expert.files[0].stat().st_size for expert in experts.checkpoints)
        size = None if self.dtype is None else dtype_of(self.dtype).itemsize
        return sum(spec.shape.numel() * (size or spec.dtype.itemsize) for spec in experts.specs().values())

    def write(
        self, merged: Merged, scores: Mapping[str, Score] | None = None, protocol: Facts | None = None, **facts: Any
    ) -> Path:
        """Write it, with `facts` for its record; scores by task and their protocol are for a folder's model card."""
        if is_folder(self.path):
            card = {"scores": {task: shown(score) for task, score in (scores or {}).items()}, "command": self.command}
            facts |= card | (protocol or {})
        path = merged.save(self.path, shard_gb=self.shard_gb, adapter=self.adapter, **facts)
        log.info("saved %s", path)
        if self.push is not None:
            upload(path, self.push)
        return path


def shown(score: Score) -> dict[str, Any]:
    """A score as a model card has it."""
    names = ("metric", "value", "standard_error", "count")
    return {name: getattr(score, name) for name in names}


def save_of(config: DictConfig) -> Save | None:
    """What `save` and the options beside it say, None for a command that writes no model.

    Raises UserError for a path that may be a file or a folder, or that cannot be written.
    """
    if config.push is not None:
        check_push(config.push, config.save)
    if config.save is None:
        return None
    if not is_folder(config.save) and config.save_adapter:
        raise UserError(f"save_adapter=true writes a folder, and save={config.save} is a file. Write save=<folder>/.")
    check_writable("save", Path(os.path.abspath(config.save)).parent)
    return Save(config.save, config.save_dtype, config.shard_gb, config.save_adapter, config.push, command())


def command() -> str:
    """The command of this job, as a shell takes it."""
    return shlex.join(["duet", *HydraConfig.get().overrides.task])


def check_push(repository: str, path: str | None) -> None:
    """Raises UserError where nothing could be uploaded: no folder, no name of a repository, no token."""
    from huggingface_hub import get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    if path is None or not is_folder(path):
        raise UserError(f"push={repository} uploads a folder, and save={path} names none. Write save=<folder>/ too.")
    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise UserError(f"push={repository} is no name of a model on the Hub: write push=<user>/<name>.") from error
    if get_token() is None:
        raise UserError(
            f"push={repository} needs a token of the Hugging Face Hub that may write, and there is none. Run: "
            f"hf auth login, or set HF_TOKEN."
        )


def upload(folder: Path, repository: str) -> None:
    """Into a private model of the Hub, made where it is not there. Raises UserError where that fails."""
    from huggingface_hub import HfApi

    try:
        url = HfApi().create_repo(repository, private=True, exist_ok=True)
        HfApi().upload_folder(repo_id=repository, folder_path=folder, commit_message="Upload a merged model")
    except (OSError, ValueError) as error:  # what the Hub refuses, and a network that is not there
        reason = " ".join(str(error).split()).rstrip(".")
        raise UserError(
            f"{folder} is saved and was not uploaded to {repository}: {reason}. Upload it by hand: "
            f"hf upload {repository} {shlex.quote(str(folder))}"
        ) from error
    log.info("uploaded to %s", url)
