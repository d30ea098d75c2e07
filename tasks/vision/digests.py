"""Content of many files, remembered: what has not changed since is not read again."""

import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from merging.cache import Cache
from merging.errors import UserError
from merging.files import facts_of, sha256

AT_ONCE = 8  # files; on a network's disk a file is mostly waited for


@contextmanager
def reading() -> Iterator[None]:
    """Raises UserError naming the file or folder that cannot be read."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"Cannot read {error.filename}: {error.strerror}. Put it back or make it readable, or take it out of the "
            f"data set."
        ) from error


@reading()
def digests(paths: Sequence[Path], folder: str, cache: Cache | None) -> list[str]:
    """sha256 of every file, by path, size, modification time and inode from the cache: one entry for all of `folder`.

    Raises UserError for a file that cannot be read.
    """
    key = f"sha256 of the files of {Path(folder).resolve()}"
    known = json.loads((cache.get(key) if cache is not None else None) or b"{}")
    states = {path: list(facts_of(path)) for path in paths}
    new = [path for path, state in states.items() if known.get(str(path), [])[:-1] != state]
    with ThreadPoolExecutor(AT_ONCE) as pool:
        for path, digest in zip(new, pool.map(sha256, new), strict=True):
            known[str(path)] = [*states[path], digest]
    if new and cache is not None:
        cache.put(key, json.dumps(known).encode())
    return [known[str(path)][-1] for path in paths]
