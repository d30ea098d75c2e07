"""Rows that are there already, found without torch: by the files and the code that decided their names the last time.

A row is named by contents (launchers.cells.Cell.identity), and knowing them takes torch and seconds. The names are
remembered in the cache under everything that they came from: the configuration, the code, and path, size, time and
inode of every file that the configuration names. Where the Hub is asked nothing is remembered.
"""

import contextlib
import hashlib
import json
import logging
import os
import platform
from collections.abc import Iterable, Iterator
from glob import escape, glob
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from launchers import rows
from launchers.callback import LISTED
from launchers.claims import owner
from merging.cache import GIB, Cache
from merging.errors import UserError
from merging.files import write_text

PACKAGES = ("launchers", "merging", "tasks")
ELSEWHERE = {
    "hydra",
    "output",
    "save",
    "save_adapter",
    "shard_gb",
    "push",
    "redo",
    "cache_gb",
    "tracker",
    "plot",
}  # what no row depends on
LIBRARIES = ("torch", "torchvision", "open_clip_torch", "numpy", "scipy", "scikit-learn", "datasets")
OPTIONAL = ("transformers", "lm_eval", "optuna", "cmaes")  # where it is installed
FOUND = "%s: found in %s (redo=true computes it again)"
log = logging.getLogger(__name__)


def found_rows(config: DictConfig) -> list[str] | None:
    """The row files of a command whose rows are all there, its own first; None where something may be to do."""
    if config.redo or config.save is not None or not config.tracker._target_.endswith(".Tracker"):
        return None
    cache, folder, files = cache_of(config), Path(config.output) / "results", state(config)
    ids = json.loads(cache.get(_key(config, files)) or "[]") if files is not None else []
    busy = any(owner(folder, run_id) or (cache.folder / "unfinished" / run_id).exists() for run_id in ids)
    if busy or not ids or any(rows.find(folder, run_id, logging.DEBUG) is None for run_id in ids):
        return None
    paths = [str((folder / f"{run_id}.json").resolve()) for run_id in ids]
    write_text(Path(HydraConfig.get().runtime.output_dir) / LISTED, json.dumps(paths))
    log.info(FOUND, HydraConfig.get().runtime.choices["method"], folder / f"{ids[0]}.json")
    return paths


def remember(config: DictConfig, files: str, ids: Iterable[str]) -> None:
    """Note the names of a command's rows, which came from files in that `state`; without one where the disk is full."""
    with contextlib.suppress(UserError):
        cache_of(config).put(_key(config, files), json.dumps(list(ids)).encode())


def state(config: DictConfig) -> str | None:
    """What the experts and the images of a command come from: the code, libraries and all files that it names.

    To be asked for before they are opened. None where code from outside takes part.
    """
    targets = [text for key, text in _texts(_decides(config)) if key == "_target_"]
    if any(target.partition(".")[0] not in PACKAGES for target in targets):
        return None
    home = Path(__file__).resolve().parent.parent
    digest = hashlib.sha256(
        " ".join(
            [platform.python_version(), *map(version, LIBRARIES), *map(version, filter(find_spec, OPTIONAL))]
        ).encode()
    )
    for root in sorted({*(str(home / name) for name in PACKAGES), *named(config)}):
        for path in filter(os.path.exists, _files(root)):  # a dead link is no file
            stat = os.stat(path)
            digest.update(
                f"{path}\0{stat.st_size}\0{stat.st_mtime_ns}\0{stat.st_ino}\n".encode(errors="surrogateescape")
            )
    return digest.hexdigest()


def named(config: DictConfig) -> set[str]:
    """The files and folders that a configuration names as inputs."""
    return {path for _, text in _texts(_decides(config)) for path in _paths(text)}


def is_local(suite: Any, source: Any, backbone: Any) -> bool:
    """Whether the configuration names every file that experts and images come from, and none is asked of the Hub."""
    if hasattr(source, "downloads") and source.downloads(suite, backbone):
        return False
    return all(getattr(task, "is_local", True) for task in suite.every)


def _key(config: DictConfig, files: str) -> str:
    method = HydraConfig.get().runtime.choices["method"]
    return json.dumps(["names of rows", method, _decides(config), files], sort_keys=True)


def _decides(config: DictConfig) -> dict[str, Any]:
    """What the names of rows may depend on."""
    values: Any = OmegaConf.to_container(config, resolve=True)
    values["suite"].pop("store", None)
    return {name: value for name, value in values.items() if name not in ELSEWHERE}


def cache_of(config: DictConfig) -> Cache:
    """The cache of an output folder."""
    return Cache(Path(config.output) / ".cache", int(config.cache_gb * GIB))


def _texts(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """(key, text) of every text in a configuration, the keys of mappings included."""
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, dict | list):
        for name, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _texts(inner, str(name))


def _paths(text: str) -> list[str]:
    """The files and folders that a text may name: itself, by a pattern, or by a template for every task.

    Of an index (.json) its folder: it names files beside it.
    """
    text = os.path.expanduser(text)
    template = "*".join(map(escape, text.split("{task}")))  # whose brackets, unlike a pattern's, are meant as they are
    paths = [os.path.abspath(path) for path in {text, *glob(text), *glob(template)} if path and os.path.exists(path)]
    return [os.path.dirname(path) if path.endswith(".json") else path for path in paths]


def _files(root: str) -> Iterator[str]:
    """A file, or all files below a folder, through links too."""
    if not os.path.isdir(root):
        yield root
    seen: set[str] = set()
    for folder, folders, names in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        folders[:] = [] if real in seen else sorted(name for name in folders if name != "__pycache__")
        seen.add(real)
        yield from (os.path.join(folder, name) for name in sorted(names))
