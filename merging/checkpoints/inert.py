"""Reads the opcodes of a pickle without obeying them: nothing is imported and no function of the file is called.

A pickle is a program for a small stack machine. This one knows the data types, a short list of constructors that it
builds itself (`SAFE`), and makes an empty `Shell` of everything else, whatever its name is.
"""

import mmap
import pickletools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import BinaryIO, NamedTuple

Constructor = Callable[..., object]
MAPPED = 4096  # bytes
LITERALS = {
    "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT", "STRING", "BINSTRING",
    "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES",
    "BINBYTES8", "BYTEARRAY8",
}  # fmt: skip
EMPTY: Mapping[str, Constructor] = {
    "NONE": lambda: None, "NEWTRUE": lambda: True, "NEWFALSE": lambda: False, "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple, "EMPTY_DICT": dict, "EMPTY_SET": set,
}  # fmt: skip
MARKED: Mapping[str, Constructor] = {
    "TUPLE": tuple, "LIST": list, "FROZENSET": lambda items: _items(items), "DICT": lambda items: _pairs(items),
}  # fmt: skip


class Unsupported(ValueError):
    """A pickle that is whole and holds something that is not read here."""


class Global(NamedTuple):
    """A name that a pickle asks for. It is never looked up."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(eq=False, repr=False)
class Shell:
    """What stands for an object of an unknown class: its name, what it was made from, and its attributes."""

    name: str
    arguments: tuple = ()
    attributes: dict = field(default_factory=dict)


def _encode(text: str, encoding: str) -> bytes:
    """How protocol 2 stores bytes."""
    if encoding != "latin1":
        raise Unsupported(f"it stores bytes in the encoding {encoding!r}")
    return text.encode("latin1")


def _plain(key: object) -> bool:
    """Whether a key is hashed in no time: a deep tuple that holds itself many times would take for ever."""
    scalars = (str, bytes, int, float, type(None), Global, Shell)
    return isinstance(key, scalars) or (isinstance(key, tuple) and all(isinstance(each, scalars) for each in key))


def _items(items: Iterable = ()) -> set:
    listed = list(items)
    if not all(map(_plain, listed)):
        raise ValueError("it makes a set of something that is neither text nor a number")
    return set(listed)


def _pairs(items: Sequence) -> dict:
    """A dict from keys and values in turn."""
    if not all(map(_plain, items[::2])):
        raise ValueError("it uses a key that is neither text nor a number")
    return dict(zip(items[::2], items[1::2], strict=True))


def _ordered(pairs: Iterable = ()) -> dict:
    return _pairs([item for key, value in pairs for item in (key, value)])


SAFE: Mapping[Global, Constructor] = {
    Global("collections", "OrderedDict"): _ordered,
    Global("_codecs", "encode"): _encode,
    **{Global(module, "set"): _items for module in ("builtins", "__builtin__")},
    **{Global(module, "frozenset"): _items for module in ("builtins", "__builtin__")},
}


def mapped(stream: BinaryIO, argument: object) -> object:
    """Many bytes that were just read from a mapped file as a window into it: memory does not hold a whole pickle."""
    if isinstance(argument, bytes) and len(argument) >= MAPPED and isinstance(stream, mmap.mmap):
        return memoryview(stream)[stream.tell() - len(argument) : stream.tell()]
    return argument


class Machine:
    """Runs pickles one after another; `replaced` are the names that became shells.

    constructors: what may be built besides `SAFE`, by the name in the pickle. persistent: what a persistent id is.
    """

    def __init__(self, constructors: Mapping[Global, Constructor], persistent: Constructor):
        self.constructors = {**SAFE, **constructors}
        self.persistent, self.replaced = persistent, set[str]()

    def run(self, stream: BinaryIO) -> object:
        """The object of the next pickle in the stream, which then stands behind it.

        Raises ValueError, TypeError, KeyError, IndexError or AttributeError for what is no pickle, or a broken one.
        """
        self.stack: list = []
        self.below: list[list] = []
        self.memo: dict[int, object] = {}
        for opcode, argument, _ in pickletools.genops(stream):
            if opcode.name == "STOP":
                return self.stack.pop()
            self.step(opcode.name, mapped(stream, argument))
        raise ValueError("it ends in the middle")

    def step(self, name: str, argument: object) -> None:
        if name in LITERALS:
            self.stack.append(argument)
        elif name in EMPTY:
            self.stack.append(EMPTY[name]())
        elif name in MARKED:
            items = self.since_mark()
            self.stack.append(MARKED[name](items))
        elif handler := getattr(self, f"do_{name}", None):
            handler(argument)
        elif name not in ("PROTO", "FRAME"):
            raise ValueError(f"it uses {name}, which no checkpoint needs")

    def since_mark(self) -> list:
        items, self.stack = self.stack, self.below.pop()
        return items

    def pop(self, count: int) -> list:
        """The topmost `count` objects, the deepest first."""
        if len(self.stack) < count:
            raise ValueError("it takes more than it has put down")
        taken = self.stack[len(self.stack) - count :]
        del self.stack[len(self.stack) - count :]
        return taken

    def call(self, function: object, arguments: object) -> object:
        """What a constructor of ours makes, else a shell."""
        if not isinstance(arguments, tuple):
            raise ValueError("it calls something with arguments that are no tuple")
        if isinstance(function, Global) and function in self.constructors:
            return self.constructors[function](*arguments)
        name = str(function) if isinstance(function, Global) else type(function).__name__
        self.replaced.add(name)
        return Shell(name, arguments)

    def do_MARK(self, _: object) -> None:
        self.below.append(self.stack)
        self.stack = []

    def do_POP(self, _: object) -> None:
        if self.stack:
            self.stack.pop()
        else:
            self.since_mark()

    def do_POP_MARK(self, _: object) -> None:
        self.since_mark()

    def do_DUP(self, _: object) -> None:
        self.stack.append(self.stack[-1])

    def do_TUPLE1(self, _: object) -> None:
        self.stack.append(tuple(self.pop(1)))

    def do_TUPLE2(self, _: object) -> None:
        self.stack.append(tuple(self.pop(2)))

    def do_TUPLE3(self, _: object) -> None:
        self.stack.append(tuple(self.pop(3)))

    def do_MEMOIZE(self, _: object) -> None:
        self.memo[len(self.memo)] = self.stack[-1]

    def do_PUT(self, index: int) -> None:
        self.memo[index] = self.stack[-1]

    def do_GET(self, index: int) -> None:
        self.stack.append(self.memo[index])

    do_BINPUT = do_LONG_BINPUT = do_PUT
    do_BINGET = do_LONG_BINGET = do_GET

    def do_GLOBAL(self, name: str) -> None:
        self.stack.append(Global(*name.split(" ", 1)))

    def do_STACK_GLOBAL(self, _: object) -> None:
        module, name = self.pop(2)
        if not isinstance(module, str) or not isinstance(name, str):
            raise ValueError("it asks for a name that is no text")
        self.stack.append(Global(module, name))

    def do_REDUCE(self, _: object) -> None:
        self.stack.append(self.call(*self.pop(2)))

    do_NEWOBJ = do_REDUCE

    def do_NEWOBJ_EX(self, _: object) -> None:
        function, arguments, _keywords = self.pop(3)
        self.stack.append(self.call(function, arguments))

    def do_INST(self, name: str) -> None:
        items = self.since_mark()
        self.stack.append(self.call(Global(*name.split(" ", 1)), tuple(items)))

    def do_OBJ(self, _: object) -> None:
        function, *arguments = self.since_mark()
        self.stack.append(self.call(function, tuple(arguments)))

    def do_BINPERSID(self, _: object) -> None:
        self.stack.append(self.persistent(*self.pop(1)))

    def do_BUILD(self, _: object) -> None:
        state = self.pop(1)[0]
        if isinstance(self.stack[-1], Shell):  # attributes of anything else, such as a dict, carry no weights
            for part in state if isinstance(state, tuple) else (state,):
                if isinstance(part, dict):
                    self.stack[-1].attributes.update(part)

    def fill(self, items: list) -> None:
        """Put items into the container below them; a shell takes none."""
        target = self.stack[-1]
        if isinstance(target, list):
            target.extend(items)
        elif isinstance(target, set):
            target.update(_items(items))
        elif not isinstance(target, Shell):
            raise ValueError(f"it adds items to a {type(target).__name__}")

    def fill_pairs(self, items: list) -> None:
        target, pairs = self.stack[-1], _pairs(items)
        if isinstance(target, dict):
            target.update(pairs)
        elif not isinstance(target, Shell):
            raise ValueError(f"it adds pairs to a {type(target).__name__}")

    def do_APPEND(self, _: object) -> None:
        self.fill(self.pop(1))

    def do_APPENDS(self, _: object) -> None:
        self.fill(self.since_mark())

    do_ADDITEMS = do_APPENDS

    def do_SETITEM(self, _: object) -> None:
        self.fill_pairs(self.pop(2))

    def do_SETITEMS(self, _: object) -> None:
        self.fill_pairs(self.since_mark())
