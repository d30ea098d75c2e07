"""What a file is, by its content: endings are not believed, and what is no checkpoint is named for what it is."""

import contextlib
import json
import struct
import zipfile
from collections.abc import Callable, Iterator
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

    @property
    def text(self) -> str | None:
        """The beginning as text, None for what is none."""
        text = self.head.decode("utf-8", errors="ignore")
        whole = len(text.encode()) >= len(self.head) - 3 and all(
            letter.isprintable() or letter.isspace() for letter in text
        )
        return " ".join(text.split()) if whole else None


def begins(*magics: bytes) -> Callable[[Ends], bool]:
    """Whether a file begins with one of these, up to white space and case."""
    return lambda ends: ends.head.startswith(magics) or ends.head.lstrip().lower().startswith(magics)


FOREIGN: tuple[tuple[Callable[[Ends], object], str, str], ...] = (  # how it is told, what it is, what to do
    (lambda ends: not ends.size, "empty (0 bytes)", "Copy or download it again."),
    (begins(b"version https://git-lfs"), "a git-LFS pointer instead of the weights", "Fetch them with: git lfs pull"),
    (begins(b"GGUF"), "a GGUF file of llama.cpp", CONVERT),
    (begins(b"\x93NUMPY"), "an array of NumPy", CONVERT),
    (begins(b"\x89HDF"), "an HDF5 file, as Keras and TensorFlow write", CONVERT),
    (begins(b"\x1f\x8b"), "compressed with gzip", UNPACK),
    (begins(b"BZh"), "compressed with bzip2", UNPACK),
    (begins(b"\xfd7zXZ"), "compressed with xz", UNPACK),
    (begins(b"\x28\xb5\x2f\xfd"), "compressed with zstd", UNPACK),
    (begins(b"7z\xbc\xaf\x27\x1c"), "a 7z archive", UNPACK),
    (begins(b"Rar!"), "a RAR archive", UNPACK),
    (begins(b"\x89PNG", b"\xff\xd8\xff"), "a picture", WORKS),
    (begins(b"%PDF"), "a PDF document", WORKS),
    (begins(b"<!doctype", b"<html", b"<?xml"), "a web page instead of the weights", "Open the link in a browser: it "
     "may need a login."),
    (lambda ends: ends.head[257:262] == b"ustar", "a tar archive", UNPACK),
    (lambda ends: ends.tail == TENSORFLOW, "the index of a TensorFlow checkpoint", CONVERT),
    (lambda ends: ends.head[0] in (*range(0x81, 0x90), 0xDE, 0xDF) and b"params" in ends.head, "weights in msgpack, as "
     "Flax writes them", CONVERT),
    (lambda ends: (ends.text or "")[:1] in tuple("{["), "JSON, such as a configuration, not weights", WORKS),
    (lambda ends: ends.text, "text that begins with {text!r}, not weights", WORKS),
    (lambda _: True, "of no kind that is known here: it begins with {start!r}, as no checkpoint does", WORKS),
)  # fmt: skip
ARCHIVES: tuple[tuple[Callable[[set[str], list[str]], object], str, str], ...] = (  # from records and names of a zip
    (lambda records, _: "constants.pkl" in records or any(name.startswith("code/") for name in records),
     "a TorchScript archive, as torch.jit.save writes", TORCHSCRIPT),
    (lambda _, names: names and all(name.endswith(".npy") for name in names),
     "an archive of NumPy arrays (.npz)", CONVERT),
    (lambda records, _: "archive_format" in records, "a program of torch.export", CONVERT),
    (lambda records, _: "data.pkl" not in records, "a zip archive with {held} in it, not one of torch.save", UNPACK),
)  # fmt: skip


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """What is wrong with a path becomes a UserError."""
    try:
        yield
    except FileNotFoundError:
        raise UserError(f"There is no checkpoint at {path}. Give the path of a safetensors file or a pickle.") from None
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
        ends = _ends(path)
        if ends.head.startswith(ZIP):
            return _zip_kind(path)
        if is_safetensors(ends.head):
            return "safetensors"
        if is_pickle(ends):
            return "pickle"
        if ends.head.lstrip()[:1] == b"{" and ends.size <= LONGEST_HEADER and _is_index(path):
            return "index"
        what, advice = next((what, advice) for matches, what, advice in FOREIGN if matches(ends))
        _refuse(path, what.format(text=(ends.text or "")[:30], start=ends.head[:8]), advice)


def expect(path: Path, kind: Kind) -> None:
    """Raises UserError, saying what the file is, unless it is of this kind."""
    if (actual := kind_of(path)) != kind:
        _refuse(path, f"{NAMES[actual]}, not {NAMES[kind]}", "Open it as what it is.")


def _refuse(path: Path, what: str, advice: str) -> NoReturn:
    raise UserError(f"{path} is {what}. {advice}")


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


def _zip_kind(path: Path) -> Kind:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError, struct.error):
        return "pickle"  # whose reader says that it is damaged
    records = {name.partition("/")[2] for name in names}
    for matches, what, advice in ARCHIVES:
        if matches(records, names):
            held = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
            _refuse(path, what.format(held=held or "nothing"), advice)
    return "pickle"


def _is_index(path: Path) -> bool:
    with contextlib.suppress(ValueError):
        stored = json.loads(path.read_bytes())
        return isinstance(stored, dict) and isinstance(stored.get("weight_map"), dict)
    return False
