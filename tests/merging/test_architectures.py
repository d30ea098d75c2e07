"""The tables of parameters against the modules of transformers' own classes, in memory and as they are saved."""

import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from samples import BACKBONE
from tiny_models import GATED, HIDDEN, MODELS, backbone

from merging.backbones import base
from merging.backbones.base import table_for
from merging.backbones.hugging_face import HuggingFace

transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()
every = pytest.mark.parametrize("name", MODELS)


def built(name):
    """With its head, on the meta device."""
    with torch.device("meta"):
        return backbone(name)._built()


def check(module, param, hidden):
    """What the table says of every parameter against the module that owns it."""
    for key, tensor in module.named_parameters(remove_duplicate=False):
        info, name = param(key), key.rpartition(".")[2]
        owner = module.get_submodule(info.module)
        kind = type(owner).__name__
        assert getattr(owner, name) is tensor, key
        assert (info.kind == "norm") == ("Norm" in kind), key
        if isinstance(owner, torch.nn.Embedding | torch.nn.Conv2d):
            assert info.kind == "embedding" or info.tied, key
        matrix = tensor.ndim == 2 and not isinstance(owner, torch.nn.Embedding)
        assert info.transposed == ((kind == "Conv1D" and matrix) or name in ("proj", "text_projection")), key
        if info.block is not None:
            stack, _, index = info.block.rpartition(".")
            assert info.depth == int(index)
            assert module.get_submodule(stack)[info.depth] is module.get_submodule(info.block)
        if info.family == "ffn" or info.hidden_axis is not None:
            along = {axis for axis, size in enumerate(tensor.shape) if size == hidden}
            assert along == ({info.stored_axis} if info.stored_axis is not None else set()), key
        inside = re.search("attn|attention", info.module, re.IGNORECASE) is not None
        assert (info.family == "attention") == (inside and info.kind not in ("norm", "embedding")), key


@every
def test_every_parameter_is_what_its_module_makes_of_it(name):
    module = built(name)
    check(module, backbone(name).param, HIDDEN)
    assert table_for(None, list(module.state_dict())).name == backbone(name).table


@every
def test_heads_and_ties_are_those_of_the_class(name):
    """A head is what changes its shape with the number of labels; ties are those that transformers declares."""
    module, param = built(name), backbone(name).param
    with torch.device("meta"):
        more = HuggingFace("x", name, {**MODELS[name], "num_labels": 7})._built()
    owners = {key.partition(".")[0] for key, tensor in more.named_parameters()
              if tensor.shape != module.state_dict()[key].shape and "ForQuestion" not in name}  # fmt: skip
    owners |= {"qa_outputs"} if "ForQuestion" in name else set()  # two outputs, whatever the labels
    heads = backbone(name).head_keys(module.state_dict())
    assert {key.partition(".")[0] for key in heads} == owners
    assert bool(owners) == name.endswith(("Classification", "Answering"))
    tied = {key: param(key).tied for key in module.state_dict() if param(key).tied}
    declared = getattr(module, "_tied_weights_keys", None)
    assert not isinstance(declared, dict) or declared.items() <= tied.items()  # older versions list names alone


def test_open_clip_s_table_fits_its_modules():
    with torch.device("meta"):
        check(BACKBONE.build(), BACKBONE.param, 64)


@pytest.mark.parametrize("name", ["ViTForImageClassification", "BertForPreTraining", "T5ForConditionalGeneration"])
def test_names_in_files_are_known_too(name, tmp_path):
    """transformers saves some models under other names than they have in memory."""
    from safetensors import safe_open

    backbone(name)._built().save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    table = table_for(None, list(shapes))
    known = {key: tuple(tensor.shape) for key, tensor in built(name).named_parameters()}
    described = [sorted((str(table.param(key).kind), str(table.param(key).depth), shape) for key, shape in each.items())
                 for each in (shapes, known)]  # fmt: skip
    assert table.name == backbone(name).table and described[0] == described[1]


def test_gated_ffns_of_t5():
    with torch.device("meta"):
        module = HuggingFace("x", "T5ForConditionalGeneration", GATED)._built()
    kinds = {table_for("t5", ()).param(key).kind for key in module.state_dict()}
    assert {"ffn_gate", "ffn_up", "ffn_out"} <= kinds and "ffn_in" not in kinds


def test_the_guide_adds_an_architecture_in_two_files(tmp_path, monkeypatch):
    guide = (Path(__file__).parents[2] / "docs" / "adding-a-method.md").read_text("utf-8")
    added, config = re.findall(r"```yaml\n(.*?)```", guide.partition("# Adding an architecture")[2], re.DOTALL)[:2]
    shutil.copytree(base.ARCHITECTURES, tmp_path / "architectures")
    (tmp_path / "architectures" / "opt.yaml").write_text(added)
    monkeypatch.setattr(base, "ARCHITECTURES", tmp_path / "architectures")
    base.tables.cache_clear()
    facts = {key: value for key, value in yaml.safe_load(config).items() if key != "_target_"}
    small = {"hidden_size": 8, "ffn_dim": HIDDEN, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 30}
    facts["config"] |= {**small, "word_embed_proj_dim": 8, "max_position_embeddings": 40, "pad_token_id": 1}
    try:
        opt = HuggingFace(**facts | {"tokenizer": None, "length": 6})
        check(opt.build(), opt.param, HIDDEN)
        assert opt.table == "opt" and opt.head_keys(opt._built().state_dict()) == ("score.weight",)
        model = opt.build()
        assert opt.features(model, opt.prepare(opt.example(3))).shape == (3, 8) and len(opt.blocks(model)) == 2
    finally:
        base.tables.cache_clear()
