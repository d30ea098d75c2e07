"""A saved model gives the bits of the one that was scored, and refuses what it does not fit."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from samples import BACKBONE, applied, context, drawn, equal, family, opened, tower
from torch import nn

from merging import UserError, load, merge, open_merged
from merging.api import describe
from merging.backbones.open_clip import OpenClip
from merging.decompose.ranks import Ranks
from merging.fit.gates import Learned, TaskId
from merging.methods import Duet, Emr, RankOneMoe, Smile, TallMask, Ties, TSwitch, Twin, Wemoe
from merging.neurons import Neurons
from merging.routing.gates import GateShape
from merging.routing.install import install
from merging.routing.routed import Routed

DUET = Duet("all", Ranks("fraction", 0.5))
SHAPES = [
    GateShape(),
    GateShape(shared=True, temperature=0.5, top_k=2),
    GateShape(depth=2, features="mean", pool="after", activation="none"),
    GateShape(features="mean", granularity="token"),
    GateShape("early", features="cls", activation="sigmoid"),
    GateShape("pass", 3, "mean"),
    GateShape("pass", 3, granularity="batch"),
    GateShape("pass", features="mean_std_cls", after=1),
    GateShape("early", granularity="group", groups=3),
]
GATED = [
    *((DUET, shape) for shape in SHAPES),
    *((method, shape) for method in (Duet(), Duet(factors="svd"), Twin(), Wemoe()) for shape in SHAPES[::5]),
    *((method, SHAPES[5]) for method in (Twin(start=None), Twin(start=1), Twin(sparsify="dropout"))),
    (RankOneMoe(2), GateShape(activation="soft_top_k", top_k=3)),
]
UNGATED = [
    DUET,
    Duet(unit="block"),
    Duet(unit="model", ranks=Ranks("absolute", 4, task=3)),
    Twin(start=None),
    Wemoe(),
    Emr(),
    TallMask(),
    TSwitch(),
]
IDS = {"ids": lambda each: type(each).__name__ if hasattr(each, "needs") else "-".join(map(str, each.facts().values()))}


def images():
    return drawn(6, 3, 16, 16, seed=77)


def made(method, shape=None):
    """A merge, routed by itself where there is a shape of gates."""
    base, experts = family(3, tower(), size=0.25, spread=0.0625)
    for state in (base, *experts):
        del state["position_ids"]  # which the tower has not
    found = opened(base, experts, ["cars", "signs", "digits"])
    merged = applied(method, found)
    if shape is None:
        return merged
    return Learned("task_id", shape, TaskId(steps=5), "test").fit(merged, found, context(found))[0]


def answer(model, **weights):
    with torch.inference_mode():
        return model(images(), **weights)


def rewritten(path, change):
    """The file with what `change` makes of its tensors and its header."""
    with safe_open(path, "pt") as file:
        tensors, header = {key: file.get_tensor(key) for key in file.keys()}, dict(file.metadata())  # noqa: SIM118
    change(tensors, header)
    save_file(tensors, path, header)
    return path


class TestSameBits:
    @pytest.mark.parametrize(("method", "shape"), GATED, **IDS)
    def test_trained_gates(self, method, shape, tmp_path):
        merged = made(method, shape)
        model = load(merged.save(tmp_path / "merged.safetensors"), BACKBONE.build())
        assert isinstance(model, Routed) and not model.training
        assert torch.equal(answer(model), answer(install(BACKBONE.build(), merged)))
        assert model.gate is None or equal(model.gate.state_dict(), merged.routing.gates[0].state_dict())

    @pytest.mark.parametrize("method", UNGATED, **IDS)
    def test_weights_by_the_caller(self, method, tmp_path):
        merged = made(method)
        model = load(merged.save(tmp_path / "merged.safetensors"), BACKBONE.build())
        for w in (merged.one_hot(1), drawn(6, 3, seed=4)):
            assert torch.equal(answer(model, w=w), answer(install(BACKBONE.build(), merged), w=w))
        with pytest.raises(UserError, match="has no gate: give the gating weights"):
            model(images())

    @pytest.mark.parametrize("split_qkv", [True, False])
    def test_subspaces(self, split_qkv, tmp_path):
        merged = made(Smile(8, 2, 2, split_qkv))
        model = load(merged.save(tmp_path / "merged.safetensors"), BACKBONE.build())
        assert torch.equal(answer(model), answer(install(BACKBONE.build(), merged)))

    def test_at_the_scale_that_was_chosen(self, tmp_path):
        merged = made(Wemoe(), GateShape()).scaled(0.7)
        model = load(merged.save(tmp_path / "merged.safetensors"), BACKBONE.build())
        assert torch.equal(answer(model), answer(install(BACKBONE.build(), merged)))
        assert open_merged(tmp_path / "merged.safetensors").provenance["scale"] == 0.7

    @pytest.mark.parametrize("again", [False, True])
    def test_a_file_that_names_its_backbone_needs_no_module(self, again, tmp_path):
        merged = made(DUET, GateShape())
        path = merged.save(tmp_path / "merged.safetensors", backbone=BACKBONE.facts())
        if again:  # what was opened can be saved itself
            path = open_merged(path).save(tmp_path / "again.safetensors", backbone=BACKBONE.facts())
        assert torch.equal(answer(load(path)), answer(install(BACKBONE.build(), merged)))


def test_the_header_tells_every_knob(tmp_path):
    base, experts = family(2, tower())
    method = Duet(ranks=Ranks("absolute", 3), static=False, rest=Ties(0.1))
    told = open_merged(merge(method, base, experts).save(tmp_path / "merged.safetensors")).provenance["method"]
    assert told["name"] == "Duet" and told["rest"] == describe(Ties(0.1))
    assert {"name": "Ranks", "mode": "absolute", "value": 3}.items() <= told["ranks"].items()
    assert {"name": "Neurons", "ratio": Neurons().ratio}.items() <= told["neurons"].items()


@pytest.mark.parametrize(("method", "shape"), [*GATED, *((each, None) for each in [*UNGATED, Smile(8, 2)])])
def test_what_is_opened_is_what_was_saved(method, shape, tmp_path):
    merged = made(method, shape)
    found = open_merged(merged.save(tmp_path / "merged.safetensors"))
    assert found.tasks == merged.tasks == ("cars", "signs", "digits")
    assert replace(found.routing, gates=None) == replace(merged.routing, gates=None)
    assert found.routing.adaptation == (None if shape is None else "test")
    assert found.deltas.keys() == merged.deltas.keys() and found.parts == merged.parts
    for key, delta in merged.deltas.items():
        assert found.deltas[key].facts() == delta.facts()
        assert equal(dict(found.deltas[key].named_buffers()), dict(delta.named_buffers()))
    w = drawn(merged.parts, seed=4)
    assert equal(dict(found.state(w)), dict(merged.state(w)))
    assert (found.params, found.stored_bytes) == (merged.params, merged.stored_bytes)
    gates = (each.routing.gates for each in (found, merged))
    assert shape is None or equal(*(each.state_dict() for each in gates))


def test_batch_norm_is_saved_with_what_it_has_seen(tmp_path):
    merged = made(Twin(), GateShape("pass", 3, "mean"))
    found = open_merged(merged.save(tmp_path / "merged.safetensors")).routing.gates[0]
    norm = found.net[1]
    assert int(norm.num_batches_tracked) == 5 and float(norm.running_mean.abs().max()) > 1e-3
    assert not any(module.training for module in found.modules())
    assert not any(parameter.requires_grad for parameter in found.parameters())


def test_a_loaded_model_does_not_hang_on_its_file(tmp_path):
    path = made(DUET, GateShape()).save(tmp_path / "merged.safetensors")
    model, before = load(path, BACKBONE.build()), path.read_bytes()
    expected = answer(model)
    path.write_bytes(bytes(len(before)))
    assert torch.equal(answer(model), expected)


class TestWrongBackbone:
    @pytest.fixture
    def path(self, tmp_path):
        return made(DUET, GateShape()).save(tmp_path / "merged.safetensors")

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"width": 24}, r"visual.class_embedding is \(16,\) in the file and \(24,\) in the module"),
            ({"layers": 3}, r"it lacks visual.transformer.resblocks.2.attn.in_proj_bias, .* and 9 more"),
            ({"layers": 1}, r"it has the unknown visual.transformer.resblocks.1.attn.in_proj_bias, .* and 9 more"),
            ({"image_size": 32}, r"visual.positional_embedding is \(5, 16\) in the file and \(17, 16\)"),
        ],
    )
    def test_another_shape(self, path, change, message):
        other = OpenClip("other", 8, {**BACKBONE.vision_cfg, **change}).build()
        with pytest.raises(
            UserError, match=rf"does not fit ImageTower: {message}.*Pass the backbone it was merged for"
        ):
            load(path, other)

    def test_no_tower(self, path):
        with pytest.raises(UserError, match=r"does not fit Linear: it lacks bias, weight"):
            load(path, nn.Linear(3, 4))

    def test_no_backbone(self, path):
        with pytest.raises(UserError, match="does not say which architecture it is for"):
            load(path)


class TestDamage:
    @pytest.fixture
    def path(self, tmp_path):
        return made(DUET, GateShape()).save(tmp_path / "merged.safetensors")

    @pytest.mark.parametrize("size", [0, 7, 100, 5000, -1, -4000])
    def test_truncated(self, path, size):
        path.write_bytes(path.read_bytes()[:size])
        for opener in (open_merged, lambda path: load(path, BACKBONE.build())):
            with pytest.raises(UserError, match="truncated or damaged" if size else "is empty"):
                opener(path)

    @pytest.mark.parametrize(
        "key", ["own/visual.proj/core", "gate/1.net.0.weight", "gate/0.mean", "own/visual.ln_post.bias/changes"]
    )
    def test_a_tensor_is_missing(self, path, key):
        rewritten(path, lambda tensors, header: tensors.pop(key))
        with pytest.raises(UserError, match=r"is damaged: its header does not fit its tensors"):
            load(path, BACKBONE.build())

    @pytest.mark.parametrize("name", ["banks", "routing", "provenance"])
    @pytest.mark.parametrize("text", ["{", "[]", '{"visual.proj": {"kind": "Tensor"}}'])
    def test_a_header_that_says_nothing(self, path, name, text):
        if (name, text[:2]) == ("provenance", '{"'):
            return
        rewritten(path, lambda tensors, header: header.update({name: text}))
        with pytest.raises(UserError, match="is damaged"):
            open_merged(path)

    def test_a_gate_of_a_future_shape(self, path):
        def change(tensors, header):
            routing = json.loads(header["routing"])
            header["routing"] = json.dumps(routing | {"gate": routing["gate"] | {"sees": "all"}})

        rewritten(path, change)
        with pytest.raises(UserError, match="sees='all' is unknown"):
            open_merged(path)
