"""What a command line that Hydra cannot read was meant to say, spelled so that a POSIX shell passes it on."""

import re
import shlex
from collections.abc import Sequence

from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException

OVERRIDE = re.compile(r"([+~]{0,2}[^=\s]+)=(.*)", re.DOTALL)
INNER = re.compile(r"(?<=[:\[,])\s*[^\s:\"'\[\]{},][^\"'\[\]{},]*")  # an unquoted text in a mapping or a list


def spelled(arguments: Sequence[str], program: str = "duet") -> str | None:
    """The nearest command that Hydra can read, with the reason. None where it reads this one, or nothing is near.

    A comma is explained unless the command is a sweep, in which it separates values.
    """
    known, strange = get_args_parser().parse_known_args(list(arguments))
    if dashed := [word for word in strange if OVERRIDE.fullmatch(word.lstrip("-"))]:
        fixed = [word.lstrip("-") if word in dashed else word for word in arguments]
        return f"Options have no dashes in front: {shlex.join([program, *fixed])}"
    flags = [word for word in arguments if word not in known.overrides]
    joined, fixed = _joined(known.overrides), []
    for word in joined:
        override = OVERRIDE.fullmatch(word)
        value = override and readable(override[2])
        if override is None or value is None:
            return None
        if not known.multirun and value == override[2] and _separates(value):
            return _alternatives(program, flags, joined, word, override)
        fixed.append(f"{override[1]}={value}")
    if fixed == known.overrides:
        return None
    changed = [word for word in joined if word not in fixed]
    why = f"{', '.join(changed)} needs quotes" if changed else "A space ends an option"
    return f"{why}. Write: {shlex.join([program, *flags, *fixed])}"


def _joined(words: Sequence[str]) -> list[str]:
    """Overrides that a shell has cut at spaces, in one piece again."""
    whole: list[str] = []
    for word in words:
        if whole and (OVERRIDE.fullmatch(word) is None or whole[-1].endswith(",")):
            tight = word.startswith(("=", ",")) or whole[-1].endswith(("=", ",")) or "=" not in whole[-1]
            whole[-1] += word if tight else f" {word}"
        else:
            whole.append(word)
    return whole


def readable(value: str) -> str | None:
    """The value with quotes around what Hydra cannot read as it stands; None where quotes do not help."""
    if _reads(value):
        return value
    if value.startswith(("[", "{")) and not value.startswith("{task}"):
        inner = INNER.sub(lambda text: text[0] if _reads(text[0]) else _quoted(text[0].strip()), value)
        return inner if _reads(inner) else None
    return None if value.startswith(('"', "'")) else _quoted(value)


def _reads(value: str) -> bool:
    try:
        OverridesParser.create().parse_override(f"x={value}")
    except HydraException:
        return False
    return True


def _separates(value: str) -> bool:
    return "," in value and OverridesParser.create().parse_override(f"x={value}").is_sweep_override()


def _alternatives(
    program: str, flags: Sequence[str], words: Sequence[str], ambiguous: str, parts: re.Match[str]
) -> str:
    def command(value: str, *more: str) -> str:
        fixed = (f"{parts[1]}={value}" if word == ambiguous else word for word in words)
        return shlex.join([program, *more, *flags, *fixed])

    return (
        f"{parts[1]} has a comma. As one text: {command(_quoted(parts[2]))} As a list: {command(f'[{parts[2]}]')} One "
        f"run for each: {command(parts[2], '-m')}"
    )


def _quoted(text: str) -> str:
    return QuotedString(text, Quote.double).with_quotes()
