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
FOREIGN = (  # how it begins, what it is, what to do
    ((b"version https://git-lfs",), "a git-LFS pointer instead of the weights", "Fetch them with: git lfs pull"),
    ((b"<!doctype", b"<html", b"<?xml"), "a web page instead of the weights", "Open the link: it may need a login."),
    ((b"GGUF",), "a GGUF file of llama.cpp", CONVERT),
    ((b"\x93NUMPY",), "an array of NumPy", CONVERT),
    ((b"\x89HDF",), "an HDF5 file, as Keras and TensorFlow write", CONVERT),
    ((b"\x1f\x8b",), "compressed with gzip", UNPACK),
    ((b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd"), "compressed with bzip2, xz or zstd", UNPACK),
    ((b"7z\xbc\xaf\x27\x1c", b"Rar!"), "a 7z or RAR archive", UNPACK),
    ((b"\x89PNG", b"\xff\xd8\xff", b"%PDF"), "a picture or a PDF document", WORKS),
    ((b"{", b"["), "JSON, such as a configuration, not weights", WORKS),
)
NAMES: dict[Kind, str] = {
    "safetensors": "a safetensors file", "pickle": "a pickle, as torch.save writes",
    "index": "the index of a sharded checkpoint",
}  # fmt: skip
LONGEST_HEADER = 100_000_000  # bytes; safetensors itself accepts no longer one
TENSORFLOW = bytes.fromhex("57fb808b247547db")  # ends the index of a checkpoint
LEGACY = b"L119547037146038801333356L\n"  # how torch before 1.6 begins a file of protocol 0 or 1
MSGPACK = (*range(0x81, 0x90), 0xDE, 0xDF)  # first bytes of a mapping
TORCHSCRIPT = (
    "It holds a program, and no program in a file is run here. Save its weights in Python, "
    "torch.save(torch.jit.load(path).state_dict(), new), and give that file; OpenAI's published CLIP is there without "
    "a file: experts.base=openai."
)


class Ends(NamedTuple):
    """The first and last bytes of a file."""

    head: bytes
    tail: bytes

    @property
    def text(self) -> str:
        """The beginning as text, empty for what is none."""
        text = self.head.decode("utf-8", errors="ignore")
        whole = len(text.encode()) >= len(self.head) - 3 and all(
            letter.isprintable() or letter.isspace() for letter in text
        )
        return " ".join(text.split()) if whole else ""


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """What is wrong with a path becomes a UserError."""
    try:
        yield
    except FileNotFoundError:
        remote = not path.is_absolute() and len(path.parts) == 2 and not path.suffix and not path.parent.exists()
        hint = f" A model of the Hub is copied first: hf download {path} --local-dir <folder>." if remote else ""
        raise UserError(
            f"There is no checkpoint at {path}. Give the path of a folder of Hugging Face, a safetensors file or a "
            f"pickle.{hint}"
        ) from None
    except IsADirectoryError:
        held = sorted(file.name for file in path.iterdir() if file.is_file())
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
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(max(0, size - 8))
            tail = file.read()
            file.seek(0)
            ends = Ends(file.read(4096), tail)
        if not size:
            _refuse(path, "empty (0 bytes)", "Copy or download it again.")
        if ends.head.startswith(b"PK\x03\x04"):
            return _zip_kind(path)
        if size > 8 and ends.head[8:9] == b"{" and struct.unpack("<Q", ends.head[:8])[0] <= LONGEST_HEADER:
            return "safetensors"
        if is_pickle(ends):
            return "pickle"
        if ends.text.startswith("{") and size <= LONGEST_HEADER and _is_index(path):
            return "index"
        _refuse(path, *foreign(ends))


def expect(path: Path, kind: Kind) -> None:
    """Raises UserError, saying what the file is, unless it is of this kind."""
    if (actual := kind_of(path)) != kind:
        _refuse(path, f"{NAMES[actual]}, not {NAMES[kind]}", "Open it as what it is.")


def _refuse(path: Path, what: str, advice: str) -> NoReturn:
    raise UserError(f"{path} is {what}. {advice}")


def is_pickle(ends: Ends) -> bool:
    """Protocol 2 and later begin with their number; 0 and 1 with what puts down a mapping, a name or a number."""
    head = ends.head
    if head[:1] == b"\x80":
        return head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05")
    return head.startswith(LEGACY) or (head[:1] in (b"(", b"c", b"}", b"]", b"L") and ends.tail[-1:] == b".")


def foreign(ends: Ends) -> tuple[str, str]:
    """What a file is that is no checkpoint, and what to do."""
    head = ends.head
    for magics, what, advice in FOREIGN:
        if head.startswith(magics) or head.lstrip().lower().startswith(magics):
            return what, advice
    if head[257:262] == b"ustar":
        return "a tar archive", UNPACK
    if ends.tail == TENSORFLOW:
        return "the index of a TensorFlow checkpoint", CONVERT
    if head[0] in MSGPACK and b"params" in head:
        return "weights in msgpack, as Flax writes them", CONVERT
    if ends.text:
        return f"text that begins with {ends.text[:30]!r}, not weights", WORKS
    return f"of no kind that is known here: it begins with {head[:8]!r}, as no checkpoint does", WORKS


def _zip_kind(path: Path) -> Kind:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError, struct.error):
        return "pickle"  # whose reader says that it is damaged
    records = {name.partition("/")[2] for name in names}
    if "constants.pkl" in records or any(name.startswith("code/") for name in records):
        _refuse(path, "a TorchScript archive, as torch.jit.save writes", TORCHSCRIPT)
    if names and all(name.endswith(".npy") for name in names):
        _refuse(path, "an archive of NumPy arrays (.npz)", CONVERT)
    if "data.pkl" not in records:
        inside = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
        _refuse(path, f"a zip archive with {inside or 'nothing'} in it, not one of torch.save", UNPACK)
    return "pickle"


def _is_index(path: Path) -> bool:
    with contextlib.suppress(ValueError):
        stored = json.loads(path.read_bytes())
        return isinstance(stored, dict) and isinstance(stored.get("weight_map"), dict)
    return False
