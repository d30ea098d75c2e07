"""Experts whose heads belong to their tasks: they are left out of a merge, kept with it and saved."""

from dataclasses import replace

import pytest
import torch
from samples import drawn, equal

from merging import Experts, UserError, load, merge, open_merged
from merging.methods import Average, Ties, Twin

SIZES = {"sentiment": 2, "topic": 5, "similarity": 1}
LAYER = "roberta.encoder.layer.0."


def state(seed, classes=None):
    shapes = {
        "roberta.embeddings.word_embeddings.weight": (9, 4),
        f"{LAYER}intermediate.dense.weight": (6, 4),
        f"{LAYER}intermediate.dense.bias": (6,),
        f"{LAYER}output.dense.weight": (4, 6),
    }
    if classes is not None:
        shapes |= {"classifier.dense.weight": (4, 4), "classifier.dense.bias": (4,)}
        shapes |= {"classifier.out_proj.weight": (classes, 4), "classifier.out_proj.bias": (classes,)}
    return {key: drawn(*shape, seed=100 * seed + index) for index, (key, shape) in enumerate(shapes.items())}


def body(tensors):
    return {key: tensor for key, tensor in tensors.items() if not key.startswith("classifier")}


def head(tensors):
    return {key: tensor for key, tensor in tensors.items() if key.startswith("classifier")}


EXPERTS = {task: state(index + 1, size) for index, (task, size) in enumerate(SIZES.items())}


@pytest.mark.parametrize("base", [state(0), state(0, 3)], ids=["bare base", "base with a head"])
@pytest.mark.parametrize("method", [Average(), Ties(), Twin()])
def test_bodies_merge_and_heads_stay(method, base, tmp_path):
    merged = merge(method, base, list(EXPERTS.values()), list(SIZES))
    alone = merge(method, body(base), [body(expert) for expert in EXPERTS.values()], list(SIZES))
    for task in range(3):
        gate = merged.one_hot(task) if merged.deltas else None
        assert equal(dict(merged.state(gate)), dict(alone.state(gate)))
    again = open_merged(merged.save(tmp_path / "merged.safetensors"))
    assert again.stored_bytes == merged.stored_bytes > alone.stored_bytes
    for kept in (merged, merged.scaled(0.5), again):
        assert all(equal(kept.heads[task], head(expert)) for task, expert in EXPERTS.items()) and len(kept.heads) == 3


def test_heads_that_are_one_tensor_are_stored_once(tmp_path):
    merged = merge(Average(), state(0), list(EXPERTS.values()), list(SIZES))
    shared = replace(merged, heads=dict.fromkeys(SIZES, merged.heads["topic"]))
    again = open_merged(shared.save(tmp_path / "merged.safetensors"))
    assert all(equal(each, merged.heads["topic"]) for each in again.heads.values())


def test_a_saved_body_is_loaded_into_a_module(tmp_path):
    module = torch.nn.Module()
    module.roberta = torch.nn.Module()
    for key, tensor in body(state(0)).items():
        *path, name = key.removeprefix("roberta.").split(".")
        owner = module.roberta
        for part in path:
            owner.add_module(part, getattr(owner, part, torch.nn.Module()))
            owner = getattr(owner, part)
        owner.register_parameter(name, torch.nn.Parameter(tensor.clone()))
    merged = merge(Average(), state(0), list(EXPERTS.values()), list(SIZES))
    assert equal(dict(load(merged.save(tmp_path / "m.safetensors"), module).state_dict()), dict(merged.state()))


def test_names_that_no_table_has_are_merged_whatever_they_are_called():
    first, second = ({"net.weight": drawn(3, 3, seed=i), "classifier.weight": drawn(2, 3, seed=i)} for i in (1, 2))
    assert "classifier.weight" in Experts.open(first, [second]).specs() and not Experts.open(first, [second]).heads
    alone = Experts.open({"classifier.weight": drawn(2, 3)}, [{"classifier.weight": drawn(2, 3, seed=1)}])
    assert alone.keys() == ("classifier.weight",)


def test_bodies_still_have_to_fit():
    wrong = {
        key: tensor[:, :2] if key.endswith("output.dense.weight") else tensor for key, tensor in state(1, 2).items()
    }
    with pytest.raises(UserError, match=r"has roberta.encoder.layer.0.output.dense.weight of shape \(4, 2\)"):
        Experts.open(state(0), [wrong])
    with pytest.raises(UserError, match=r"net.weight is not in the table bert"):
        Experts.open({"net.weight": drawn(2)}, [{"net.weight": drawn(2)}], table="bert").keys("ffn")
