"""The eight tasks of gloss8: what is asked about glosses of WordNet and about speeches, and the answer.

Every function gives the examples that may be drawn, each with its split; docs/gloss8.md describes the tasks.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import mean, pstdev

from tasks.text.drawing import SIZES, Example, Placed, number, plain, split_of, stream
from tasks.text.speeches import Speech, corrupted
from tasks.text.wordnet import FILES, LEXNAMES, Synset, WordNet

TOPICS = sorted({name for name in LEXNAMES if name.startswith("noun.")} - {"noun.Tops", "noun.motive"})
SHORT, MIDDLE = 16, 18  # words of a gloss at most, where two texts are read
YEAR, SPAN = 1905, 65  # of the speeches: about the mean and the standard deviation
WINDOW, SENTENCES, WINDOWS = 30, 4, 40  # words and sentences of a passage, passages of a speech


@dataclass(frozen=True, eq=False)
class Glosses:
    """WordNet with the split of every synset, which its gloss decides."""

    wordnet: WordNet

    @cached_property
    def split(self) -> dict[str, str]:
        return {key: split_of(plain(synset.gloss)) for key, synset in self.wordnet.synsets.items()}

    @cached_property
    def usable(self) -> list[Synset]:
        """Synsets whose gloss has 4 to 40 words."""
        return [synset for synset in self.wordnet.synsets.values() if 4 <= synset.length <= 40]

    @cached_property
    def short(self) -> dict[str, Synset]:
        """Common nouns with a short gloss, for pairs."""
        nouns = (synset for synset in self.usable if synset.pos == "n" and synset.length <= SHORT)
        return {synset.key: synset for synset in nouns if not synset.words[0][0].isupper()}

    @cached_property
    def below(self) -> dict[str, list[str]]:
        """Usable nouns directly below each synset."""
        kinds: dict[str, list[str]] = defaultdict(list)
        for synset in self.usable:
            for up in synset.hypernyms if synset.pos == "n" else ():
                kinds[up].append(synset.key)
        return kinds

    def place(self, key: str, text: str, pair: str | None, label: float) -> Placed:
        return Placed(self.split[key], Example(text, pair, label))


def lexname(glosses: Glosses) -> Iterator[Placed]:
    """The topic of a noun by its gloss: its lexicographer file."""
    for synset in glosses.usable:
        if synset.lexname in TOPICS:
            yield glosses.place(synset.key, synset.gloss, None, TOPICS.index(synset.lexname))


def pos(glosses: Glosses) -> Iterator[Placed]:
    """The part of speech that a gloss explains."""
    for synset in glosses.usable:
        yield glosses.place(synset.key, synset.gloss, None, list(FILES).index(synset.pos))


def match(glosses: Glosses) -> Iterator[Placed]:
    """Whether a gloss explains the word; half of the wrong ones are of the word's own lexicographer file."""
    random = stream("match")
    groups: dict[tuple[str, str], list[Synset]] = defaultdict(list)
    for synset in glosses.usable:
        groups[synset.lexname, glosses.split[synset.key]].append(synset)
    for synset in sorted(glosses.usable, key=lambda synset: synset.key):
        word, split, other = synset.words[0], glosses.split[synset.key], synset
        if synset.pos not in "nv" or word[0].isupper() or any(letter.isdigit() for letter in word):
            continue
        right = number(f"match/{synset.key}") % 2
        if not right:
            own = random.random() < 0.5
            names = [name for name in LEXNAMES if name[0] == synset.pos and groups[name, split]]
            other = random.choice(groups[synset.lexname if own else random.choice(names), split])
            if word in other.words:
                continue
        stem = plain(word)[: max(4, len(plain(word)) - 2)]
        if stem not in plain(other.gloss):
            yield glosses.place(synset.key, word, other.gloss, right)


def hyper(glosses: Glosses) -> Iterator[Placed]:
    """Which of two nouns is a kind of the other (one or two steps up), or whether both are kinds of a third."""
    random, short, split = stream("hyper"), glosses.short, glosses.split
    for key, synset in short.items():
        near = lambda other: other in short and split[other] == split[key]  # noqa: B023, E731
        for up, steps in sorted(glosses.wordnet.ancestors(key).items()):
            if 1 <= steps <= 2 and near(up):
                turned = number(f"hyper/{key}/{up}") % 2
                texts = (_defined(short[up]), _defined(synset)) if turned else (_defined(synset), _defined(short[up]))
                yield glosses.place(key, *texts, turned)
        for up in synset.hypernyms:
            if siblings := [other for other in glosses.below[up] if other != key and near(other)]:
                yield glosses.place(key, _defined(synset), _defined(short[random.choice(siblings)]), 2)


def _defined(synset: Synset) -> str:
    return f"{synset.words[0]}: {synset.gloss}"


def sim(glosses: Glosses) -> list[Placed]:
    """How similar two nouns are (Wu and Palmer) by their glosses, with mean 0 and variance 1 on train.

    Three quarters of the pairs have a common synset within four steps; no sixth of the range holds more than a quarter.
    """
    random, placed = stream("sim"), []
    for split, size in SIZES.items():
        pool = [key for key in glosses.short if glosses.split[key] == split]
        near = {key: sorted(up for up, steps in glosses.wordnet.ancestors(key).items() if steps <= 4) for key in pool}
        inside: dict[str, list[str]] = defaultdict(list)
        for key, ups in near.items():
            for up in ups:
                inside[up].append(key)
        bins: dict[int, list[Placed]] = defaultdict(list)
        for _ in range(4 * size + 2000):
            key = random.choice(pool)
            other = random.choice(inside[random.choice(near[key])] if random.random() < 0.75 else pool)
            if key != other:
                value = glosses.wordnet.similarity(key, other)
                first, second = (glosses.short[name].gloss for name in (key, other))
                bins[min(5, int(6 * value))].append(glosses.place(key, first, second, value))
        placed += [some for group in bins.values() for some in group[: size // 4 + 60]]
    return _standardised(placed)


def _standardised(placed: Sequence[Placed]) -> list[Placed]:
    """Labels as differences from their mean on train, in their standard deviations there."""
    values = [example.label for split, example in placed if split == "train"]
    center, spread = mean(values), pstdev(values)
    scaled = lambda example: example._replace(label=round((example.label - center) / spread, 3))  # noqa: E731
    return [Placed(split, scaled(example)) for split, example in placed]


def sense(glosses: Glosses) -> Iterator[Placed]:
    """Whether a gloss is the meaning of a word in an example of its use.

    A third of the wrong ones are another sense of the word, the others any of the same part of speech.
    """
    random, fits = stream("sense"), {synset.key for synset in glosses.usable if synset.length <= MIDDLE}
    senses, group = defaultdict(list), defaultdict(list)
    for key in sorted(fits):
        synset = glosses.wordnet.synsets[key]
        group[synset.pos, glosses.split[key]].append(key)
        for word in synset.words:
            senses[word, synset.pos].append(key)
    for word, part, key, examples in _uses(glosses.wordnet, fits):
        example, split, other = examples[number(f"{word}/{key}") % len(examples)], glosses.split[key], key
        right = number(f"sense/{word}/{key}") % 2
        if len(example.split()) < 3:
            continue
        if not right:
            own = [some for some in senses[word, part] if some != key and glosses.split[some] == split]
            other = random.choice(own if own and random.random() < 0.34 else group[part, split])
        if right or other != key:
            yield glosses.place(key, f"{word}: {example}", glosses.wordnet.synsets[other].gloss, right)


def _uses(wordnet: WordNet, fits: set[str]) -> Iterator[tuple[str, str, str, list[str]]]:
    """Word, part of speech, synset and the examples that have the word, at most two synsets of a word."""
    irregular, uses = wordnet.inflections(), defaultdict(list)
    for key, synset in sorted(wordnet.synsets.items()):
        for word in synset.words:
            if word.isalpha() and word.islower() and len(word) > 2:
                forms = _forms(word) | irregular.get(word, set())
                examples = [text for text in synset.examples if forms & set(re.findall(r"[a-z']+", text.lower()))]
                if examples:
                    uses[word, synset.pos].append((key, examples))
    for (word, part), synsets in sorted(uses.items()):
        yield from ((word, part, key, examples) for key, examples in synsets[:2] if key in fits)


def _forms(word: str) -> set[str]:
    """Its regular inflections, and some that no word has."""
    endings = ("", "s", "es", "d", "ed", "ing", "er", "est")
    short = {word[:-1] + ending for ending in ("ing", "ies", "ied")}
    return {word + ending for ending in endings} | short | {word + word[-1] + ending for ending in ("ed", "ing")}


def accept(speeches: Iterable[Speech]) -> Iterator[Placed]:
    """Whether a sentence is as it was spoken, or has three mistakes in it; no sentence occurs in both forms."""
    random = stream("accept")
    for speech in speeches:
        for sentence in speech.sentences if speech.year >= 1860 else ():
            if not _whole(sentence) or number(f"use/{sentence}") % 3:
                continue
            intact = number(f"accept/{sentence}") % 2
            text = sentence if intact else corrupted(sentence, 3, random)
            if intact or plain(text) != plain(sentence):
                yield Placed(split_of(f"speech/{speech.name}"), Example(text, None, intact))


def _whole(sentence: str) -> bool:
    """A sentence of 5 to 26 words without signs, tables or headings."""
    if not 5 <= len(sentence.split()) <= 26 or re.search(r"[\[\]#$%*]|[A-Z]{4}", sentence):
        return False
    return sentence[0].isupper() and sentence[-1] in ".?!"


def era(speeches: Iterable[Speech]) -> Iterator[Placed]:
    """The year of a passage of 24 to 30 words whose digits are hidden, from 1905 in 65 years."""
    random = stream("era")
    for speech in speeches:
        starts = list(range(0, max(1, len(speech.sentences) - SENTENCES), SENTENCES))
        random.shuffle(starts)
        for start in starts[:WINDOWS]:
            words = " ".join(speech.sentences[start : start + SENTENCES]).split()[:WINDOW]
            if len(words) >= 24:
                text, year = re.sub(r"\d+", "0", " ".join(words)), round((speech.year - YEAR) / SPAN, 4)
                yield Placed(split_of(f"speech/{speech.name}"), Example(text, None, year))


OF_GLOSSES = (lexname, pos, match, hyper, sim, sense)
OF_SPEECHES = (accept, era)
