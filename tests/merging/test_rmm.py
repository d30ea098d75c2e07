"""Reversible Model Merging: its steps place by place, what a basis keeps, what is stored."""

import published_positions as published
import pytest
import torch
from samples import drawn, equal, family, models, task_vectors
from test_lora_methods import adapted

from merging import Experts, UserError, merge, open_merged
from merging.checkpoints import StateDict
from merging.checkpoints.lora import Lora, LoraConfig
from merging.deltas import LowRank, Positions
from merging.methods import Expert, Rmm

TASKS, ROUNDING = 6, 1e-5
SHAPES = {"a.weight": (8, 20), "b.weight": (24, 9), "norm.bias": (7,)}


def changes_of(merged, key):
    return torch.stack([merged.deltas[key].mix(merged.one_hot(task)) for task in range(len(merged.tasks))])


def adapters(tasks=TASKS, rank=6, spread=1.0, alike=0):
    """LoRA experts on a base of zeros; spread: how far factors lie from those of seed `alike`."""
    base = StateDict({"a.weight": torch.zeros(8, 20), "b.weight": torch.zeros(24, 9)})
    opened = []
    for task in range(tasks):
        tensors = {}
        for name, (m, n) in (("a", (8, 20)), ("b", (24, 9))):
            for factor, shape in (("A", (rank, n)), ("B", (m, rank))):
                own = drawn(*shape, seed=alike + m + len(shape)) + spread * drawn(
                    *shape, seed=100 * task + n + shape[0]
                )
                tensors[f"base_model.model.{name}.lora_{factor}.weight"] = own
        opened.append(Lora(base, StateDict(tensors), LoraConfig(rank, rank)))
    return Experts.open(base, opened)


@pytest.mark.parametrize("basis", [0, 1, 2])
def test_equals_the_described_steps(basis):
    """Of whole experts."""
    base, experts = family(TASKS, SHAPES)
    merged = merge(Rmm(basis=basis, rank=6), base, experts)
    taus = task_vectors(base, experts)
    for key in ("a.weight", "b.weight"):
        assert isinstance(merged.deltas[key], Positions)
        expected = torch.stack(published.rmm([published.canonical(tau, 6) for tau in taus[key]], basis))
        assert torch.allclose(changes_of(merged, key).double(), expected, rtol=0, atol=ROUNDING), key
        left = (taus[key] - expected).flatten(1).square().sum(1) / taus[key].flatten(1).square().sum(1)
        assert torch.allclose(torch.tensor(merged.energy[key]).double(), 1 - left, atol=ROUNDING)
    assert torch.allclose(changes_of(merged, "norm.bias").double(), taus["norm.bias"], atol=ROUNDING)


@pytest.mark.parametrize("gauge", ["svd", "stored"])
def test_equals_the_described_steps_for_adapters(gauge):
    experts = adapters()
    merged = Rmm(basis=1, gauge=gauge)(experts)
    for key in ("a.weight", "b.weight"):
        low_rank = experts.low_rank(key)
        factors = [tuple(factor.double() for factor in low_rank.factors(task)) for task in range(TASKS)]
        if gauge == "svd":
            factors = [published.canonical(up @ down, 6) for up, down in factors]
        expected = torch.stack(published.rmm(factors, 1))
        scale = expected.abs().max()
        assert torch.allclose(changes_of(merged, key).double(), expected, rtol=0, atol=ROUNDING * scale), key
        dense = torch.stack([up @ down for up, down in (low_rank.factors(task) for task in range(TASKS))]).double()
        left = (dense - expected).flatten(1).square().sum(1) / dense.flatten(1).square().sum(1)
        assert torch.allclose(torch.tensor(merged.energy[key]).double(), 1 - left, atol=ROUNDING)


def test_a_direction_less_than_tasks_keeps_all():
    """Without the mean it would take one more. Where that takes more bytes than factors, these stay."""
    drawn_ups, downs = drawn(3, 12, 8, seed=1).double(), drawn(3, 8, 10, seed=2).double()
    whole, less = (Positions.of(drawn_ups, downs, count) for count in (2, 1))
    assert torch.allclose(whole.mix(torch.eye(3).double()), drawn_ups @ downs)
    assert not torch.allclose(less.mix(torch.eye(3).double()), drawn_ups @ downs, atol=0.1)
    base, experts = family(3, SHAPES)
    merged = merge(Rmm(basis=2, rank=8), base, experts)
    assert isinstance(merged.deltas["a.weight"], LowRank)
    assert torch.allclose(changes_of(merged, "a.weight").double(), task_vectors(base, experts)["a.weight"], atol=1e-5)


def test_equal_experts_need_no_direction():
    experts = adapters(spread=0.0)
    for gauge in ("svd", "stored"):
        merged, exact = Rmm(basis=0, gauge=gauge)(experts), Expert()(experts)
        for key in ("a.weight", "b.weight"):
            assert torch.allclose(changes_of(merged, key), changes_of(exact, key), atol=1e-4), key


def test_one_training_makes_stored_factors_the_better_ones():
    """Factors that were close from the start are points close to their mean; those of an SVD turn."""
    kept = {gauge: Rmm(basis=1, gauge=gauge)(adapters(spread=0.3)).energy for gauge in ("svd", "stored")}
    assert all(min(kept["stored"][key]) > max(kept["svd"][key]) for key in kept["svd"])


def test_unequal_ranks_are_filled():
    experts, _ = adapted()
    merged, exact = Rmm(basis=2, gauge="stored")(experts), Expert()(experts)
    for key in ("a.weight", "b.weight"):
        assert torch.allclose(changes_of(merged, key), changes_of(exact, key), atol=1e-5), key


def test_numbers_and_bytes_are_those_of_the_formula(tmp_path):
    """(p (r + T) + r) / (r T) of all factors."""
    experts = adapters()
    merged = Rmm(basis=1)(experts)
    places = 8 + 20 + 24 + 9
    assert merged.params == places * (1 * (6 + TASKS) + 6) < Expert()(experts).params == places * 6 * TASKS
    again = open_merged(merged.save(tmp_path / "merged.safetensors"))
    assert all(map(equal, models(again), models(merged))) and again.stored_bytes == merged.stored_bytes


def test_bad_input():
    with pytest.raises(UserError, match=r"gauge=stored keeps factors .* rank=4 would cut them"):
        Rmm(gauge="stored", rank=4)
    for wrong in ({"basis": -1}, {"gauge": "qr"}):
        with pytest.raises(UserError, match=r"out of range|unknown"):
            Rmm(**wrong)
