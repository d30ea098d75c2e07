"""State of the Union addresses, one text file each, cut into sentences; and sentences with mistakes put in."""

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from typing import NamedTuple

NAME = re.compile(r"(\d{4})_\w+_\w+\.txt")
ABBREVIATION = re.compile(r"\b(Mr|Mrs|Dr|Gen|Messrs|St|No|Hon|Col|Capt|Jan|Feb|Mar|Apr|Aug|Sept|Oct|Nov|Dec|U\. ?S)\.")
END = re.compile(r"(?<=[.?!])\s+(?=[A-Z\"'])")
PREPOSITIONS = [
    "of",
    "in",
    "to",
    "for",
    "with",
    "on",
    "by",
    "from",
    "at",
    "into",
    "upon",
    "under",
    "against",
    "between",
]
PAIRS = ("is are", "was were", "has have", "this these", "that those", "been be", "its their")
EXCHANGED = {word: other for pair in PAIRS for word, other in (pair.split(), pair.split()[::-1])}
FUNCTION = {*PREPOSITIONS, *EXCHANGED, "the", "a", "an", "and"}


class Speech(NamedTuple):
    """An address."""

    name: str
    year: int
    sentences: list[str]


def read_speeches(folder: Path) -> list[Speech]:
    """Those of a folder of `<year>_<president>_<party>.txt`, in the order of their names."""
    found = [(path, match) for path in sorted(folder.glob("*.txt")) if (match := NAME.fullmatch(path.name))]
    return [Speech(path.stem, int(match[1]), sentences(path.read_text("utf-8"))) for path, match in found]


def sentences(text: str) -> list[str]:
    """A text in sentences; the full stops of abbreviations are removed."""
    plain = ABBREVIATION.sub(r"\1", " ".join(text.split()))
    return [sentence.strip() for sentence in END.split(plain)]


def corrupted(sentence: str, times: int, random: Random) -> str:
    """The sentence with mistakes put in, one after the other, each of a random kind that fits."""
    words, end = sentence[:-1].split(" "), sentence[-1]
    for _ in range(times):
        for mistake in random.sample(MISTAKES, len(MISTAKES)):
            changed = mistake(words, random)
            if changed is not None:
                words = changed
                break
    return " ".join(words) + end


def _places(words: Sequence[str], fits: Callable[[int], bool]) -> list[int]:
    """Positions between the first word and the last one."""
    return [place for place in range(1, len(words) - 1) if fits(place)]


def _swap(words: list[str], random: Random) -> list[str] | None:
    """Two neighbours in each other's place."""
    plain = lambda word: word.isalpha() and word.islower()  # noqa: E731
    places = _places(words, lambda i: plain(words[i]) and plain(words[i + 1]) and words[i] != words[i + 1])
    if not places:
        return None
    i = random.choice(places)
    return [*words[:i], words[i + 1], words[i], *words[i + 2 :]]


def _drop(words: list[str], random: Random) -> list[str] | None:
    """A function word left out."""
    places = _places(words, lambda i: words[i] in FUNCTION)
    if not places:
        return None
    i = random.choice(places)
    return [*words[:i], *words[i + 1 :]]


def _disagree(words: list[str], random: Random) -> list[str] | None:
    """Singular for plural, or the other way."""
    places = _places(words, lambda i: words[i] in EXCHANGED)
    if not places:
        return None
    i = random.choice(places)
    return [*words[:i], EXCHANGED[words[i]], *words[i + 1 :]]


def _preposition(words: list[str], random: Random) -> list[str] | None:
    """Another preposition."""
    places = _places(words, lambda i: words[i] in PREPOSITIONS)
    if not places:
        return None
    i = random.choice(places)
    return [*words[:i], random.choice([word for word in PREPOSITIONS if word != words[i]]), *words[i + 1 :]]


def _repeat(words: list[str], random: Random) -> list[str] | None:
    """A function word once more, elsewhere."""
    places = _places(words, lambda i: words[i] in FUNCTION)
    if not places:
        return None
    word, to = words[random.choice(places)], random.randrange(1, len(words) - 1)
    return None if word in words[to - 1 : to + 1] else [*words[:to], word, *words[to:]]


MISTAKES = (_swap, _drop, _disagree, _preposition, _repeat)
