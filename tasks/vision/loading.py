"""How the library `datasets` is reached: with patience online, through its cache offline."""

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from merging.errors import UserError

ARROW = re.compile(r"^(?!cache-).*?-(\w+?)(?:-\d{5}-of-\d{5})?\.arrow$")  # <name>-<split>.arrow, also in pieces
Result = TypeVar("Result")
log = logging.getLogger(__name__)


def offline() -> bool:
    """Whether the Hub must not be asked."""
    from datasets import config

    return bool(config.HF_HUB_OFFLINE)


def prepared(repo: str, args: Sequence[str], commit: str | None = None) -> Mapping[str, list[Path]]:
    """Split -> its newest files in the cache of `datasets`, or those of a commit. Raises UserError for none."""
    from datasets import config
    from datasets.naming import camelcase_to_snakecase

    owner, _, short = repo.rpartition("/")
    folder = Path(config.HF_DATASETS_CACHE) / "___".join([*filter(None, [owner]), camelcase_to_snakecase(short)])
    configs = [f"{args[0]}*" if args else "*", "default-*"]
    found = {path for each in configs for path in folder.glob(f"{each}/*/{commit or '*'}/*.arrow")}
    splits: dict[str, list[Path]] = {}
    for path in sorted(found, key=lambda path: (path.parent.stat().st_mtime, path.name)):
        if match := ARROW.search(path.name):
            have = splits.setdefault(match[1], [])
            splits[match[1]] = [*have, path] if have and have[0].parent == path.parent else [path]
    if not splits:
        raise UserError(
            f"HF_HUB_OFFLINE is set and {' '.join((repo, *args))} is not in the Hugging Face cache ({folder})"
            f"{f' as of its commit {commit}' if commit else ''}. Run once with a network, or copy that folder from a "
            f"machine that has it."
        )
    return splits


def reach(load: Callable[[], Result], name: str, tries: int = 3) -> Result:
    """What `load` returns; tried again where the network failed. Raises UserError for what cannot be had."""
    for attempt in range(1, tries + 1):
        try:
            return load()
        except (OSError, ValueError, RuntimeError) as error:  # datasets wraps whatever went wrong in any of these
            if attempt < tries and isinstance(error, OSError) and not isinstance(error, FileNotFoundError):
                log.warning("%s: %s; trying again (%d of %d)", name, error, attempt + 1, tries)
                continue
            raise UserError(
                f"Cannot load the data set {name} ({type(error).__name__}: {error}). Check its name, your access and "
                f"the network; with HF_HUB_OFFLINE=1 it must be in the Hugging Face cache."
            ) from error
    raise AssertionError
