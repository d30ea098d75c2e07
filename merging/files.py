"""Files: written whole or not at all, and told from others by the sha256 of what they hold."""

import contextlib
import fcntl
import hashlib
import os
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from merging.errors import UserError

if TYPE_CHECKING:
    from merging.cache import Cache


def write_atomically(path: str | Path, write: Callable[[BinaryIO], object], durable: bool = True) -> Path:
    """Let `write` fill a temporary file beside `path`, flush it to disk if `durable`, then rename it into place.

    On any failure, Ctrl-C included, the temporary file is removed and an older `path` stays as it was; what a killed
    writer of the same `path` left behind is removed too. Raises UserError naming the path when the folder cannot be
    written or the disk is full.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_abandoned(path.parent, path.name)
        with _mine(partial), open(partial, "wb", opener=_locked) as file:
            write(file)
            file.flush()
            if durable:
                os.fsync(file.fileno())
            os.replace(partial, path)  # still locked, so that nobody takes it for abandoned
    except OSError as error:
        raise UserError(
            f"Cannot write {path}: {error.strerror or error}. Nothing was left behind and an older file of that name "
            f"is untouched. Free some space or choose a folder you may write to, then run the same command again."
        ) from error
    finally:
        with contextlib.suppress(OSError):  # gone after the rename; a folder that cannot be written has its error above
            partial.unlink()
    return path


_MINE: set[str] = (
    set()
)  # temporary files and folders of this process; some file systems keep no locks between its threads


@contextlib.contextmanager
def _mine(partial: Path) -> Iterator[None]:
    """While a temporary file or folder is this process's own."""
    _MINE.add(os.path.abspath(partial))
    try:
        yield
    finally:
        _MINE.discard(os.path.abspath(partial))


def _locked(partial: str | Path, flags: int) -> int:
    """Opens a new file or folder, locked until it is closed: the sign that its writer lives, on every machine that
    shares the disk."""
    while True:
        descriptor = os.open(partial, flags, 0o666)
        with contextlib.suppress(OSError):  # a file system without locks: nothing there is ever taken for abandoned
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        if os.fstat(descriptor).st_nlink:
            return descriptor
        os.close(descriptor)  # it was taken for abandoned before it was locked


def remove_abandoned(folder: str | Path, name: str | None = None) -> None:
    """Remove the temporary files and folders of writers that were killed: those of `name`, by default of every name."""
    temporary = re.compile(rf"\.{'.+' if name is None else re.escape(name)}\.\d+\.\d+")
    with os.scandir(folder) as entries:
        paths = [entry.path for entry in entries if temporary.fullmatch(entry.name) and not entry.is_symlink()]
    for path in paths:
        if os.path.abspath(path) not in _MINE:
            with contextlib.suppress(OSError), contextlib.ExitStack() as stack:  # it lives, or another removed it
                inner = os.path.isdir(path)
                descriptor = os.open(path, os.O_RDONLY if inner else os.O_RDWR)
                stack.callback(os.close, descriptor)
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.path.samestat(os.fstat(descriptor), os.stat(path)):  # no newer one of that name
                    shutil.rmtree(path) if inner else os.unlink(path)


def write_text(path: str | Path, text: str) -> Path:
    """`write_atomically` for a UTF-8 string."""
    return write_atomically(path, lambda file: file.write(text.encode()))


def write_folder(path: str | Path, fill: Callable[[Path], object], replaces: bool = False) -> Path:
    """Let `fill` write files into a temporary folder beside `path`, then rename it into place.

    On any failure, Ctrl-C included, nothing is left; what a killed writer of the same `path` left behind is removed
    too. An older folder that is not empty is replaced where `replaces`. Raises UserError naming the file that could not
    be written when the disk is full or the folder cannot be written.
    """
    path = Path(os.path.abspath(path))
    partial = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}")
    older = partial.with_name(f"{partial.name}.older")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_abandoned(path.parent, path.name)
        with _mine(partial), contextlib.ExitStack() as stack:
            partial.mkdir()
            stack.callback(os.close, _locked(partial, os.O_RDONLY))
            fill(partial)
            if replaces and path.exists():
                os.rename(path, older)
            os.rename(partial, path)  # onto nothing or an empty folder
    except UserError as error:
        raise UserError(str(error).replace(str(partial), str(path))) from error
    except OSError as error:
        raise UserError(
            f"Cannot write {path}: {error.strerror or error}. Nothing was left behind and an older folder of that name "
            f"is untouched. Free some space or choose a folder you may write to, then run the same command again."
        ) from error
    finally:
        if older.exists() and not path.exists():
            os.rename(older, path)
        for folder in (partial, older):
            shutil.rmtree(folder, ignore_errors=True)
    return path


def room(path: str | Path) -> tuple[Path, int]:
    """The folder that is there of a path to be written, and the bytes that are free on its disk."""
    path = Path(os.path.abspath(path))
    disk = next(folder for folder in (path, *path.parents) if folder.is_dir())
    return disk, shutil.disk_usage(disk).free


def check_room(path: str | Path, size: int) -> None:
    """Raises UserError unless `size` bytes fit on the disk of `path`."""
    disk, free = room(path)
    if size > free:
        raise UserError(
            f"{path} takes {size / 1e9:.2f} GB, and {disk} has {free / 1e9:.2f} GB free. Free some space, choose a "
            f"folder on a larger disk, or save it smaller with save_dtype=bf16."
        )


class Content:
    """The content of a file as it is now. Threads may ask for the `id` at once: one computes it."""

    def __init__(self, path: Path, cache: "Cache | None" = None):
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
        digest = sha256(self._path) if self._cache is None else self._cache.text(key, lambda: sha256(self._path))
        if facts_of(self._path) != self.facts:
            raise UserError(
                f"{self._path} was changed since it was opened: what was read of it and its id would not be of one "
                f"content. Run the same command again."
            )
        return digest


def facts_of(path: Path) -> tuple[int, int, int]:
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
