"""`duet suite=none`: merge and save, without tasks, data or a score; for any checkpoints of one architecture."""

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.utils import instantiate
from omegaconf import DictConfig

from launchers.found import cache_of
from launchers.job import built
from launchers.preflight import resources
from launchers.saves import save_of
from merging.api import merged_from
from merging.cache import Cache
from merging.context import Context, needs_of
from merging.errors import UserError
from merging.experts import Experts
from merging.fit.gates import Oracle
from tasks.scales import Search

log = logging.getLogger(__name__)
WITHOUT = "suite=none has no data"
UNNAMED = ("model", "pytorch_model", "weights", "checkpoint", "merged")  # files called so are known by their folder


@dataclass(frozen=True)
class Folders:
    """Base and experts by their paths: Hugging Face folders, adapters of the base, or files of weights.

    paths: a list, named by the last part of each path; or name -> path. vocabulary, other_base: see Experts.open.
    """

    base: str
    paths: Sequence[str] | Mapping[str, str]
    vocabulary: str = "same"
    other_base: bool = False

    @property
    def named(self) -> dict[str, str]:
        """Name -> path. Raises UserError for two of one name."""
        if isinstance(self.paths, Mapping):
            return dict(self.paths)
        names = [name_of(Path(path)) for path in self.paths]
        if twice := next((name for name in names if names.count(name) > 1), None):
            first, second = [path for path, name in zip(self.paths, names, strict=True) if name == twice][:2]
            raise UserError(
                f"experts.paths has two models called {twice}: {first} and {second}. Name them: "
                f"'experts.paths={{one: {first}, other: {second}}}'."
            )
        return dict(zip(names, self.paths, strict=True))

    def downloads(self, *_: object) -> None:
        """Raises UserError: with tasks there is a backbone, and experts=folder fits files to it."""
        raise UserError("experts=folders is for suite=none. To score a merge of your own models take experts=folder.")

    def opened(self, cache: Cache, **facts: Any) -> Experts:
        """Raises UserError, from headers alone, for what is missing or does not fit together."""
        base, *experts = (Path(path).expanduser() for path in (self.base, *self.named.values()))
        facts |= {"vocabulary": self.vocabulary, "other_base": self.other_base}
        return Experts.open(base, experts, [*self.named], cache, **facts)


def name_of(path: Path) -> str:
    """What a model is called by its path."""
    return path.parent.name if path.stem in UNNAMED else path.name.removesuffix(".safetensors")


def merge_and_save(config: DictConfig) -> Path:
    """One Hydra job. Raises UserError, before a weight is read, for what needs data, and for what cannot be saved."""
    save, (method, scale, router) = save_of(config), built(config)
    if save is None:
        raise UserError("suite=none merges and saves, and nothing says where. Name a folder or a file: save=merged/.")
    if (needs := needs_of(method)) != "nothing":
        raise UserError(
            f"{WITHOUT}, and {type(method).__name__} learns from {needs} of every task. Choose a method that needs "
            f"weights alone, such as ties, or a suite with data."
        )
    if isinstance(scale, Search):
        raise UserError(f"{WITHOUT} to search a coefficient on: leave scale=fixed and set method.scale.")
    if not isinstance(router, Oracle):
        raise UserError(f"{WITHOUT} to train a router on: leave router=oracle, or choose a suite with data.")
    source = instantiate(config.experts, _convert_="all")
    if not isinstance(source, Folders):
        raise UserError(
            "suite=none merges models by their paths: leave experts=folders and set experts.base and .paths."
        )
    device = instantiate(config.engine).torch_device
    experts = source.opened(cache_of(config), device=device)
    save.check(experts, method)
    resources(method, experts, save)
    begin = time.perf_counter()
    merged = merged_from(method, experts, Context(device=device, seed=config.seed))
    path = save.write(merged if config.save_dtype is None else merged.cast(config.save_dtype))
    log.info("took %.1f s", time.perf_counter() - begin)
    return path
