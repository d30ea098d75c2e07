"""Experts with other tokens than the base: refused, or aligned by the strings of their tokens."""

import importlib
from dataclasses import replace

import pytest
import torch
from hf_folders import WORDS, written

from merging import Experts, UserError, merge
from merging.checkpoints.opening import open_file
from merging.checkpoints.views import View
from merging.checkpoints.vocabulary import Aligned, is_table
from merging.methods import Dare, TaskArithmetic, Ties

TABLES = ("model.embed_tokens.weight", "lm_head.weight")


def folder(path, seed, *more, rows=None, words=WORDS):
    words = [*words, *more]
    return written(path / f"model{seed}", seed, words=words, vocab_size=rows or len(words))


def table(found, key, index):
    return found.tensor(key)[index]


@pytest.fixture
def unequal(tmp_path):
    """A base padded to 12 rows, an expert with tokens of its own, and one with others in another order."""
    first, second = folder(tmp_path, 1, "new", "other"), folder(tmp_path, 2, "third", "new", "x", "y")
    return folder(tmp_path, 0, rows=12), [first, second]


def test_the_default_names_sizes_and_the_option(unequal):
    base, (padded, larger) = unequal
    with pytest.raises(UserError, match=r"task0 .* tables of 14 tokens and the base .* of 12.*vocabulary=union"):
        Experts.open(base, [larger])
    Experts.open(base, [padded])  # its tokens lie in what pads the base's table
    with pytest.raises(UserError, match="vocabulary=all is unknown"):
        Experts.open(base, [padded], vocabulary="all")


def test_equal_sizes_with_other_tokens_are_refused(tmp_path):
    base = folder(tmp_path, 0)
    swapped = folder(tmp_path, 1, words=[*WORDS[:-2], WORDS[-1], WORDS[-2]])
    with pytest.raises(UserError, match=r"tokenizers differ: 'f' has the id 9 in task0 .* and 8 in the base"):
        Experts.open(base, [swapped])
    renamed = folder(tmp_path, 2, words=[*WORDS[:-1], "z"])
    with pytest.raises(UserError, match=r"the id 9 is 'z' in task0 .* and 'g' in the base"):
        Experts.open(base, [renamed])
    found = Experts.open(base, [swapped], vocabulary="base")
    stored = Experts.open(swapped, [swapped]).origin
    for key in TABLES:
        assert torch.equal(found.checkpoints[0].tensor(key)[[8, 9]], stored.tensor(key)[[9, 8]])
        assert torch.equal(found.checkpoints[0].tensor(key)[:8], stored.tensor(key)[:8])


def test_union(unequal):
    base, experts = unequal
    found = Experts.open(base, experts, vocabulary="union")
    own = [Experts.open(path, [path]).origin for path in (base, *experts)]
    # behind the ten words of the base: new, other (of the first), third, x, y (of the second)
    for key in TABLES:
        shape = found.specs()[key].shape
        assert shape[0] == 15
        origin, first, second = found.origin.tensor(key), *(each.tensor(key) for each in found.checkpoints)
        assert torch.equal(origin[:10], own[0].tensor(key)[:10])
        assert torch.equal(first[:12], own[1].tensor(key)[:12])
        assert torch.equal(second[[10, 12, 13, 14]], own[2].tensor(key)[[11, 10, 12, 13]])
        assert torch.equal(first[12:], origin[12:]) and torch.equal(second[11], origin[11])  # lacked: unchanged
        torch.testing.assert_close(origin[10], (own[1].tensor(key)[10] + own[2].tensor(key)[11]) / 2)
        assert torch.equal(origin[11], own[1].tensor(key)[11])
    inner = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(found.checkpoints[0].tensor(inner), own[1].tensor(inner))
    ids = [each.id for each in (found.origin, *found.checkpoints)]
    assert len({*ids, *(each.id for each in own)}) == 6


def test_base_leaves_padding_and_new_tokens_out(unequal):
    base, experts = unequal
    found = Experts.open(base, experts, vocabulary="base")
    origin = Experts.open(base, [base]).origin
    for key in TABLES:
        assert torch.equal(found.origin.tensor(key), origin.tensor(key))
        assert all(torch.equal(each.tensor(key)[10:], origin.tensor(key)[10:]) for each in found.checkpoints)
        assert all(not torch.equal(each.tensor(key)[:10], origin.tensor(key)[:10]) for each in found.checkpoints)


@pytest.mark.parametrize("method", [TaskArithmetic(0.3), Ties(), Dare(then=Ties())])
@pytest.mark.parametrize("vocabulary", ["base", "union"])
def test_tables_are_merged_and_saved_in_parts(vocabulary, method, unequal, tmp_path, monkeypatch):
    """No table of the common vocabulary is ever made whole; the merge is that of tables that are."""
    base, experts = unequal
    found = Experts.open(base, experts, vocabulary=vocabulary)
    states = [{key: each.tensor(key) for key in each.specs()} for each in (found.origin, *found.checkpoints)]
    sizes = {"BLOCK": 28, "SPAN": 14, "PIECE": 7, "KEPT": 0}  # in entries, of rows of eight
    for name in ("merged", "saving", "entries", "combined", "methods.dare", "checkpoints.tied"):
        module = importlib.import_module(f"merging.{name}")
        for size in sizes.keys() & vars(module).keys():
            monkeypatch.setattr(module, size, sizes[size])
    expected = method(Experts.open(states[0], states[1:]))
    whole = View.tensor
    monkeypatch.setattr(Aligned, "tensor", lambda *at: pytest.fail(at[1]) if is_table(at[1]) else whole(*at))
    folder = replace(method(found), inputs=found.inputs).save(f"{tmp_path}/merged/")
    stored = open_file(folder)
    assert all(torch.equal(stored.tensor(key), expected.static(key)) for key in expected.specs)


@pytest.mark.parametrize(("vocabulary", "rows"), [("base", 12), ("union", 15)])
def test_the_merged_folder_has_the_common_tokens(vocabulary, rows, unequal, tmp_path):
    transformers = pytest.importorskip("transformers")
    base, experts = unequal
    found = Experts.open(base, experts, ["a", "b"], vocabulary=vocabulary)
    merged = TaskArithmetic(0.3)(found)
    replace(merged, inputs=found.inputs).save(f"{tmp_path}/merged/")
    assert "vocab_size" not in (tmp_path / "merged" / "README.md").read_text()  # that of all is the common one's
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    words = transformers.AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert model.config.vocab_size == rows and model.lm_head.weight.shape[0] == rows
    expected = list(range(10, 15)) if vocabulary == "union" else [None] * 5
    assert words.convert_tokens_to_ids(["new", "other", "third", "x", "y"]) == expected
    assert words.convert_tokens_to_ids(list("abcdefg")) == list(range(3, 10))


def test_tables_without_a_tokenizer_cannot_be_aligned(tmp_path):
    base = written(tmp_path / "base", 0)
    bare = written(tmp_path / "bare", 1, words=(), vocab_size=14)
    with pytest.raises(UserError, match="has tables of 14 tokens and the base"):
        Experts.open(base, [bare])
    with pytest.raises(UserError, match="task0 has no tokenizer"):
        Experts.open(base, [bare], vocabulary="union")


def test_one_vocabulary_is_left_as_it_is(tmp_path):
    folders = [folder(tmp_path, seed) for seed in range(3)]
    found = Experts.open(folders[0], folders[1:], vocabulary="union")
    assert found.specs()[TABLES[0]].shape[0] == len(WORDS) and merge(TaskArithmetic(), folders[0], folders[1:])
    assert all(type(each).__name__ == "SafetensorsFile" for each in found.checkpoints)
