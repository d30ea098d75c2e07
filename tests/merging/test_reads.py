"""How often what a file holds is asked for."""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from samples import family, tower

from merging import Experts
from merging.checkpoints import StateDict
from merging.checkpoints.key_maps import from_hugging_face, to_hugging_face
from merging.deltas import Rows
from merging.methods import Average, Emr, IsoC, TsvM, Twin

T = 3


class Counted(StateDict):
    """Counts how often a tensor is asked for."""

    def __init__(self, tensors):
        super().__init__(tensors)
        self.read = Counter()

    def tensor(self, key):
        self.read[key] += 1
        return super().tensor(key)


@pytest.mark.parametrize("separate", [True, False])
@pytest.mark.parametrize("method", [Average(), TsvM(), IsoC(), Emr()], ids=lambda each: type(each).__name__)
def test_each_stored_tensor_is_read_once_a_merge(method, separate):
    """Of files that hold query, key and value apart, under Hugging Face's names, and methods that see one or three."""
    base, tuned = family(T, tower(), size=0.25, spread=0.0625)
    stored = []
    for state in (base, *tuned):
        del state["position_ids"]
        view = to_hugging_face(StateDict(state))
        stored.append(Counted({key: view.tensor(key) for key in view.specs()}))
    opened = Experts.open(from_hugging_face(stored[0]), [from_hugging_face(each) for each in stored[1:]])
    for each in stored:
        each.read.clear()
    method(replace(opened, separate_qkv=separate))
    for each in stored:
        assert each.read == dict.fromkeys(each.specs(), 1)


def test_columns_of_gpt2_are_seen_as_three_parameters():
    """Its fused matrix is [in, 3 out]: what is merged is that of three matrices, side by side again."""
    shapes = {"h.0.attn.c_attn.weight": (8, 24), "h.0.attn.c_attn.bias": (24,), "h.0.ln_1.weight": (8,)}
    base, tuned = family(T, shapes)
    found = replace(Experts.open(base, tuned), separate_qkv=True)
    assert found.keys("attention_k") == ("h.0.attn.c_attn.k.bias", "h.0.attn.c_attn.k.weight")
    merged = TsvM()(found)
    fused, columns = "h.0.attn.c_attn.weight", slice(8, 16)
    apart = TsvM()(Experts.open({"k": base[fused][:, columns]}, [{"k": each[fused][:, columns]} for each in tuned]))
    assert torch.equal(merged.static(fused)[:, columns], apart.static("k")) and merged.static(fused).shape == (8, 24)
    routed = Twin(keep=0.5)(found).deltas[fused]
    assert isinstance(routed, Rows) and routed.axis == 1 and routed.shape == (8, 24)


def test_a_merge_of_state_dicts_hashes_none_of_them(monkeypatch):
    base, tuned = family(2)
    found = Experts.open(base, tuned)
    monkeypatch.setattr(StateDict, "_id", property(lambda self: pytest.fail("a state dict was hashed")))
    assert set(Average()(found).shared) == set(found.specs())
