"""Methods whose weights depend on the input: published steps, and what routing must not change."""

from dataclasses import replace

import pytest
import torch
from samples import (
    BACKBONE,
    applied,
    context,
    drawn,
    equal,
    every_method,
    family,
    merged_of,
    models,
    opened,
    quick,
    task_vectors,
    tower,
)
from torch.nn import functional

from merging import UserError
from merging.decompose.ranks import Ranks
from merging.fit.gates import Learned, TaskId
from merging.methods import (
    Concrete,
    Dare,
    Della,
    Duet,
    Expert,
    FfnOracle,
    Lot,
    RankOneMoe,
    Recombination,
    Smile,
    Twin,
    Wemoe,
)
from merging.routing.gates import Gate, GateShape
from merging.routing.install import install

ROUNDING, FACTORS = 1e-6, 1e-5  # as in test_methods: one spacing of fp32 below 8; factors in fp32
LEARNED = [pytest.param(quick(each), id=each.__name__) for each in every_method() if getattr(each, "routed", False)]
GATED = [*LEARNED, *(pytest.param(Smile(8, 2, top_k), id=f"Smile top {top_k}") for top_k in (1, 2))]
FC, PROJ = ("visual.transformer.resblocks.{}.mlp." + name for name in ("c_fc.", "c_proj."))


def towers(tasks=3):
    """A base and experts whose features are well conditioned in fp32."""
    return family(tasks, tower(), size=0.25, spread=0.0625)


def images(count=6):
    return drawn(count, 3, 16, 16, seed=77)


def features(model, x, **weights):
    with torch.inference_mode():
        return functional.normalize(model(x, **weights), dim=-1)


def trained(method, base, experts, shape):
    """A tower that routes by itself, its gates fitted for a few steps where they learn."""
    found = opened(base, experts)
    merged = applied(method, found)
    if merged.routing.router == "learned":
        merged, _ = Learned(gate=shape, train=TaskId(steps=5)).fit(merged, found, context(found))
    return install(BACKBONE.build(), merged)


@pytest.mark.parametrize("method", GATED)
@pytest.mark.parametrize("shape", [GateShape(), GateShape(depth=2, features="mean", pool="after", activation="none")])
def test_a_sample_does_not_depend_on_its_batch(method, shape):
    model = trained(method, *towers(), shape)
    together, alone = features(model, images()), torch.cat([features(model, each[None]) for each in images()])
    assert torch.allclose(together, alone, rtol=0, atol=1e-6)
    assert not torch.allclose(together[0], together[1], rtol=0, atol=1e-3)


@pytest.mark.parametrize("method", LEARNED)
def test_routing_is_the_dense_model_of_every_samples_weights(method):
    merged = merged_of(method, *towers())
    model, dense = install(BACKBONE.build(), merged), BACKBONE.build()
    weights = drawn(6, merged.parts, seed=5)
    found = features(model, images(), w=weights)
    for image, w, feature in zip(images(), weights, found, strict=True):
        dense.load_state_dict(dict(merged.state(w)))
        assert torch.allclose(features(dense, image[None])[0], feature, rtol=0, atol=1e-5)


def permuted(state):
    """The same function with the hidden neurons of every FFN in another order."""
    turned = dict(state)
    for block in range(2):
        order = torch.randperm(64, generator=torch.Generator().manual_seed(block))
        turned |= {FC.format(block) + name: state[FC.format(block) + name][order] for name in ("weight", "bias")}
        turned[PROJ.format(block) + "weight"] = state[PROJ.format(block) + "weight"][:, order]
    return turned


BY_POSITION = Dare, Della, Concrete  # they draw a random number for every position
FOLLOWING = [pytest.param(quick(each), id=each.__name__) for each in every_method() if each not in BY_POSITION]


def uncoded(method):
    """Without codes, whose groups are of neighbours."""
    return replace(method, coded=False) if isinstance(method, Recombination) else method


@pytest.mark.parametrize("method", FOLLOWING)
def test_follows_a_permutation_of_hidden_neurons(method):
    """Of all methods but those that draw by position.

    LOT's default counts eigenvalues as inverses that are small enough to make fifth digits of the rounding of fp32.
    """
    method = replace(method, cutoff=1e-2) if isinstance(method, Lot) else uncoded(method)
    base, experts = towers()
    first = models(merged_of(method, base, experts))
    second = models(merged_of(method, permuted(base), [permuted(expert) for expert in experts]))
    for model, turned in zip(first, second, strict=True):
        expected = permuted(model)
        for key, weight in turned.items():
            assert torch.allclose(weight, expected[key], rtol=0, atol=FACTORS), key


@pytest.mark.parametrize("method", GATED)
def test_a_permutation_of_hidden_neurons_leaves_the_function_alone(method):
    method, (base, experts) = uncoded(method), towers()
    turned = permuted(base), [permuted(expert) for expert in experts]
    pair = [install(BACKBONE.build(), merged_of(method, *each)) for each in ((base, experts), turned)]
    weights = {} if isinstance(method, Smile) else {"w": drawn(6, merged_of(method, *turned).parts)}
    first, second = (features(model, images(), **weights) for model in pair)
    assert torch.allclose(first, second, rtol=0, atol=1e-5)


LOSSLESS = [
    pytest.param(Expert(), ("ffn", "attention", "norm", "embedding", "projection"), id="expert"),
    pytest.param(FfnOracle(), ("ffn",), id="ffn oracle"),
    pytest.param(Wemoe(), ("ffn",), id="wemoe"),
    pytest.param(Duet(ranks=Ranks("energy", 0.0)), ("ffn",), id="duet"),
    pytest.param(Duet("all", Ranks("energy", 0.0)), ("ffn", "attention"), id="duet all"),
    pytest.param(Twin(keep=1), ("ffn", "attention"), id="twin"),
    pytest.param(Smile(16), ("ffn", "attention"), id="smile"),
    pytest.param(RankOneMoe(16), (), id="rank-one moe"),
    pytest.param(Smile(16, split_qkv=False), ("ffn", "attention"), id="smile fused"),
]


@pytest.mark.parametrize(("method", "kinds"), LOSSLESS)
@pytest.mark.parametrize("tasks", [1, 3])
def test_nothing_is_lost_at_full_rank(method, kinds, tasks):
    base, experts = family(tasks, tower())
    merged = merged_of(method, base, experts)
    promised = {key for key in merged.specs if any(BACKBONE.param(key).is_a(kind) for kind in kinds)}
    matrices = {name.format(block) + "weight" for name in (FC, PROJ) for block in range(2)}
    assert merged.deltas.keys() >= promised | matrices
    for expert, model in zip(experts, models(merged), strict=True):
        for key in merged.deltas:
            assert torch.allclose(model[key], expert[key], rtol=0, atol=FACTORS), key


def decomposed(matrix):
    u, s, vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    return u, s, vh


def smile_layer(weight, bias, taus, bias_taus, x, rank, gate_rank, top_k):
    """One linear layer of SMILE in fp64, token by token."""
    out = torch.zeros(*x.shape[:-1], len(weight)).double()
    parts = [decomposed(tau) for tau in taus]
    for at in torch.cartesian_prod(*map(torch.arange, x.shape[:-1])).tolist():
        token = x[tuple(at)].double()
        gate = torch.stack([(vh[:gate_rank] @ token).square().sum().sqrt() for _, _, vh in parts]).softmax(0)
        kept = gate.argsort(descending=True)[:top_k].tolist()
        y = weight.double() @ token + bias.double()
        for t in kept:
            u, s, vh = parts[t]
            change = u[:, :rank] @ torch.diag(s[:rank]) @ vh[:rank]
            y = y + gate[t] / gate[kept].sum() * (change @ token + bias_taus[t])
        out[tuple(at)] = y
    return out


@pytest.mark.parametrize(("rank", "gate_rank", "top_k"), [(4, 2, 1), (4, 4, 2), (16, 1, 3)])
@pytest.mark.parametrize("split", [True, False])
def test_smile_equals_the_published_steps(rank, gate_rank, top_k, split):
    base, experts = towers()
    model = install(BACKBONE.build(), merged_of(Smile(rank, gate_rank, top_k, split), base, experts))
    taus, block, x = task_vectors(base, experts), model.blocks[1].module, drawn(2, 5, 16, seed=3)
    prefix = "visual.transformer.resblocks.1."

    def expected(weight, bias, rows=slice(None)):
        keys = prefix + weight, prefix + bias
        tensors = [source[key][cut] for source, cut in ((base, rows), (taus, (slice(None), rows))) for key in keys]
        return smile_layer(*tensors, x, rank, gate_rank, top_k)

    with torch.inference_mode():
        projected, hidden = block.attn.in_proj(x), block.mlp.c_fc(x)
    thirds = [slice(16 * i, 16 * i + 16) for i in range(3)] if split else [slice(None)]
    wanted = torch.cat([expected("attn.in_proj_weight", "attn.in_proj_bias", rows) for rows in thirds], -1)
    assert torch.allclose(projected.double(), wanted, rtol=0, atol=FACTORS)
    assert torch.allclose(hidden.double(), expected("mlp.c_fc.weight", "mlp.c_fc.bias"), rtol=0, atol=FACTORS)


def test_smile_leaves_all_but_linear_layers_pretrained():
    base, experts = towers()
    merged = merged_of(Smile(), base, experts)
    linear = {key for key in merged.specs if BACKBONE.param(key).family in ("ffn", "attention")}
    assert merged.deltas.keys() == linear and "visual.proj" not in linear and not merged.shared
    assert all(equal({key: model[key] for key in model if key not in linear},
                     {key: base[key] for key in model if key not in linear}) for model in models(merged))  # fmt: skip
    with pytest.raises(UserError, match="gate_rank=16 is above rank=8"):
        Smile(rank=8)


@pytest.mark.parametrize("rank", [1, 3, 16])
def test_rank_one_experts_are_the_triplets_of_every_task(rank):
    base, experts = family(3, tower())
    merged, taus = merged_of(RankOneMoe(rank, init=0.25), base, experts), task_vectors(base, experts)
    weights = drawn(3 * rank, seed=8)
    for block in range(2):
        for key in (FC.format(block) + "weight", PROJ.format(block) + "weight"):
            expected = base[key].double()
            for t, tau in enumerate(taus[key]):
                u, s, vh = decomposed(tau)
                for i in range(rank):
                    expected = expected + weights[t * rank + i].double() * s[i] * torch.outer(u[:, i], vh[i])
            assert torch.allclose(merged.weight(key, weights).double(), expected, rtol=0, atol=3 * FACTORS), key
            assert merged.deltas[key].params == 3 * rank * (64 + 16)
        for key in (FC.format(block) + "bias", PROJ.format(block) + "bias"):
            expected = base[key] + 0.25 * taus[key].sum(0)
            assert torch.allclose(merged.weight(key).double(), expected.double(), rtol=0, atol=ROUNDING)


def test_rank_one_gates_have_the_published_size():
    """Official code, ViT-B/32, eight tasks, rank 32: twelve linear gates."""
    gate = Gate(768, 8 * 32, GateShape(depth=1, features="mean"))
    assert 12 * sum(parameter.numel() for parameter in gate.parameters()) == 2_362_368


def test_smile_stores_nothing_for_what_no_expert_changed():
    base, experts = towers()
    tuned = [{key: base[key] if ".attn." in key else weight for key, weight in expert.items()} for expert in experts]
    deltas = merged_of(quick(Smile), base, tuned).deltas
    assert deltas and not any(".attn." in key for key in deltas)
