"""Whether an adapter is put on the model that it was trained on, as far as the names of both tell."""

import contextlib
import json
import re
from pathlib import Path

from merging.cache import Cache
from merging.checkpoints.base import Checkpoint
from merging.checkpoints.opening import open_file, weights_in
from merging.errors import UserError

HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
CACHED = "models--"  # how the folder of a model begins in the cache of the Hub's client


def check_base(adapter: Path, named: str | None, base: Checkpoint, cache: Cache | None = None) -> tuple[str, ...]:
    """What is to be said of the base that the configuration of an adapter names: nothing where it is this one.

    Models of the Hub are compared by their ids, a folder that is here by its content, and folders that are not by the
    last part of their names: where it differs they may be copies of one model, which is said and not refused. Raises
    UserError for another model of the Hub, and for a folder with other weights.
    """
    if not named or not base.files:
        return ()
    folder = base.files[0].absolute().parent
    if any(_alike(_name(named), name) for name in _names(folder)):
        return ()
    here = weights_in(named)
    if here.is_file():
        if here.parent.samefile(folder) or open_file(here, cache).id == base.id:
            return ()
    elif not (_of_hub(str(folder)) and (_of_hub(named) or HUB_ID.fullmatch(named))):
        return (f"trained on {named}, by its configuration; whether {base.name} is the same model is not known",)
    raise UserError(
        f"{adapter} was trained on {named}, by its configuration, and is put on {_names(folder)[0]} ({base.name}). "
        f"Name its base; where another one is meant, such as a copy in other files or under another name, say "
        f"experts.other_base=true on the command line and other_base=True in the library."
    )


def _names(folder: Path) -> list[str]:
    """What the model in a folder is called: by the folder, and by its configuration."""
    names = [_name(str(folder))]
    with contextlib.suppress(OSError, ValueError, AttributeError):
        names.append(_name(json.loads((folder / "config.json").read_text("utf-8")).get("_name_or_path") or names[0]))
    return names


def _of_hub(path: str) -> bool:
    return any(part.startswith(CACHED) for part in Path(path).parts)


def _name(path: str) -> str:
    """The id of a model of the Hub, by a folder in its cache too; of another path its last part."""
    cached = next((part for part in Path(path).parts if part.startswith(CACHED)), None)
    if cached is not None:
        return cached.removeprefix(CACHED).replace("--", "/", 1)
    return path if HUB_ID.fullmatch(path) else Path(path).name


def _alike(one: str, other: str) -> bool:
    """Whether two names may be of one model: an id without its owner is the last part."""
    owned = "/" in one and "/" in other
    one, other = (name.casefold() if owned else name.casefold().rpartition("/")[2] for name in (one, other))
    return one == other
