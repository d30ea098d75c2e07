"""Reads pickles without importing anything and without calling a function of the file.

A pickle is a program for a small stack machine, that of Python's own `pickle`. Here each of its instructions that would
look up a name, call something or set attributes is replaced: names stay names, calls are made for a short list of
constructors of ours, and everything else becomes an empty `Shell`, whatever its name is.
"""

import mmap
import pickle
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, BinaryIO, ClassVar

Constructor = Callable[..., object]
MAPPED = 4096  # bytes
Broken = pickle.UnpicklingError
PYTHON: Any = pickle._Unpickler  # type: ignore[attr-defined]  # the one in C cannot be changed instruction by instruction


class Unsupported(ValueError):
    """A pickle that is whole and holds something that is not read here."""


class Global(str):
    """The dotted name of what a pickle asks for. It is never looked up."""


@dataclass(eq=False, repr=False)
class Shell:
    """What stands for an object of an unknown class: its name, what it was made from, and its attributes.

    Items that a file puts into it, as into a list or a dict, are dropped.
    """

    name: str
    arguments: tuple = ()
    attributes: dict = field(default_factory=dict)

    def extend(self, items: Iterable) -> None: ...
    def append(self, item: object) -> None: ...


def _encode(text: str, encoding: str) -> bytes:
    """How protocol 2 stores bytes."""
    if encoding != "latin1":
        raise Unsupported(f"it stores bytes in the encoding {encoding!r}")
    return text.encode("latin1")


def _plain(keys: Iterable) -> None:
    """Raises ValueError for a key that may take for ever to hash: a deep tuple that holds itself many times."""
    scalars = (str, bytes, int, float, type(None), Shell)
    for key in keys:
        if not all(isinstance(part, scalars) for part in (key if isinstance(key, tuple) else (key,))):
            raise ValueError("it uses a key that is neither text nor a number")


def _items(items: Iterable = ()) -> set:
    _plain(items := list(items))
    return set(items)


def _pairs(items: Sequence) -> dict:
    """A dict from keys and values in turn."""
    _plain(items[::2])
    return dict(zip(items[::2], items[1::2], strict=True))


SAFE: Mapping[str, Constructor] = {
    "collections.OrderedDict": lambda pairs=(): _pairs([item for key, value in pairs for item in (key, value)]),
    "_codecs.encode": _encode,
    **{f"{module}.{name}": _items for module in ("builtins", "__builtin__") for name in ("set", "frozenset")},
}


class Machine(PYTHON):
    """Reads one pickle of a stream, which then stands behind it.

    constructors: what may be built besides `SAFE`, by the name in the pickle. persistent: what a persistent id is.
    `load` raises Broken, ValueError, TypeError, KeyError, IndexError, AttributeError, EOFError or struct.error for what
    is no pickle, or a damaged one.
    """

    def __init__(self, stream: BinaryIO, constructors: Mapping[str, Constructor], persistent: Constructor):
        super().__init__(stream, encoding="latin1")
        self.stream, self.constructors = stream, {**SAFE, **constructors}
        self.persistent_load = persistent

    def find_class(self, module: str, name: str) -> Any:
        return Global(f"{module}.{name}")

    def call(self, function: object, arguments: object) -> object:
        """What a constructor of ours makes, else a shell."""
        if not isinstance(arguments, tuple):
            raise ValueError("it calls something with arguments that are no tuple")
        if isinstance(function, Global) and function in self.constructors:
            return self.constructors[function](*arguments)
        return Shell(function if isinstance(function, Global) else type(function).__name__, arguments)

    def reduce(self) -> None:
        arguments, function = self.stack.pop(), self.stack.pop()
        self.append(self.call(function, arguments))

    def reduce_with_keywords(self) -> None:
        self.stack.pop()
        self.reduce()

    def _instantiate(self, function: object, arguments: list) -> None:
        """Of the instructions INST and OBJ."""
        self.append(self.call(function, tuple(arguments)))

    def build(self) -> None:
        """Attributes of anything but a shell, such as a dict, carry no weights."""
        state = self.stack.pop()
        if isinstance(shell := self.stack[-1], Shell):
            for part in state if isinstance(state, tuple) else (state,):
                shell.attributes.update(part if isinstance(part, dict) else {})

    def set_item(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self.fill([key, value])

    def fill(self, items: list) -> None:
        target, pairs = self.stack[-1], _pairs(items)
        if isinstance(target, dict):
            target.update(pairs)
        elif not isinstance(target, Shell):
            raise ValueError(f"it adds pairs to a {type(target).__name__}")

    def add_items(self) -> None:
        items, target = _items(self.pop_mark()), self.stack[-1]
        if isinstance(target, set):
            target.update(items)

    def window(self, size: int) -> None:
        """Many bytes of a mapped file as a window into it: memory does not hold a whole pickle."""
        inside_frame = self._unframer.current_frame
        if size < MAPPED or inside_frame or not isinstance(self.stream, mmap.mmap):
            return self.append(self.read(size))
        start = self.stream.tell()
        self.stream.seek(start + size)
        self.append(memoryview(self.stream)[start : start + size])

    dispatch: ClassVar[dict[int, Callable]] = {
        **PYTHON.dispatch,
        pickle.REDUCE[0]: reduce, pickle.NEWOBJ[0]: reduce, pickle.NEWOBJ_EX[0]: reduce_with_keywords,
        pickle.BUILD[0]: build, pickle.SETITEM[0]: set_item, pickle.ADDITEMS[0]: add_items,
        pickle.SETITEMS[0]: lambda self: self.fill(self.pop_mark()),
        pickle.DICT[0]: lambda self: self.append(_pairs(self.pop_mark())),
        pickle.FROZENSET[0]: lambda self: self.append(_items(self.pop_mark())),
        pickle.BINBYTES[0]: lambda self: self.window(*struct.unpack("<I", self.read(4))),
        pickle.BINBYTES8[0]: lambda self: self.window(*struct.unpack("<Q", self.read(8))),
    }  # fmt: skip
