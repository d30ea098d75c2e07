"""Evo-Merging: its merge against the public code's steps, its two searches, and whole experts by algebra."""

from dataclasses import replace

import published_search as published
import pytest
import torch
from samples import context, drawn, family, models, opened

from merging import Experts, UserError
from merging.checkpoints import StateDict
from merging.checkpoints.lora import Lora, LoraConfig
from merging.combined import mix_of
from merging.context import Context
from merging.fit.black_box import BlackBox
from merging.methods import Cat, EvoMerging, TaskArithmetic
from merging.methods.method import call
from merging.saving_adapter import check_adapters
from tasks.score import Score

TASKS = ("one", "two", "three")
NAMES = {"visual.transformer.resblocks.0.mlp.c_fc": (12, 8), "visual.transformer.resblocks.0.mlp.c_proj": (8, 12)}


def adapters(ranks=(2, 2, 2), alpha=1):
    base = StateDict({f"{name}.weight": torch.zeros(shape) for name, shape in NAMES.items()})
    pairs = [{name: (drawn(rank, n, seed=9 * task + n), drawn(m, rank, seed=7 * task + n))
              for name, (m, n) in NAMES.items()} for task, rank in enumerate(ranks)]  # fmt: skip
    made = []
    for rank, factors in zip(ranks, pairs, strict=True):
        tensors = {f"base_model.model.{name}.lora_{side}.weight": factor
                   for name, pair in factors.items() for side, factor in zip("AB", pair, strict=True)}  # fmt: skip
        made.append(Lora(base, StateDict(tensors), LoraConfig(rank, alpha * rank)))
    return Experts.open(base, made, TASKS), pairs


def point(keep, weights):
    return {f"{name}.{task}": value for name, values in (("keep", keep), ("weight", weights))
            for task, value in zip(TASKS, values, strict=True)}  # fmt: skip


@pytest.mark.parametrize("keep", [(1.0, 1.0, 1.0), (0.3, 0.0, 0.55), (1e-6, 0.5, 1.0)])
@pytest.mark.parametrize("alpha", [1, 4])
def test_adapters_equal_the_published_steps(keep, alpha):
    weights = (0.7, -0.4, 1.2)
    experts, pairs = adapters(alpha=alpha)
    merged = EvoMerging().made(experts, point(keep, weights))
    for name in NAMES:
        a, b = published.evo_adapter([of_task[name] for of_task in pairs], keep, weights)
        assert torch.allclose(merged.weight(f"{name}.weight"), alpha * b @ a, rtol=0, atol=1e-5)
        assert (mix := mix_of(merged.shared, f"{name}.weight")) and mix.low_rank.rank == 2
    check_adapters(experts.checkpoints, experts.tasks, EvoMerging())


def test_signs_do_not_count_together_and_equal_weights_are_factors_summed_one_by_one():
    experts, _ = adapters()
    made = lambda *weights: models(EvoMerging().made(experts, point((1, 1, 1), weights)))[0]  # noqa: E731
    first, opposite, equal = made(0.7, -0.4, 1.2), made(-0.7, 0.4, -1.2), made(1 / 3, 1 / 3, 1 / 3)
    linear = Cat("linear")(experts)  # which weighs one factor alone
    for key, weight in first.items():
        assert torch.allclose(weight, opposite[key], atol=1e-6)
        assert torch.allclose(3 * equal[key], linear.weight(key), atol=1e-5)


def test_whole_experts_are_weighed_sums_of_sparse_task_vectors():
    base, experts = family(3)
    found = opened(base, experts, TASKS)
    evo = EvoMerging()
    dense = dict(evo.made(found, point((1, 1, 1), (0.3, 0.3, 0.3))).state())
    assert all(torch.allclose(dense[key], weight, atol=1e-5) for key, weight in TaskArithmetic(0.3)(found).state())
    sparse = dict(evo.made(found, point((0.25, 0.0, 1.0), (2.0, 5.0, -1.0))).state())
    for key, weight in sparse.items():
        first, _, third = ((expert[key] - base[key]).flatten() for expert in experts)
        order = first.abs().argsort(descending=True)[: max(1, round(first.numel() * 0.25))]
        kept = torch.zeros_like(first).index_copy(0, order, first[order])
        assert torch.allclose(weight.flatten(), base[key].flatten() + 2 * kept - third, atol=1e-5), key


class Target:
    """Data double: scores are how near a merge is to the first expert minus half of the second."""

    def __init__(self, base, experts):
        self.wanted = {key: 0.5 * base[key] + experts[0][key] - 0.5 * experts[1][key] for key in base}

    def validate(self, merged):
        gap = sum(float((weight - self.wanted[key]).square().sum()) for key, weight in merged.state())
        return {task: Score("nearness", 1 / (1 + gap / 500), 9, 0.1) for task in merged.tasks}


def test_the_searches_find_signs_and_say_what_they_found():
    base, experts = family(3)
    method = EvoMerging(BlackBox(20, "cma_es", 0.05), BlackBox(150, "cma_es", 0.1), penalty=0.0)
    merged = call(method, opened(base, experts, TASKS), Context(Target(base, experts)))
    near = Target(base, experts).validate(merged)["one"].value
    start = Target(base, experts).validate(TaskArithmetic(1 / 3)(opened(base, experts, TASKS)))["one"].value
    assert near > 0.5 * (1 + start)
    (remark,) = merged.remarks
    assert remark.startswith(f"mean validation score {start:.4f} of equal weights, {near:.4f} of those found: one ")


def test_the_penalty_prefers_small_numbers():
    experts = opened(*family(2))
    flat = Context(type("Flat", (), {"validate": lambda self, merged: {"a": Score("flat", 0.5, 9, 0.1)}})())
    method = EvoMerging(BlackBox(30, "random"), BlackBox(30, "random"), penalty=1.0)
    (remark,) = call(method, experts, flat).remarks
    shares, weights = zip(*(pair.split()[1:4:2] for pair in remark.split(": ")[1].split(", ")), strict=True)
    assert sum(map(float, shares)) < 1 and sum(abs(float(weight)) for weight in weights) < 1
    (remark,) = call(replace(method, penalty=0.0), experts, flat).remarks
    assert "task0 1.00 * 0.500, task1 1.00 * 0.500" in remark


def test_bad_input():
    experts, _ = adapters((1, 2, 2))
    with pytest.raises(UserError, match=r"evo_merging sums factors, and those of .* have ranks \[1, 2\]"):
        call(EvoMerging(), experts, context(experts))
    for wrong in ({"bound": 0.5}, {"penalty": -1.0}):
        with pytest.raises(UserError, match="out of range"):
            EvoMerging(**wrong)
