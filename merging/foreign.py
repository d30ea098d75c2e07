"""Checkpoints in pickles (torch.save of today and of before 1.6, pickle.dump; whole modules or state dicts).

They are read without running anything in them (merging.inert) and converted once to safetensors.
"""

import hashlib
import json
import mmap
import struct
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from merging.cache import Cache
from merging.checkpoints import Checkpoint, SafetensorsFile, Spec, write_safetensors
from merging.errors import UserError
from merging.torch_files import Map, Reader, View, views

FORMAT = "1"  # to be raised where a pickle is converted to other tensors than before
ENDINGS = (".pt", ".pth", ".bin", ".pkl", ".pickle", ".ckpt")
DAMAGES = (ValueError, TypeError, KeyError, IndexError, AttributeError, OverflowError, RecursionError, struct.error,
           zipfile.BadZipFile, NotImplementedError, EOFError)  # fmt: skip


@contextmanager
def _reading(path: Path) -> Iterator[Map]:
    """The file, mapped; what is wrong with it becomes a UserError."""
    try:
        with path.open("rb") as file:
            yield Map(file.fileno(), 0, access=mmap.ACCESS_COPY)
    except FileNotFoundError:
        raise UserError(f"There is no checkpoint at {path}. Give the path of a file.") from None
    except OSError as error:
        raise UserError(f"Cannot read {path}: {error.strerror or error}. Give a file that you may read.") from error
    except DAMAGES as error:
        raise UserError(
            f"{path} cannot be read as a checkpoint: {error or type(error).__name__}. It may be truncated or damaged: "
            f"copy or download it again. What works: safetensors, and what torch.save or pickle.dump wrote of a module "
            f"or of a state dict."
        ) from error


@contextmanager
def _found(path: Path) -> Iterator[tuple[dict[str, View], tuple[str, ...]]]:
    """The tensors of a file, checked and not yet read, and the names in it that were not looked up."""
    with _reading(path) as memory:
        reader = Reader(memory)
        found = views(reader.root())
        if not found:
            raise ValueError("it holds no tensors")
        for view in found.values():
            view.check()
        yield found, tuple(sorted(reader.machine.replaced))


def inert_state(path: str | Path) -> dict[str, Tensor]:
    """The state dict in a pickle, without running anything in it; tensors are views of a private map of the file.

    Raises UserError for what is missing, truncated, damaged or holds no weights.
    """
    with _found(Path(path)) as (found, _):
        return {key: view.tensor() for key, view in found.items()}


def fingerprint(path: str | Path, cache: Cache | None = None) -> str:
    """sha256 of a file, remembered in the cache under path, size and modification time."""
    path = Path(path)

    def digest() -> str:
        hashed = hashlib.sha256()
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                hashed.update(block)
        return hashed.hexdigest()

    with _reading(path):
        stat = path.stat()
        key = f"sha256 {path.resolve()} {stat.st_size} {stat.st_mtime_ns} {stat.st_ino}"
        return digest() if cache is None else cache.text(key, digest)


def convert(path: str | Path, folder: str | Path, cache: Cache | None = None) -> Path:
    """`<folder>/<sha256 of the file>.safetensors`, written unless it is there in this FORMAT. Atomic.

    Its metadata tell the format, the source, its sha256, and the names in it that were not looked up. One tensor at a
    time is in memory, unless the file is a plain pickle, which is there as a whole. Raises UserError as `inert_state`.
    """
    path, sha = Path(path), fingerprint(path, cache)
    target = Path(folder) / f"{sha}.safetensors"
    if target.exists() and SafetensorsFile(target).metadata.get("format") == FORMAT:
        return target
    with _found(path) as (found, replaced):
        specs = {key: Spec(torch.Size(view.shape), view.storage.dtype) for key, view in found.items()}
        metadata = {
            "format": FORMAT,
            "source": path.name,
            "source_sha256": sha,
            "replaced_globals": json.dumps(replaced),
        }
        return write_safetensors(target, specs, ((key, view.tensor()) for key, view in found.items()), metadata)


class Foreign:
    """A converted file under the name and sha256 of its source."""

    def __init__(self, path: Path, converted: SafetensorsFile):
        self._path, self._converted = path, converted

    @property
    def name(self) -> str:
        return str(self._path)

    @property
    def files(self) -> tuple[Path, ...]:
        return (self._path, *self._converted.files)

    @property
    def id(self) -> str:
        return self._converted.metadata["source_sha256"]

    def specs(self) -> Mapping[str, Spec]:
        return self._converted.specs()

    def tensor(self, key: str) -> Tensor:
        return self._converted.tensor(key)

    def release(self) -> None:
        self._converted.release()


def open_foreign(path: str | Path, cache: Cache | str | Path) -> Checkpoint:
    """A pickle as a checkpoint, converted now unless it was before; the copy lies in the cache's folder."""
    cache = cache if isinstance(cache, Cache) else Cache(cache)
    return Foreign(Path(path), SafetensorsFile(convert(path, cache.folder / "converted", cache), cache))


def open_file(path: str | Path, cache: Cache) -> Checkpoint:
    """A safetensors file, or by its ending (ENDINGS) a pickle."""
    return open_foreign(path, cache) if Path(path).suffix in ENDINGS else SafetensorsFile(path, cache)
