"""smol4: stored prompts, how they were built, and what a decoder is told of them."""

import os
from itertools import combinations
from pathlib import Path

import pytest

from merging.errors import UserError
from tasks.generation.smol4 import DATA, PROMPTS, WRITTEN, alphabetical, build
from tasks.generation.smol_build import build as built
from tasks.generation.smol_questions import APART, BETWEEN, SIZES, decade, order, word
from tasks.split import SPLITS
from tasks.suite import Suite
from tasks.text import suite as gloss8
from tasks.text.drawing import SIZES as GLOSS8_SIZES
from tasks.text.drawing import plain
from tasks.text.questions import TOPICS, Glosses
from tasks.text.speeches import Speech, read_speeches
from tasks.text.wordnet import WordNet

SOURCES = os.environ.get("GLOSS8_SOURCES")  # folder of wordnet/ and speeches/, unpacked


@pytest.fixture(scope="module")
def suite() -> Suite:
    return build("smol4", list(PROMPTS), SIZES)


def questions(task, split):
    """Prompts without what is put around every one."""
    inputs = task.split(split).inputs
    texts = [item if isinstance(item, str) else item[0] for item in inputs]
    before, after = PROMPTS[task.name].split("{}")
    assert all(text.startswith(before) and text.endswith(after) for text in texts)
    return [text.removeprefix(before).removesuffix(after) for text in texts]


def answers(task, split):
    """Right ones."""
    split = task.split(split)
    return task.told(split.inputs, split.labels)[1]


def test_no_text_is_in_two_splits_of_any_task_of_gloss8_and_smol4(suite):
    other = gloss8.build("gloss8", list(gloss8.CLASSES), GLOSS8_SIZES)
    together = {}
    for name in SPLITS:
        texts = [text for task in suite.tasks for text in (*questions(task, name), *answers(task, name))]
        pairs = [
            item if isinstance(item, tuple) else (item,) for task in other.tasks for item in task.split(name).inputs
        ]
        texts += [text.partition(": ")[2] or text for pair in pairs for text in pair]
        together[name] = {plain(text) for text in texts if len(text.split()) > 4}
    for first, second in combinations(SPLITS, 2):
        assert not together[first] & together[second], (first, second)


def test_splits_have_their_sizes_and_right_answers_equal_shares(suite):
    for task in suite.tasks:
        for name in SPLITS:
            split = task.split(name)
            right = answers(task, name)
            assert len(split) == len(right) == SIZES[name]
            if task.name == "topic":
                assert {answer.strip() for answer in right} == {topic.removeprefix("noun.") for topic in TOPICS}
            if task.name == "order":
                assert [sorted(answer.split()) for answer in right] == [*map(str.split, questions(task, name))]
            if task.name in WRITTEN:
                continue
            assert split.labels.bincount().tolist() == [SIZES[name] // 4] * 4
            for (_, choices), answer in zip(split.inputs, right, strict=True):
                assert len(set(choices)) == 4 and answer in choices and all(one[0] == " " for one in choices)


def test_wrong_decades_are_far_from_the_right_one(suite):
    task = next(task for task in suite.tasks if task.name == "decade")
    split = task.split("test")
    for (_, choices), label in zip(split.inputs, split.labels.tolist(), strict=True):
        years = [int(choice.strip(" s")) for choice in choices]
        assert all(abs(year - years[label]) >= APART for place, year in enumerate(years) if place != label)


def test_the_data_of_both_suites_are_small():
    paths = [*gloss8.DATA.glob("*.parquet"), *DATA.glob("*.parquet")]
    assert len(paths) == 12 and sum(path.stat().st_size for path in paths) < 2_000_000
    assert "smol4" in (gloss8.DATA / "NOTICE").read_text("utf-8") and DATA.parent == gloss8.DATA


@pytest.mark.skipif(SOURCES is None, reason="GLOSS8_SOURCES names no folder with wordnet/ and speeches/")
def test_the_stored_prompts_are_what_the_sources_give():
    from pyarrow import parquet

    folder = Path(str(SOURCES))
    for task, splits in built(Glosses(WordNet(folder / "wordnet")), read_speeches(folder / "speeches")).items():
        stored = parquet.read_table(DATA / f"{task}.parquet").to_pylist()
        assert [tuple(row.values()) for row in stored] == [
            (name, *one) for name, some in splits.items() for one in some
        ]


ANIMALS = ("cat", "dog", "cow", "hen", "pig", "fox", "bat", "rat", "eel", "ant", "bee", "elk", "owl", "emu")
NOUNS = "00000001 05 n 01 animal 0 000 | a living organism that can move about\n" + "".join(
    f"{2 * i:08} 05 n 01 {name} 0 001 @ 00000001 n 0000 | a family of animals with habits of its own\n"
    f"{2 * i + 1:08} 05 n 01 {name}let 0 001 @ {2 * i:08} n 0000 | the young of some family of animals\n"
    for i, name in enumerate(ANIMALS, 1)
)


@pytest.fixture
def glosses(tmp_path) -> Glosses:
    for name in ("noun", "verb", "adj", "adv"):
        (tmp_path / f"data.{name}").write_text(NOUNS if name == "noun" else "")
        (tmp_path / f"{name}.exc").write_text("")
    return Glosses(WordNet(tmp_path))


def test_the_right_choice_is_the_word(glosses):
    words = [placed.example for placed in word(glosses)]
    assert words and all(example.pair.split(BETWEEN)[int(example.label)].isalpha() for example in words)


def test_sentences_of_a_few_plain_words_are_to_be_put_in_order():
    sentences = ["We ask for peace now.", "It was 1862, a hard year.", "No more.", "Do we want a war?"]
    (placed,) = order([Speech("a", 1862, sentences)])
    assert placed.example == ("we ask for peace now", None, 0)
    assert alphabetical(placed.example.text) == "ask for now peace we"


def test_a_speech_of_few_words_is_not_asked_about():
    long, short = (Speech(name, 1862, [" ".join(["word"] * count)] * 6) for name, count in (("a", 9), ("b", 2)))
    (placed,) = decade([long, short])
    assert placed.example.text.split() == ["word"] * 30 and "1860s" in placed.example.pair


def test_unknown_tasks_are_refused():
    with pytest.raises(UserError, match="no task 'words'"):
        build("smol4", ["words"], SIZES)
