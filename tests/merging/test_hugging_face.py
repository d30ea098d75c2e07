"""Backbones of transformers: what heads read, what goes in, and how a model is rebuilt from its facts."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from samples import drawn
from tiny_models import MODELS, backbone
from torch import nn

from merging import UserError, load, merge
from merging.backbones.base import from_facts
from merging.backbones.hugging_face import HuggingFace, head_of, read
from merging.methods import FfnOracle, Ties, Twin
from tasks.heads.head import check_class_order, class_names

transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()
IDS = torch.tensor([[5, 6, 7, 8, 9, 2], [3, 4, 2, 0, 0, 0]])
MASK = (IDS != 0).long()
PIXELS = torch.arange(2 * 3 * 8 * 8).remainder(256).view(2, 3, 8, 8).to(torch.uint8)
IMAGES, TEXTS = {"pixel_values": PIXELS / 127.5 - 1}, {"input_ids": IDS, "attention_mask": MASK}
HEADS = [  # class, what its head reads, the module of the head
    ("ViTForImageClassification", "first", "classifier", IMAGES),
    ("BertForSequenceClassification", "pooled", "classifier", TEXTS),
    ("RobertaForSequenceClassification", "first", "classifier", TEXTS),
    ("GPT2ForSequenceClassification", "last", "score", TEXTS),
    ("LlamaForSequenceClassification", "last", "score", TEXTS),
]


@pytest.mark.parametrize(("name", "readout", "head", "inputs"), HEADS)
def test_a_head_on_the_features_answers_as_the_whole_model(name, readout, head, inputs):
    tiny = backbone(name, readout)
    torch.manual_seed(0)
    whole, body = tiny._built().eval(), tiny.build()
    missing = body.load_state_dict(whole.state_dict(), strict=False)
    assert not missing.missing_keys and set(missing.unexpected_keys) == set(tiny.head_keys(whole.state_dict()))
    features = tiny.features(body, tiny.prepare(inputs))
    assert features.shape == (2, 8)
    module = getattr(whole, head)
    logits = module(features[:, None]) if name.startswith("Roberta") else module(features)
    torch.testing.assert_close(logits, tiny.outputs(whole, inputs), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("name", "attribute", "inputs", "width"),
    [
        ("CLIPVisionModelWithProjection", "image_embeds", IMAGES, 6),
        ("CLIPTextModelWithProjection", "text_embeds", TEXTS, 6),
        ("CLIPVisionModel", "pooler_output", IMAGES, 8),
        ("RobertaModel", "pooler_output", TEXTS, 8),
    ],
)
def test_pooled_features_are_the_model_s(name, attribute, inputs, width):
    tiny = backbone(name)
    model = tiny.build()
    assert tiny.features(model, inputs).shape == (2, width)
    assert torch.equal(tiny.features(model, inputs), model(**inputs)[attribute])


def test_readouts_leave_padding_out_on_either_side():
    hidden = drawn(2, 5, 3)
    right, left = torch.tensor([[1, 1, 1, 0, 0], [1] * 5]), torch.tensor([[0, 0, 1, 1, 1], [1] * 5])
    for mask, span in ((right, slice(0, 3)), (left, slice(2, 5))):
        tokens = hidden[0, span]
        for readout, expected in {"first": tokens[0], "last": tokens[-1], "mean": tokens.mean(0)}.items():
            features = read(hidden, readout, mask)
            torch.testing.assert_close(features[0], expected)
            torch.testing.assert_close(features[1:], read(hidden[1:], readout, None))


def test_what_is_prepared():
    tiny = backbone("RobertaForSequenceClassification", "first")
    torch.testing.assert_close(tiny.prepare(PIXELS)["pixel_values"], IMAGES["pixel_values"], atol=1e-6, rtol=0)
    assert torch.equal(tiny.prepare(IMAGES["pixel_values"])["pixel_values"], IMAGES["pixel_values"])
    assert tiny.prepare(IDS).keys() == {"input_ids"} and tiny.prepare(TEXTS) == TEXTS
    with pytest.raises(UserError, match=r"tiny is given texts and has no tokenizer. Set backbone.tokenizer"):
        tiny.prepare(["a text"])
    with pytest.raises(UserError, match=r"tiny is given a float. It takes uint8 images"):
        tiny.prepare(1.5)


@pytest.fixture
def tokenizer(tmp_path):
    """A folder with the vocabulary of BERT's kind."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "cat", "dog", "sat"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer"}))
    transformers.BertTokenizer(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path)
    return tmp_path


def test_texts_and_pairs_are_padded_and_cut(tokenizer):
    tiny = backbone("BertForSequenceClassification", tokenizer=str(tokenizer), length=7)
    inputs = tiny.prepare(["a cat", "a dog sat a dog sat"])
    assert inputs["attention_mask"].sum(1).tolist() == [4, 7]
    pairs = tiny.prepare([("a cat", "dog"), ("a", "dog sat")])
    assert pairs["token_type_ids"].sum(1).tolist() == [2, 3]
    assert tiny.features(tiny.build(), inputs).shape == (2, 8)
    other = backbone("BertForSequenceClassification", tokenizer=str(tokenizer), length=6)
    moved = shutil.copytree(tokenizer, tokenizer.with_name("moved"))
    again = backbone("BertForSequenceClassification", tokenizer=str(moved), length=7)
    assert tiny.identity() == again.identity() != other.identity()
    with pytest.raises(UserError, match=r"backbone.tokenizer=.*nowhere holds none that transformers reads"):
        backbone("BertForSequenceClassification", tokenizer=str(tokenizer / "nowhere")).prepare(["a cat"])


@pytest.mark.parametrize("name", ["ViTForImageClassification", "RobertaForSequenceClassification", "T5EncoderModel"])
def test_facts_rebuild_the_model(name):
    tiny = backbone(name, "mean")
    again = from_facts(json.loads(json.dumps(tiny.facts())))
    model, other = tiny.build(), again.build()
    other.load_state_dict(model.state_dict())
    inputs = tiny.prepare(tiny.example(2))
    assert torch.equal(tiny.features(model, inputs), again.features(other, inputs))
    with pytest.raises(UserError, match=r"no family timm of backbones. There are open_clip, hugging_face"):
        from_facts({"family": "timm"})


@pytest.mark.parametrize("name", MODELS)
def test_blocks_and_work(name):
    """Multiply-accumulates are at least those of one token through every matrix of the blocks."""
    tiny = backbone(name, "first")
    model = tiny.build()
    blocks = tiny.blocks(model)
    assert len(blocks) == (4 if name in ("T5ForConditionalGeneration", "T5ForSequenceClassification") else 2)
    assert all(any(block in each for each in model.modules() if isinstance(each, nn.ModuleList)) for block in blocks)
    matrices = [
        key for key, tensor in model.named_parameters() if tensor.ndim == 2 and tiny.param(key).depth is not None
    ]
    linear = sum(model.get_parameter(key).numel() for key in matrices if tiny.param(key).kind != "embedding")
    assert tiny.macs > linear


def test_bad_input():
    with pytest.raises(UserError, match=r"readout=sum is unknown. Choose one of pooled, first, mean, last"):
        backbone("RobertaModel", "sum")
    with pytest.raises(UserError, match=r"GPT2LMHeadModel gives nothing that backbone.readout=mean reads"):
        tiny = backbone("GPT2LMHeadModel", "mean")
        tiny.features(tiny.build(), TEXTS)
    with pytest.raises(UserError, match=r"RobertaForSequenceClassification gives nothing that .*readout=pooled reads"):
        tiny = backbone("RobertaForSequenceClassification")
        tiny.features(tiny.build(), TEXTS)
    with pytest.raises(UserError, match=r"backbone.model=RobertaForEverything is no class of transformers"):
        HuggingFace("x", "RobertaForEverything", {"model_type": "roberta"}).build()
    with pytest.raises(UserError, match=r"backbone.config names no model_type"):
        HuggingFace("x", "RobertaModel", {}).build()
    with pytest.raises(UserError, match=r"no table of the parameters of albert, .*There are some for bert, clip"):
        HuggingFace("x", "AlbertModel", {"model_type": "albert"}).param("embeddings.weight")


@pytest.mark.parametrize(
    ("name", "numbers", "tokens", "giga_macs"),
    [
        ("vit_b16", 85_798_656, 197, 17.56),
        ("roberta_base", 124_645_632 - 590_592, 128, 11.17),
    ],  # its pooler is not used
)
def test_the_files_of_conf_are_the_published_models(name, numbers, tokens, giga_macs):
    """Parameters as published, without heads; multiply-accumulates against a count by hand."""
    facts = yaml.safe_load((Path(__file__).parents[2] / f"conf/backbone/{name}.yaml").read_text())
    built = HuggingFace(**{key: value for key, value in facts.items() if key != "_target_"})
    with torch.device("meta"):
        assert sum(tensor.numel() for tensor in built.build().parameters()) == numbers
    by_hand = 12 * (tokens * 12 * 768**2 + 2 * tokens**2 * 768) + (196 * 768**2 if name == "vit_b16" else 0)
    assert built.tokens == tokens and built.macs == by_hand and round(by_hand / 1e9, 2) == giga_macs


@pytest.mark.parametrize(("name", "readout", "head", "inputs"), HEADS)
def test_a_head_is_rebuilt_from_its_tensors(name, readout, head, inputs):
    """What an expert's file holds of it, behind any prefix, maps features to the whole model's answers."""
    tiny = backbone(name, readout)
    whole = tiny._built().eval()
    body = tiny.build()
    body.load_state_dict(whole.state_dict(), strict=False)
    state = {key: tensor for key, tensor in whole.state_dict().items() if key in tiny.head_keys(whole.state_dict())}
    logits = head_of(state)(tiny.features(body, inputs))
    torch.testing.assert_close(logits, tiny.outputs(whole, inputs), atol=1e-6, rtol=0)
    with pytest.raises(UserError, match=r"A head of the tensors score.first.weight, score.bias is not known"):
        head_of({"score.first.weight": drawn(2, 3), "score.bias": drawn(2)})


def test_classes_in_another_order_are_refused():
    names = class_names({"id2label": {"1": "dog", "0": "cat"}})
    assert names == ("cat", "dog") and class_names({"id2label": {0: "LABEL_0", 1: "LABEL_1"}}) == class_names({}) == ()
    check_class_order("pets", names, (), "b")
    with pytest.raises(UserError, match=r"pets: output 0 is cat, and in the head of b it is dog"):
        check_class_order("pets", names, ("dog", "cat"), "b")
    with pytest.raises(UserError, match=r"output 2 is nothing, and in the head of b it is fox"):
        check_class_order("pets", names, ("cat", "dog", "fox"), "b")


@pytest.mark.parametrize("method", [Ties(), Twin(keep=1.0), FfnOracle()], ids=lambda method: type(method).__name__)
def test_experts_with_heads_of_their_own_merge_and_load(method, tmp_path):
    """From random models to a loaded one: body and head answer as the whole model with folded weights."""
    sizes, config = {"a": 2, "b": 5, "c": 1}, MODELS["RobertaForSequenceClassification"]
    tiny = backbone("RobertaForSequenceClassification", "first")
    kinds = {task: HuggingFace(task, tiny.model, {**config, "num_labels": size}) for task, size in sizes.items()}
    whole = {task: kind._built().eval() for task, kind in kinds.items()}
    base = {f"roberta.{key}": drawn(*tensor.shape) for key, tensor in whole["a"].roberta.state_dict().items()}
    merged = merge(method, base, [model.state_dict() for model in whole.values()], list(sizes))
    loaded = load(merged.save(tmp_path / "merged.safetensors", backbone=tiny.facts()))
    for index, (task, model) in enumerate(whole.items()):
        gate = merged.one_hot(index) if merged.deltas else None
        features = tiny.features(loaded, TEXTS | ({} if gate is None else {"w": gate}))
        model.load_state_dict({**dict(merged.state(gate)), **merged.heads[task]})
        torch.testing.assert_close(head_of(merged.heads[task])(features), tiny.outputs(model, TEXTS), atol=1e-5, rtol=0)
