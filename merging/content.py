"""What a file holds, by its sha256: computed when it is asked for, and remembered as long as the file is the same."""

import hashlib
import threading
from pathlib import Path

from merging.cache import Cache
from merging.errors import UserError

Facts = tuple[int, int, int]


class Content:
    """The content of a file as it is now. Threads may ask for the `id` at once: one computes it."""

    def __init__(self, path: Path, cache: Cache | None = None):
        self._path, self._cache, self.facts = path, cache, facts_of(path)
        self._lock, self._known = threading.Lock(), ""

    @property
    def id(self) -> str:
        """sha256 of the file, kept in the cache under path, size, modification time and inode.

        Raises UserError for a file that was changed since.
        """
        with self._lock:  # not a cached_property, all of which wait for one lock before Python 3.12
            self._known = self._known or self._identified()
            return self._known

    def _identified(self) -> str:
        key = f"sha256 {self._path.resolve()} {' '.join(map(str, self.facts))}"
        found = sha256(self._path) if self._cache is None else self._cache.text(key, lambda: sha256(self._path))
        if facts_of(self._path) != self.facts:
            raise UserError(
                f"{self._path} was changed since it was opened: what was read of it and its id would not be of one "
                f"content. Run the same command again."
            )
        return found


def facts_of(path: Path) -> Facts:
    """What tells a file from an earlier one of its name: size, time of the last change, and number on its disk."""
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns, stat.st_ino


def sha256(path: Path) -> str:
    """Of the bytes of a file."""
    digest, block = hashlib.sha256(), memoryview(bytearray(1 << 18))  # the block stays in a core's cache
    with path.open("rb", buffering=0) as file:
        while size := file.readinto(block):
            digest.update(block[:size])
    return digest.hexdigest()
