"""Local language models with other tokens than the base, scored: the base's tokens are kept, or all that fit."""

import pytest
import torch
from hf_folders import BERT, WORDS, written

from merging import UserError
from merging.backbones.hugging_face import HuggingFace
from tasks.suite import Suite
from tasks.task import array_task
from tasks.vision.folder import Folder

pytest.importorskip("transformers")
TABLE = "embeddings.word_embeddings.weight"
SUITE = Suite("text", (array_task("a", {}, None),))


@pytest.fixture
def folders(tmp_path):
    """A base with two rows of padding, and an expert with five tokens more; a backbone of the base's shape."""
    base = written(tmp_path / "base", 0, "BertModel", **BERT)
    words = [*WORDS, *"vwxyz"]
    expert = written(tmp_path / "a", 1, "BertModel", words=words, **BERT | {"vocab_size": len(words)})
    return base, expert, HuggingFace("tiny", "BertModel", {"model_type": "bert", **BERT}, "mean", str(base))


def opened(folders, cache, vocabulary):
    base, expert, backbone = folders
    return Folder(str(base), None, {"a": str(expert)}, vocabulary=vocabulary).open(SUITE, backbone, cache)


def test_the_tokens_of_the_base_are_kept(folders, cache):
    experts = opened(folders, cache, "base")
    assert experts.specs()[TABLE].shape == (12, 8)
    tau = experts.tau(TABLE)[0]
    assert tau[1 : len(WORDS)].any(1).all() and not tau[len(WORDS) :].any()
    assert torch.equal(experts.base(TABLE), experts.origin.tensor(TABLE))


def test_other_vocabularies_are_refused_with_what_to_do(folders, cache):
    with pytest.raises(UserError, match=r"a .* tables of 15 tokens and the base .* of 12\. .*vocabulary=base"):
        opened(folders, cache, "same")
    with pytest.raises(UserError, match=r"union makes embeddings\S+ a table of 15 tokens, and backbone=tiny has 12"):
        opened(folders, cache, "union")
