"""Files that are either whole or absent."""

import contextlib
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from merging.errors import UserError


def write_atomically(path: str | Path, write: Callable[[BinaryIO], object], durable: bool = True) -> Path:
    """Let `write` fill a temporary file beside `path`, flush it to disk if `durable`, then rename it into place.

    On any failure, Ctrl-C included, the temporary file is removed and an older `path` stays as it was.
    Raises UserError naming the path when the folder cannot be written or the disk is full.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            write(file)
            file.flush()
            if durable:
                os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        raise UserError(
            f"Cannot write {path}: {error.strerror or error}. Nothing was left behind and an older file of that name "
            f"is untouched. Free some space or choose a folder you may write to, then run the same command again."
        ) from error
    finally:
        with contextlib.suppress(OSError):  # gone after the rename; a folder that cannot be written has its error above
            partial.unlink()
    return path


def write_text(path: str | Path, text: str) -> Path:
    """`write_atomically` for a UTF-8 string."""
    return write_atomically(path, lambda file: file.write(text.encode()))
