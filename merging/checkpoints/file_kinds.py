"""What a file is, by its content: endings are not believed, and what is no checkpoint is named for what it is."""

import contextlib
import json
import struct
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple, NoReturn

from merging.errors import UserError

Kind = Literal["safetensors", "pickle", "index"]
WORKS = "What works: safetensors, and what torch.save or pickle.dump wrote of a module or of a state dict."
UNPACK = "Unpack it and name the weight file inside."
CONVERT = "Load it with the library that wrote it and save its weights with safetensors or torch.save."
NAMES: dict[Kind, str] = {
    "safetensors": "a safetensors file", "pickle": "a pickle, as torch.save writes",
    "index": "the index of a sharded checkpoint",
}  # fmt: skip
LONGEST_HEADER = 100_000_000  # bytes; safetensors itself accepts no longer one
ZIP, TENSORFLOW = b"PK\x03\x04", bytes.fromhex("57fb808b247547db")  # the latter ends the index of a checkpoint
LEGACY = b"L119547037146038801333356L\n"  # how torch before 1.6 begins a file of protocol 0 or 1
MAGICS = (
    (b"version https://git-lfs", "a git-LFS pointer instead of the weights", "Fetch them with: git lfs pull"),
    (b"GGUF", "a GGUF file of llama.cpp", CONVERT),
    (b"\x93NUMPY", "an array of NumPy", CONVERT),
    (b"\x89HDF", "an HDF5 file, as Keras and TensorFlow write", CONVERT),
    (b"\x1f\x8b", "compressed with gzip", UNPACK),
    (b"BZh", "compressed with bzip2", UNPACK),
    (b"\xfd7zXZ", "compressed with xz", UNPACK),
    (b"\x28\xb5\x2f\xfd", "compressed with zstd", UNPACK),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", UNPACK),
    (b"Rar!", "a RAR archive", UNPACK),
    (b"\x89PNG", "a picture", WORKS),
    (b"\xff\xd8\xff", "a picture", WORKS),
    (b"%PDF", "a PDF document", WORKS),
)
TORCHSCRIPT = (
    "It holds a program, and no program in a file is run here. Save its weights in Python, "
    "torch.save(torch.jit.load(path).state_dict(), new), and give that file; OpenAI's published CLIP is there without "
    "a file: experts.base=openai."
)


class Ends(NamedTuple):
    """The first and last bytes of a file."""

    head: bytes
    tail: bytes
    size: int


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """What is wrong with a path becomes a UserError."""
    try:
        yield
    except FileNotFoundError:
        raise UserError(f"There is no checkpoint at {path}. Give the path of a safetensors file or a pickle.") from None
    except IsADirectoryError:
        held = sorted(each.name for each in path.iterdir() if each.is_file())
        names = f": it holds {', '.join(held[:5])}{', ...' if len(held) > 5 else ''}" if held else ", which has none"
        raise UserError(f"{path} is a folder. Give the path of the weight file inside it{names}.") from None
    except OSError as error:
        raise UserError(f"Cannot read {path}: {error.strerror or error}. Give a file that you may read.") from error


def kind_of(path: str | Path) -> Kind:
    """How a checkpoint is to be read: safetensors, pickle (torch's archives too), or the index of a sharded one.

    Raises UserError for a file that cannot be read, and for anything else, naming what it is.
    """
    path = Path(path)
    with reading(path):
        ends = _ends(path)
        if ends.head.startswith(ZIP):
            return _zip_kind(path)
        if is_safetensors(ends.head):
            return "safetensors"
        if is_pickle(ends):
            return "pickle"
        if ends.head.lstrip()[:1] == b"{" and ends.size <= LONGEST_HEADER and _is_index(path):
            return "index"
        _refuse(path, ends)


def expect(path: Path, wanted: Kind) -> None:
    """Raises UserError, saying what the file is, unless it is of this kind."""
    if (kind := kind_of(path)) != wanted:
        raise UserError(f"{path} is {NAMES[kind]}, not {NAMES[wanted]}. Open it as what it is.")


def _ends(path: Path) -> Ends:
    with path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - len(TENSORFLOW)))
        tail = file.read()
        file.seek(0)
        return Ends(file.read(4096), tail, size)


def is_safetensors(head: bytes) -> bool:
    """The length of a header, then a JSON mapping."""
    return len(head) > 8 and head[8:9] == b"{" and struct.unpack("<Q", head[:8])[0] <= LONGEST_HEADER


def is_pickle(ends: Ends) -> bool:
    """Protocol 2 and later begin with their number; 0 and 1 with what puts down a mapping, a name or a number."""
    head = ends.head
    if head[:1] == b"\x80":
        return head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05")
    return head.startswith(LEGACY) or (head[:1] in (b"(", b"c", b"}", b"]", b"L") and ends.tail[-1:] == b".")


def _refuse(path: Path, ends: Ends) -> NoReturn:
    head, tail, size = ends
    text = head.lstrip().lower()
    if not size:
        raise UserError(f"{path} is empty (0 bytes). Copy or download it again.")
    for magic, what, advice in MAGICS:
        if head.startswith(magic):
            raise UserError(f"{path} is {what}. {advice}")
    if text.startswith((b"<!doctype", b"<html", b"<?xml")):
        raise UserError(
            f"{path} is a web page instead of the weights. Open the link in a browser: it may need a login."
        )
    if head[257:262] == b"ustar":
        raise UserError(f"{path} is a tar archive. {UNPACK}")
    if tail == TENSORFLOW:
        raise UserError(f"{path} is the index of a TensorFlow checkpoint. {CONVERT}")
    if head[0] in (*range(0x81, 0x90), 0xDE, 0xDF) and b"params" in head:
        raise UserError(f"{path} holds weights in msgpack, as Flax writes them. {CONVERT}")
    if (written := _text(head)) is not None:
        what = "JSON, such as a configuration" if text[:1] in (b"{", b"[") else f"text that begins with {written!r}"
        raise UserError(f"{path} is {what}, not weights. {WORKS}")
    raise UserError(
        f"{path} is of no kind that is known here: it begins with {head[:8]!r}, as no checkpoint does. {WORKS}"
    )


def _text(head: bytes) -> str | None:
    """The first words of a text, None for what is none."""
    text = head.decode("utf-8", errors="ignore")
    whole = len(text.encode()) >= len(head) - 3 and all(each.isprintable() or each.isspace() for each in text)
    return " ".join(text.split())[:30] if whole else None


def _zip_kind(path: Path) -> Kind:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError, struct.error):
        return "pickle"  # whose reader says that it is damaged
    records = {name.partition("/")[2] for name in names}
    if "constants.pkl" in records or any(name.startswith("code/") for name in records):
        raise UserError(f"{path} is a TorchScript archive, as torch.jit.save writes. {TORCHSCRIPT}")
    if "data.pkl" in records:
        return "pickle"
    if names and all(name.endswith(".npy") for name in names):
        raise UserError(f"{path} is an archive of NumPy arrays (.npz). {CONVERT}")
    if "archive_format" in records:
        raise UserError(f"{path} is a program of torch.export. {CONVERT}")
    held = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    raise UserError(f"{path} is a zip archive with {held or 'nothing'} in it, not one of torch.save. {UNPACK}")


def _is_index(path: Path) -> bool:
    with contextlib.suppress(ValueError):
        stored = json.loads(path.read_bytes())
        return isinstance(stored, dict) and isinstance(stored.get("weight_map"), dict)
    return False
