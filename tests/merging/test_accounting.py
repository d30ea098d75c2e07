"""The accountant against the published budgets: multiply-accumulates and stored numbers from shapes, on no memory."""

from functools import cache

import pytest
import torch
from torch import nn

from merging.accounting import macs
from merging.backbones.open_clip import PREFIX, OpenClip
from merging.checkpoints import StateDict
from merging.deltas import Dense, LowRank, Rows, Tucker
from merging.merged import Merged, Routing
from merging.routing.gates import Gate, GateShape

T = 8
SIZES = {"b32": (768, 12, 32, 512, 49), "l14": (1024, 24, 14, 768, 256)}  # width, blocks, patch, features, patches


@cache
def backbone(arch):
    width, layers, patch, features, _ = SIZES[arch]
    shape = {"image_size": 224, "patch_size": patch, "width": width, "layers": layers, "head_width": 64}
    found = OpenClip(arch, features, shape, quick_gelu=True)
    with torch.device("meta"):
        _ = found.macs  # counted once, on no memory
    return found


def linears(arch, ffn_only):
    """(key, m, n) of the linear layers of all blocks, query, key and value apart."""
    width, layers = SIZES[arch][:2]
    for block in range(layers):
        inside = {"mlp.c_fc.weight": (4 * width, width), "mlp.c_proj.weight": (width, 4 * width)}
        if not ffn_only:
            inside |= {f"attn.{name}": (width, width) for name in ("q", "k", "v", "out_proj.weight")}
        for name, (m, n) in inside.items():
            yield f"{PREFIX}transformer.resblocks.{block}.{name}", m, n


def empty(*shape):
    return torch.empty(shape, device="meta")


def low_rank(m, n, r):
    return LowRank(empty(m, T * r), empty(T * r, n), T)


def duet(arch, rank):
    return {
        key: Tucker(empty(T, rank, rank), empty(T, T), empty(m, rank), empty(n, rank))
        for key, m, n in linears(arch, ffn_only=True)
    }


def twin(arch, rank, ffn_only=False):
    """As a method makes it: the fused projection holds three deltas."""
    width = SIZES[arch][0]
    deltas = {key: low_rank(m, n, rank) for key, m, n in linears(arch, ffn_only) if not key.endswith(("q", "k", "v"))}
    if not ffn_only:
        for key in [key for key in deltas if "out_proj" in key]:
            fused = Rows([low_rank(width, width, rank) for _ in range(3)])
            deltas[key.replace("out_proj.weight", "in_proj_weight")] = fused
    return deltas


def merged(own, router="given", granularity="sample", gate=None, gates=None, **routing):
    found = Routing(router, granularity, gate=gate, gates=gates, **routing)
    return Merged(StateDict({}), tuple("abcdefgh"), {}, deltas=own, routing=found)


def ratio(arch, own, **routing):
    return macs(merged(own, **routing), backbone(arch)) / backbone(arch).macs


def test_static_forward():
    assert f"{backbone('b32').macs / 1e9:.2f}" == "4.41"
    assert f"{backbone('l14').macs / 1e9:.1f}" == "81.0"


# The reference notes round two stored sizes twice: 3.147 is printed as 3.2 and 37.752 as 37.7; so is the gate of
# depth 2 on L/14, 0.0805 as 0.081.
DUET = [  # rank, extra over the FFN and whole ratio on B/32, the same on L/14, stored millions
    (16, 0.026, 1.017, 0.020, 1.013, 1.5, 4.0),
    (32, 0.053, 1.034, 0.039, 1.025, 3.1, 8.3),
    (64, 0.106, 1.068, 0.079, 1.051, 6.7, 17.3),
    (128, 0.216, 1.139, 0.160, 1.102, 14.9, 37.8),
    (160, 0.273, 1.175, 0.202, 1.129, 19.7, 49.2),
    (192, 0.331, 1.212, 0.243, 1.155, 24.8, 61.3),
    (256, 0.449, 1.288, 0.329, 1.210, 36.2, 88.1),
    (512, 0.962, 1.618, 0.689, 1.440, 97.5, 226.5),
    (None, 1.540, 1.989, 1.508, 1.963, 184.0, 654.3),
]


@pytest.mark.parametrize("arch", ["b32", "l14"])
@pytest.mark.parametrize("row", DUET, ids=lambda row: str(row[0]))
def test_duet(arch, row):
    rank, *numbers, small, large = row
    over_ffn, whole = numbers[:2] if arch == "b32" else numbers[2:]
    width, blocks, _, _, patches = SIZES[arch]
    own = duet(arch, rank or width)
    extra = macs(merged(own), backbone(arch)) - backbone(arch).macs
    assert f"{extra / (blocks * 8 * width**2 * (patches + 1)):.3f}" == f"{over_ffn:.3f}"
    assert f"{ratio(arch, own):.3f}" == f"{whole:.3f}"
    assert f"{merged(own).params / 1e6:.1f}" == f"{small if arch == 'b32' else large:.1f}"


TWIN = [  # rank on B/32 and L/14; mix of T and top-1 on B/32, the same on L/14, stored millions
    (1, 1, 1.015, 1.002, 1.011, 1.001, 1.3, 3.5),
    (4, 4, 1.060, 1.008, 1.045, 1.006, 5.3, 14.2),
    (16, 16, 1.241, 1.030, 1.180, 1.022, 21.2, 56.6),
    (32, 32, 1.482, 1.060, 1.359, 1.045, 42.5, 113.2),
    (64, 64, 1.963, 1.120, 1.719, 1.090, 84.9, 226.5),
    (76, 102, 2.144, 1.143, 2.145, 1.143, 100.9, 361.0),
    (128, 128, 2.926, 1.241, 2.437, 1.180, 169.9, 453.0),
    (256, 256, 4.853, 1.482, 3.874, 1.359, 339.7, 906.0),
]


@pytest.mark.parametrize("arch", ["b32", "l14"])
@pytest.mark.parametrize("row", TWIN, ids=lambda row: str(row[0]))
def test_twin(arch, row):
    """A gate of no size, to read the deltas alone."""
    ranks, numbers, stored = row[:2], row[2:6], row[6:]
    which = ("b32", "l14").index(arch)
    own = twin(arch, ranks[which])
    mix, first = numbers[2 * which : 2 * which + 2]
    assert f"{ratio(arch, own):.3f}" == f"{mix:.3f}"
    assert f"{ratio(arch, own, gate=GateShape(sees='early', top_k=1)):.3f}" == f"{first:.3f}"
    assert f"{merged(own).params / 1e6:.1f}" == f"{stored[which]:.1f}"


@pytest.mark.parametrize("rank, expected", [(16, "1.134"), (76, "1.635")])
def test_twin_on_the_ffn_alone(rank, expected):
    assert f"{ratio('b32', twin('b32', rank, ffn_only=True)):.3f}" == expected


@pytest.mark.parametrize(
    "rank, b32, l14",
    [(64, 278592, 360512), (96, 442432, 565312), (128, 622656, 786496), (160, 819264, 1024064),
     (192, 1032256, 1278016), (256, 1507392, 1835072)],
)  # fmt: skip
def test_tucker_budget_of_one_matrix(rank, b32, l14):
    for width, expected in ((768, b32), (1024, l14)):
        delta = Tucker(empty(T, rank, rank), empty(T, T), empty(4 * width, rank), empty(width, rank))
        assert delta.params == expected == rank**2 * T + T * T + 5 * width * rank


@pytest.mark.parametrize("arch", ["b32", "l14"])
class TestGates:
    def gated(self, arch, count=None, own=None, **shape):
        gate = GateShape(features="mean", **shape)
        blocks = SIZES[arch][1] if count is None else count
        gates = nn.ModuleList([Gate(SIZES[arch][0], T, gate) for _ in range(blocks)])
        own = duet(arch, 1) if own is None else own
        extra = macs(merged(own, gate=gate, gates=gates), backbone(arch)) - macs(merged(own), backbone(arch))
        return extra / backbone(arch).macs

    def test_depths(self, arch):
        per_token = {"b32": ("0.0008", "0.081"), "l14": ("0.0006", "0.080")}[arch]
        assert f"{self.gated(arch, depth=1, pool='after'):.4f}" == per_token[0]
        assert f"{self.gated(arch, depth=2, pool='after'):.3f}" == per_token[1]
        pooled = {"b32": "0.0016", "l14": "0.0003"}[arch]
        assert f"{self.gated(arch, depth=2):.4f}" == pooled

    def test_a_shared_gate_is_asked_by_every_routed_block(self, arch):
        assert self.gated(arch, count=1, shared=True, pool="after") == self.gated(arch, pool="after")

    def test_a_second_pass_costs_the_whole_forward(self, arch):
        early, second = (self.gated(arch, count=1, sees=sees) for sees in ("early", "pass"))
        assert second - early == pytest.approx(1.0, abs=1e-12)


@pytest.mark.parametrize("arch, gate, dense", [("b32", "0.120", "0.103"), ("l14", "0.090", "0.020")])
def test_smile_and_wemoe(arch, gate, dense):
    smile = dict(router="subspace", granularity="token", gate_rank=16, top_k=1)
    experts = twin(arch, 32)
    chosen = ratio(arch, experts, gate=GateShape(sees="early", top_k=1)) - 1
    asked = ratio(arch, experts, **smile) - 1 - chosen
    for share, count in ((1 / 8, 1), (0.5, 4)):  # a share of the eight parts, whatever is averaged before
        assert ratio(arch, experts, gate=GateShape(sees="early", top_k=share, granularity="batch")) == ratio(
            arch, experts, gate=GateShape(sees="early", top_k=count)
        )
    soft = GateShape(features="mean", activation="soft_top_k", top_k=1)
    assert ratio(arch, experts, gate=soft) == ratio(arch, experts)  # small weights are not zero
    assert f"{asked:.3f}" == gate
    assert arch == "l14" or f"{chosen:.3f}" == "0.060"
    width, blocks = SIZES[arch][:2]
    ffn = {key: Dense(empty(T, m, n)) for key, m, n in linears(arch, ffn_only=True)}
    ffn |= {f"{PREFIX}transformer.resblocks.{i}.mlp.c_fc.bias": Dense(empty(T, 4 * width)) for i in range(blocks)}
    ffn |= {f"{PREFIX}transformer.resblocks.{i}.mlp.c_proj.bias": Dense(empty(T, width)) for i in range(blocks)}
    assert f"{ratio(arch, ffn) - 1:.3f}" == dense
    assert ratio(arch, ffn, granularity="token") > 5  # every expert runs on every token


def test_the_true_task_costs_nothing_more():
    own = {"visual.proj": Dense(empty(T, 768, 512))}
    assert macs(merged(own, router="oracle"), backbone("b32")) == backbone("b32").macs
    assert macs(Merged(StateDict({}), ("a",), {}), backbone("b32")) == backbone("b32").macs


@pytest.mark.parametrize(
    "key, shape, expected",
    [
        ("visual.conv1.weight", (768, 3, 32, 32), 49 * 16 * (768 + 3072)),  # all patches
        ("visual.proj", (768, 512), 16 * (768 + 512)),  # the class token alone
        ("visual.positional_embedding", (50, 768), 16 * 50 * 768),  # mixed for each sample, applied to nothing
        ("visual.transformer.resblocks.0.attn.out_proj.weight", (768, 768), 50 * 16 * 2 * 768),
    ],
)
def test_what_a_parameter_outside_the_blocks_acts_on(key, shape, expected):
    delta = LowRank(empty(shape[0], 16), empty(16, torch.Size(shape[1:]).numel()), T, torch.Size(shape))
    assert macs(merged({key: delta}), backbone("b32")) - backbone("b32").macs == expected


def test_an_embedding_is_mixed_for_the_rows_that_are_looked_up():
    """Of a vocabulary those of a text's tokens, of positions all; a pooler acts on one token, patches lack one."""
    pytest.importorskip("transformers")
    from tiny_models import backbone as tiny

    def added(name, key, *shape):
        whole = tiny(name, "first", length=6)
        return macs(merged({key: Dense(empty(T, *shape))}), whole) - whole.macs

    texts, images = "BertForSequenceClassification", "ViTForImageClassification"
    assert added(texts, "bert.embeddings.word_embeddings.weight", 30, 8) == T * 6 * 8
    assert added(texts, "bert.pooler.dense.weight", 8, 8) == T * 8 * 8 * 1
    assert added(images, "vit.embeddings.position_embeddings", 1, 5, 8) == T * 5 * 8
    assert added(images, "vit.embeddings.patch_embeddings.projection.weight", 8, 3, 4, 4) == T * 8 * 48
    low = tiny(images, "first")
    delta = low_rank(8, 8, 2)
    assert macs(merged({"vit.layers.0.attention.q_proj.weight": delta}), low) - low.macs == 5 * T * 2 * 16
