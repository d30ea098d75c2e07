"""Templates of parameter names: {i} is the index of a block, {w} weight or bias, {p} one of q, k and v."""

import re
from functools import cache

WILD = {"start": r"(?:.*\.)?", "i": r"\d+", "w": "weight|bias", "p": "[qkv]"}


@cache
def pattern(template: str) -> re.Pattern[str]:
    """What matches the names that a template stands for; {start} is whatever comes before."""
    literal, *rest = re.split(r"\{(\w+)\}", template)
    wild = (f"(?P<{name}>{WILD[name]}){re.escape(text)}" for name, text in zip(rest[::2], rest[1::2], strict=True))
    return re.compile(re.escape(literal) + "".join(wild))


def translated(name: str, template: str, other: str, **more: str) -> str | None:
    """A name of one template by another, with its further wild cards in `more`; None for what is not of the first."""
    match = pattern(template).fullmatch(name)
    return other.format(**match.groupdict(), **more) if match else None
