"""Strict JSON whose errors, and whose values, are found by line and column."""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

TOKENS = re.compile(r'"(?:[^"\\]|\\.)*"(?P<key>\s*:)?|[{}\[\],]|NaN|-?Infinity', re.DOTALL)


class Damaged(ValueError):
    """What is wrong with a text, and where: (line, column) from 1 on, None where no place is to blame."""

    def __init__(self, said: str, place: tuple[int, int] | None = None):
        super().__init__(said)
        self.place = place

    def __str__(self) -> str:
        said = super().__str__()
        return said if self.place is None else f"line {self.place[0]} column {self.place[1]}: {said}"


def parse(content: bytes) -> Any:
    """The value. Raises Damaged for what is no UTF-8 or no JSON, for NaN and for infinities."""
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        said = f"byte 0x{content[error.start]:02x} is no UTF-8 text"
        raise Damaged(said, _place(content[: error.start].decode(), error.start)) from error
    try:
        return json.loads(text, parse_constant=_refuse)
    except json.JSONDecodeError as error:
        raise Damaged("the file is empty" if not text.strip() else error.msg, (error.lineno, error.colno)) from error
    except ValueError as error:
        found = next((each for each in TOKENS.finditer(text) if each.group() in ("NaN", "Infinity", "-Infinity")), None)
        raise Damaged(str(error), None if found is None else _place(text, found.start())) from error
    except RecursionError as error:
        raise Damaged("too many brackets inside each other") from error


def _refuse(constant: str) -> float:
    raise ValueError(f"{constant} is not a number a row may hold")


def place(text: str, keys: Sequence[str]) -> tuple[int, int] | None:
    """Where the key at the end of the path `keys` stands, or the last of them that is there; None for none."""
    for depth in range(len(keys), 0, -1):
        if (found := _keys(text).get(tuple(keys[:depth]))) is not None:
            return _place(text, found)
    return None


def _keys(text: str) -> Mapping[tuple[str, ...], int]:
    """The path of every key and where it starts; what lies in a list is left out."""
    found: dict[tuple[str, ...], int] = {}
    path: list[str | None] = []  # the key just read at each level; None in a list
    for token in TOKENS.finditer(text):
        mark = token.group()
        if mark in "{[":
            path.append("" if mark == "{" else None)
        elif mark in "}]":
            path = path[:-1]
        elif token["key"] and path and path[-1] is not None:
            path[-1] = json.loads(mark.rstrip(": \t\r\n"))
            if None not in path:
                found[tuple(each for each in path if each is not None)] = token.start()
    return found


def _place(text: str, position: int) -> tuple[int, int]:
    line = text.count("\n", 0, position) + 1
    return line, position - text.rfind("\n", 0, position)
