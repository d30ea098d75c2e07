"""How examples are divided into splits and drawn: by hashes and named random streams, so that they never change."""

import hashlib
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from random import Random
from typing import NamedTuple

SALT = "gloss8 1"
SIZES = {"train": 4000, "val": 300, "calibration": 256, "test": 800}
BELOW = {"train": 58, "val": 70, "calibration": 81, "test": 100}  # percentiles of the hash
FIRST = ("test", "calibration", "val", "train")  # a text of two splits stays in the first of these


class Example(NamedTuple):
    """One text, or two; the label is a class or a number."""

    text: str
    pair: str | None
    label: float


class Placed(NamedTuple):
    """An example and the split that it may be drawn for."""

    split: str
    example: Example


def number(text: str) -> int:
    """48 bits that depend on the text and on the salt alone."""
    return int(hashlib.sha256(f"{SALT}/{text}".encode()).hexdigest()[:12], 16)


def stream(*names: str) -> Random:
    """A random stream of that name."""
    return Random("/".join((SALT, *names)))


def split_of(source: str) -> str:
    """The split of a synset (by its gloss) or of a speech (by its name): the same in every task."""
    percentile = number(f"split/{source}") % 100
    return next(split for split, end in BELOW.items() if percentile < end)


def plain(text: str) -> str:
    """Lower case, letters, digits and spaces."""
    return re.sub(r"[^a-z0-9 ]", "", text.lower()).strip()


def draw(
    task: str, placed: Iterable[Placed], balanced: bool = True, sizes: Mapping[str, int] = SIZES
) -> dict[str, list[Example]]:
    """Examples of every split; of classes the same number while they last. No text is in two splits of a task."""
    pools = _disjoint(placed)
    return {split: _drawn(pools[split], sizes[split], stream(task, split), balanced) for split in sizes}


def _disjoint(placed: Iterable[Placed]) -> dict[str, list[Example]]:
    pools: dict[str, list[Example]] = defaultdict(list)
    for split, example in placed:
        pools[split].append(example)
    owner: dict[str, str] = {}
    kept = {}
    for split in FIRST:
        examples = sorted(pools[split], key=str)
        kept[split] = [
            some for some in examples if all(owner.setdefault(text, split) == split for text in _texts(some))
        ]
    return kept


def _texts(example: Example) -> list[str]:
    """What must not be in two splits: the texts of more than three words, without the word that they explain."""
    parts = [text for text in (example.text, example.pair) if text is not None and len(text.split()) > 3]
    return [plain(re.sub(r"^[^:]+: ", "", text)) for text in parts]


def _drawn(pool: list[Example], count: int, random: Random, balanced: bool) -> list[Example]:
    random.shuffle(pool)
    unique = {plain(f"{example.text} | {example.pair or ''}"): example for example in reversed(pool)}
    classes: dict[float, list[Example]] = defaultdict(list)
    for example in unique.values():
        classes[example.label if balanced else 0].append(example)
    longest = max(map(len, classes.values()), default=0)
    queues = [classes[label] for label in sorted(classes)]
    turns = [queue[turn] for turn in range(longest) for queue in queues if turn < len(queue)]
    chosen = turns[:count]
    random.shuffle(chosen)
    return chosen
