"""WordNet 3.0 as its database files hold it (wndb(5WN)): synsets, their hypernyms and what follows from these."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

FILES = {"n": "noun", "v": "verb", "a": "adj", "r": "adv"}
HYPERNYMS = ("@", "@i")  # pointers to a kind and, of an instance, to what it is one of
LEXNAMES = (  # lexnames(5WN): the lexicographer files by number
    *("adj.all", "adj.pert", "adv.all", "noun.Tops", "noun.act", "noun.animal"),
    *("noun.artifact", "noun.attribute", "noun.body", "noun.cognition", "noun.communication", "noun.event"),
    *("noun.feeling", "noun.food", "noun.group", "noun.location", "noun.motive", "noun.object"),
    *("noun.person", "noun.phenomenon", "noun.plant", "noun.possession", "noun.process", "noun.quantity"),
    *("noun.relation", "noun.shape", "noun.state", "noun.substance", "noun.time", "verb.body"),
    *("verb.change", "verb.cognition", "verb.communication", "verb.competition", "verb.consumption", "verb.contact"),
    *("verb.creation", "verb.emotion", "verb.motion", "verb.perception", "verb.possession", "verb.social"),
    *("verb.stative", "verb.weather", "adj.ppl"),
)


@dataclass(frozen=True)
class Synset:
    """One sense: its part of speech (n, v, a, r), lexicographer file, words, gloss and usage examples."""

    key: str  # part of speech and offset
    lexname: str
    words: tuple[str, ...]
    hypernyms: tuple[str, ...]  # keys
    gloss: str
    examples: tuple[str, ...]

    @property
    def pos(self) -> str:
        return self.key[0]

    @property
    def length(self) -> int:
        """Words of the gloss."""
        return len(self.gloss.split())


class WordNet:
    """Synsets by key, in the order of the files. folder: that of data.noun and its siblings, noun.exc included."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.synsets = {synset.key: synset for pos in FILES for synset in _synsets(folder, pos)}
        self.ancestors = lru_cache(None)(self._ancestors)
        self.depth = lru_cache(None)(self._depth)

    def _ancestors(self, key: str) -> dict[str, int]:
        """Keys above a synset, itself included, and the fewest steps to each."""
        steps, front = {key: 0}, [key]
        while front:
            front = [up for below in front for up in self.synsets[below].hypernyms if up not in steps]
            for up in front:
                steps.setdefault(up, 1 + min(steps[low] for low in steps if up in self.synsets[low].hypernyms))
        return steps

    def _depth(self, key: str) -> int:
        """Synsets on the longest path to the top."""
        return 1 + max((self.depth(up) for up in self.synsets[key].hypernyms), default=0)

    def similarity(self, first: str, second: str) -> float:
        """Wu and Palmer's, 1994: 2 depth(common) / (2 depth(common) + steps of both to it); 0 without a common one."""
        above, beside = self.ancestors(first), self.ancestors(second)
        common = above.keys() & beside.keys()
        if not common:
            return 0.0
        best = max(common, key=lambda key: (self.depth(key), -above[key] - beside[key], key))
        twice = 2 * self.depth(best)
        return twice / (twice + above[best] + beside[best])

    def inflections(self) -> dict[str, set[str]]:
        """Irregular forms of each word, from the exception lists."""
        forms: dict[str, set[str]] = {}
        for name in FILES.values():
            for line in (self.folder / f"{name}.exc").read_text("utf-8").splitlines():
                form, *words = line.split()
                for word in words:
                    forms.setdefault(word, set()).add(form)
        return forms


def _synsets(folder: Path, pos: str) -> Iterator[Synset]:
    """The lines of a data file: `offset file type words (word id)... pointers (name offset pos src)... | gloss`."""
    for line in (folder / f"data.{FILES[pos]}").read_text("utf-8", errors="replace").splitlines():
        if line.startswith(" "):  # the licence
            continue
        facts, _, text = line.partition(" | ")
        fields = facts.split(" ")
        count = int(fields[3], 16)
        words = tuple(re.sub(r"\(.*\)", "", word).replace("_", " ") for word in fields[4 : 4 + 2 * count : 2])
        first = 5 + 2 * count
        pointers = [fields[first + 4 * i : first + 4 * i + 3] for i in range(int(fields[first - 1]))]
        above = tuple(("a" if kind == "s" else kind) + to for name, to, kind in pointers if name in HYPERNYMS)
        gloss = text.partition('; "')[0].partition('"')[0].strip(" ;")
        examples = tuple(re.findall(r'"([^"]+)"', text))
        yield Synset(pos + fields[0], LEXNAMES[int(fields[1])], words, above, gloss, examples)
