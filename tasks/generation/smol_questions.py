"""The four tasks of smol4: what a decoder is asked about WordNet and about speeches; docs/smol4.md describes them.

As in gloss8 every function gives the examples that may be drawn, each with its split. An example's text is the
question; where answers are to choose from, its pair are the choices and its label is the place of the right one.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from random import Random

from tasks.generation.smol4 import BETWEEN
from tasks.text.drawing import Example, Placed, plain, split_of, stream
from tasks.text.questions import SHORT, TOPICS, Glosses
from tasks.text.speeches import Speech
from tasks.text.wordnet import Synset

SIZES = {"train": 2000, "val": 300, "calibration": 128, "test": 400}
WRONG = 3  # choices beside the right one
DECADES = range(1790, 2030, 10)
APART = 40  # years between the right decade and a wrong one at least
WINDOW, SENTENCES, WINDOWS = 30, 4, 20  # words and sentences of a passage, passages of a speech
ORDERED = range(5, 10)  # words of a sentence that is put in order
SIMPLE = re.compile(r"[a-z]+( [a-z]+)?")  # one word or two, without capitals


def word(glosses: Glosses) -> Iterator[Placed]:
    """The word of a gloss among words of its lexicographer file."""
    random = stream("smol4", "word")
    asked = [synset for synset in glosses.usable if synset.length <= SHORT and synset.pos in "nv" and _simple(synset)]
    groups: dict[tuple[str, str], list[str]] = defaultdict(list)
    for synset in asked:
        groups[synset.lexname, glosses.split[synset.key]].append(synset.words[0])
    for synset in asked:
        right, split = synset.words[0], glosses.split[synset.key]
        others = [other for other in groups[synset.lexname, split] if other not in synset.words]
        if len(others) > 10 and plain(right)[: max(4, len(right) - 2)] not in plain(synset.gloss):
            yield _choice(split, synset.gloss, right, others, random)


def topic(glosses: Glosses) -> Iterator[Placed]:
    """The topic of a noun by its gloss: its lexicographer file, told as a word."""
    for synset in glosses.usable:
        if synset.lexname in TOPICS and synset.length <= SHORT:
            yield glosses.place(synset.key, synset.gloss, None, TOPICS.index(synset.lexname))


def decade(speeches: Iterable[Speech]) -> Iterator[Placed]:
    """The decade of a passage of 24 to 30 words, digits hidden, among decades far from one another."""
    random = stream("smol4", "decade")
    for speech in speeches:
        starts = list(range(0, max(1, len(speech.sentences) - SENTENCES), SENTENCES))
        random.shuffle(starts)
        right = speech.year // 10 * 10
        others = [f"{other}s" for other in DECADES if abs(other - right) >= APART]
        for start in starts[:WINDOWS]:
            words = " ".join(speech.sentences[start : start + SENTENCES]).split()[:WINDOW]
            if len(words) >= 24:
                text = re.sub(r"\d+", "0", " ".join(words))
                yield _choice(split_of(f"speech/{speech.name}"), text, f"{right}s", others, random)


def order(speeches: Iterable[Speech]) -> Iterator[Placed]:
    """A sentence of a few plain words, in small letters; asked are its words in alphabetical order."""
    for speech in speeches:
        for sentence in speech.sentences:
            words = sentence[:-1].lower().split()
            if sentence.endswith(".") and len(words) in ORDERED and all(map(str.isalpha, words)):
                yield Placed(split_of(f"speech/{speech.name}"), Example(" ".join(words), None, 0))


def _simple(synset: Synset) -> bool:
    return SIMPLE.fullmatch(synset.words[0]) is not None


def _choice(split: str, text: str, right: str, others: Sequence[str], random: Random) -> Placed:
    """A question with the right answer in a random place among others."""
    choices = random.sample(sorted(set(others) - {right}), WRONG)
    label = random.randrange(WRONG + 1)
    return Placed(split, Example(text, BETWEEN.join([*choices[:label], right, *choices[label:]]), label))
