"""Matrices that are stored as [in, out], as GPT-2's are: what tells inputs from outputs tells them there too."""

from dataclasses import replace

import pytest
import torch
from samples import drawn, every_method, family, lasting, models, opened, quantising
from tiny_models import MODELS
from transformers import GPT2Config, GPT2LMHeadModel

from merging import Experts
from merging.applied import turned
from merging.backbones.base import Row, Table, tables
from merging.checkpoints import StateDict
from merging.checkpoints.lora import Lora, LoraConfig
from merging.methods import DoMerging, Knots, Multitask, Smile, TaskArithmetic
from merging.methods.method import call
from merging.routing.gates import Subspace
from merging.routing.install import install

AS_STORED = ("Breadcrumbs", "Dare", "Della")  # go along the last axis, or draw in that order
CUTS = ("Smile", "Twin")  # a fused matrix by its name
FREE = [each for each in every_method() + quantising() if each().needs == "nothing" and not issubclass(each, Multitask)]
ROWS = [each for each in FREE if each.__name__ not in AS_STORED + CUTS]


def network():
    return GPT2LMHeadModel(GPT2Config(**MODELS["GPT2LMHeadModel"])).eval()


def states():
    shapes = {key: tuple(tensor.shape) for key, tensor in network().state_dict().items()
              if key != "lm_head.weight" and tensor.is_floating_point()}  # fmt: skip
    base, experts = family(3, shapes, spread=0.05, size=0.3)
    return [{key: tensor for key, tensor in state.items() if key != "position_ids"} for state in (base, *experts)]


def hasty(method):
    """Of visible steps, where it takes some."""
    made = lasting(method(), 20)
    quick = {"lr": 1e-2, "eta": 0.5, "common": 0.5, "group": 4, "storage": 1.0}
    return replace(made, **{name: value for name, value in quick.items() if hasattr(made, name)})


@pytest.fixture
def upright(monkeypatch):
    """The name of a table of GPT-2 whose matrices are [out, in]."""
    rows = tuple(Row(row.names, replace(row.info, transposed=False)) for row in tables()["gpt2"].rows)
    monkeypatch.setitem(tables(), "upright", Table("upright", (), rows))
    return "upright"


@pytest.mark.parametrize("method", [pytest.param(each, id=each.__name__) for each in ROWS])
def test_the_change_does_not_depend_on_how_a_matrix_is_stored(method, upright):
    base, *tuned = states()
    stored = Experts.open(base, tuned, table="gpt2")
    upright_ones = [{key: turned(stored, key, tensor) for key, tensor in state.items()} for state in (base, *tuned)]
    assert sum(len(upright_ones[0][key]) != len(base[key]) for key in base) == 6  # square ones look alike
    expected = models(call(hasty(method), Experts.open(upright_ones[0], upright_ones[1:], table=upright)))
    for ours, theirs in zip(models(call(hasty(method), stored)), expected, strict=True):
        for key, weight in ours.items():
            torch.testing.assert_close(turned(stored, key, weight), theirs[key], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", [Knots(), Knots(TaskArithmetic()), DoMerging(steps=0)], ids=str)
def test_adapters_of_such_a_matrix_give_what_whole_ones_give(method):
    base = {key: torch.zeros_like(tensor) for key, tensor in states()[0].items()}
    name = "transformer.h.1.mlp.c_fc"
    into, out = base[f"{name}.weight"].shape
    factors = ((drawn(2, into, seed=task), drawn(out, 2, seed=task + 5)) for task in range(3))
    side = f"base_model.model.{name}.lora_"
    named = ({f"{side}A.weight": down, f"{side}B.weight": up} for down, up in factors)
    stored = StateDict(base)
    adapters = [Lora(stored, StateDict(each), LoraConfig(2, 4, fan_in_fan_out=True)) for each in named]
    whole = [{key: expert.tensor(key) for key in base} for expert in adapters]
    found, expected = (call(method, opened(base, experts)).weight(f"{name}.weight") for experts in (adapters, whole))
    assert expected.any()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_smile_knows_a_token_by_directions_of_inputs():
    base, *tuned = states()
    larger = {key: base[key] + 3 * (tensor - base[key]) for key, tensor in tuned[0].items()}
    x = torch.randn(1, 500, 8, generator=torch.Generator().manual_seed(0))
    chosen = []
    for first in (tuned[0], larger):
        experts = opened(base, [first, *tuned[1:]])
        routed = install(network(), call(Smile(rank=4, gate_rank=2), experts))
        gates = [layer for layer in routed.module.modules() if isinstance(layer, Subspace)]
        assert len(gates) == 2 * 6  # query, key and value apart
        for gate in gates:
            torch.testing.assert_close(gate.directions @ gate.directions.mT, torch.eye(2).expand(3, 2, 2))
        chosen.append(routed.module.transformer.h[0].mlp.c_fc.subspace(x).argmax(-1))
    tau = opened(base, tuned).tau("transformer.h.0.mlp.c_fc.weight")
    directions = [torch.linalg.svd(each.mT, full_matrices=False).Vh[:2] for each in tau]
    by_hand = torch.stack([(x @ each.T).norm(dim=-1) for each in directions], -1).argmax(-1)
    assert torch.equal(chosen[0], by_hand) and torch.equal(chosen[1], by_hand)  # however large a task vector is
