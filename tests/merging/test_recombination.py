"""MERGE: what its groups make of experts, step by step, what they take to store, and what the search finds of them."""

from dataclasses import replace
from functools import partial

import architectures
import published_quantised
import published_search as published
import pytest
import torch
from samples import applied, drawn, equal, family, models, opened, tower
from torch.func import functional_call

from merging import Cache, UserError, open_merged
from merging.context import Context
from merging.deltas import Coded, Grouped, Rows
from merging.fit.black_box import Evolution
from merging.methods import Average, Emr, Quantised, Recombination, RegMean, TaskArithmetic
from merging.methods.method import call, static
from merging.methods.quantised import quantisable
from merging.packed import Grid
from merging.recombined import Library
from merging.routing.install import install
from tasks.score import Score

TASKS = ("red", "green", "blue", "grey")
BLOCK = "transformer.resblocks.0"
GENOME = {
    "transformer.resblocks.0.attention": {"blue": 0, "green": 1, "grey": 0, "red": 2},
    "transformer.resblocks.0.ffn": {"blue": 0, "green": 0, "grey": 0, "red": 0},
    "transformer.resblocks.1.attention": {"blue": 3, "green": 2, "grey": 1, "red": 0},
    "transformer.resblocks.1.ffn": {"blue": 1, "green": 1, "grey": 0, "red": 0},
}
GENOME = {f"visual.{component}": groups for component, groups in GENOME.items()}


def library(experts, then=None, coded=frozenset(), grid=None):
    merge = partial(static, Average() if then is None else then, context=Context(), role="then")
    return Library(experts, lambda some: merge(experts=some), Grid(bits=8, group=8) if grid is None else grid, coded)


def given(made, genome=GENOME):
    """Groups of a genome."""
    return made.groups({f"{component}/{task}": float(number) for component, numbers in genome.items()
                        for task, number in numbers.items()})  # fmt: skip


def of_block(shapes):
    """Those of one block and of the projection."""
    return {key: shape for key, shape in shapes.items() if f"{BLOCK}." in key or key == "visual.proj"}


def test_equals_the_described_steps():
    base, experts = family(4, tower())
    made = library(opened(base, experts, TASKS))
    merged, floating = made.merged(given(made)), {key: base[key] for key in base if base[key].is_floating_point()}
    expected, modules, storage = published.recombined(
        floating, dict(zip(TASKS, experts, strict=True)), made.components, GENOME
    )
    assert len(modules) == 3 + 1 + 4 + 2 and made.storage(given(made)) == pytest.approx(storage, abs=1e-12)
    for task, model in zip(TASKS, models(merged), strict=True):
        for key, weight in model.items():
            assert torch.allclose(weight.double(), expected[task][key], rtol=0, atol=1e-5), (task, key)
    delta = merged.deltas["visual.transformer.resblocks.1.mlp.c_fc.weight"]
    assert isinstance(delta, Grouped) and (delta.parts, delta.members.parts) == (4, 2)
    assert not any("resblocks.0.mlp" in key for key in merged.deltas)


def test_codes_equal_the_described_steps():
    base, experts = family(4, tower())
    found = opened(base, experts, TASKS)
    plain, key = library(found), "visual.transformer.resblocks.0.attn.in_proj_weight"
    made = library(found, coded=frozenset([key]))
    exact, merged = plain.merged(given(plain)), made.merged(given(made))
    assert isinstance(merged.deltas[key].members, Coded)
    for task in range(4):
        change = exact.deltas[key].mix(exact.one_hot(task))
        expected = published_quantised.nearest(change.double(), 8, 8, True)
        assert torch.allclose(merged.deltas[key].mix(merged.one_hot(task)).double(), expected, atol=1e-6)
    steps = 48 * 2  # of 16 inputs, 8 together
    assert merged.deltas[key].bytes == 3 * (48 * 16 + 2 * steps) and exact.deltas[key].bytes == 3 * 48 * 16 * 4


def test_experts_apart_are_the_experts_and_together_the_static_merge():
    base, experts = family(4, tower())
    for then in (Average(), TaskArithmetic(0.3)):
        made = library(opened(base, experts, TASKS), then)
        apart, together = (made.merged(made.start(families)) for families in (("attention", "ffn"), ()))
        whole = dict(then(opened(base, experts, TASKS)).state())
        assert together.is_static and together.routing is None
        assert all(torch.allclose(weight, whole[key], rtol=0, atol=1e-6) for key, weight in together.state())
        inside = {key for keys in made.components.values() for key in keys}
        for expert, model in zip(experts, models(apart), strict=True):
            assert equal({key: model[key] for key in inside}, {key: expert[key] for key in inside})
            assert all(torch.allclose(model[key], whole[key], rtol=0, atol=1e-6) for key in {*model} - inside)
        assert (made.storage(made.start(())), made.storage(made.start(("attention", "ffn")))) == (0.25, 1.0)


def test_bytes_are_those_of_the_distinct_modules(tmp_path):
    base, experts = family(4, tower())
    made = library(opened(base, experts, TASKS))
    merged, size = made.merged(given(made)), sum(tensor.nbytes for tensor in base.values())
    sizes = {name: 4 * sum(base[key].numel() for key in keys) for name, keys in made.components.items()}
    kept = {name: len({*numbers.values()}) for name, numbers in GENOME.items()}
    assert merged.stored_bytes == size + sum(sizes[name] * count for name, count in kept.items() if count > 1)
    again = open_merged(merged.save(tmp_path / "merged.safetensors"))
    assert all(map(equal, models(again), models(merged))) and again.stored_bytes == merged.stored_bytes


def test_separate_projections_are_joined_again():
    base, experts = family(4, tower())
    found = opened(base, experts, TASKS)
    made, apart = library(found), library(replace(found, separate_qkv=True))
    one, other = made.merged(given(made)), apart.merged(given(apart))
    assert isinstance(other.deltas["visual.transformer.resblocks.0.attn.in_proj_weight"], Rows)
    assert all(map(equal, models(one), models(other)))


def test_matrices_that_are_stored_transposed_are_coded_as_they_are_applied():
    shapes = {"h.0.mlp.c_fc.weight": (8, 20), "h.0.mlp.c_fc.bias": (20,), "ln_f.weight": (8,)}
    base, experts = family(2, shapes)
    made = library(opened(base, experts, TASKS[:2]), coded=frozenset(["h.0.mlp.c_fc.weight"]))
    merged = made.merged(made.start(("ffn",)))
    for expert, model in zip(experts, models(merged), strict=True):
        tau = (expert["h.0.mlp.c_fc.weight"] - base["h.0.mlp.c_fc.weight"]).double()
        change = (model["h.0.mlp.c_fc.weight"] - base["h.0.mlp.c_fc.weight"]).double()
        assert torch.allclose(change, published_quantised.nearest(tau.T, 8, 8, True).T, atol=1e-5)
        assert torch.equal(model["h.0.mlp.c_fc.bias"], expert["h.0.mlp.c_fc.bias"])


@pytest.mark.parametrize("name", ["open_clip", "ViT", "BERT", "GPT-2", "T5", "Llama"])
@torch.no_grad()
def test_a_model_of_every_architecture_answers_as_with_folded_weights(name):
    """Random groups in codes; every sample mixes its tasks in its own way."""
    module, kwargs = architectures.model(name), architectures.inputs(name)
    base = {key: value.detach() for key, value in module.named_parameters()}
    experts = [
        {key: value + 0.1 * drawn(*value.shape, seed=1000 * task + index)
         for index, (key, value) in enumerate(base.items())} for task in (1, 2, 3)
    ]  # fmt: skip
    found = opened(base, experts, TASKS[:3])
    made = library(found, coded=frozenset(quantisable(Grid(bits=8, group=8), found)))
    numbers = [(0, 1, 1), (1, 0, 1), (0, 1, 2), (1, 1, 0)]
    merged = made.merged(made.groups({f"{component}/{task}": numbers[index % 4][place]
                                      for index, component in enumerate(made.components)
                                      for place, task in enumerate(found.tasks)}))  # fmt: skip
    assert len(made.components) >= 4 and {type(delta) for delta in merged.deltas.values()} == {Grouped}
    w = torch.rand(architectures.BATCH, 3, generator=torch.Generator().manual_seed(0))
    answers = architectures.output(install(module, merged)(**kwargs, w=w))
    for row in range(architectures.BATCH):
        alone = {key: value[row : row + 1] for key, value in kwargs.items()}
        expected = architectures.output(
            functional_call(module, dict(merged.state(w[row])), (), alone, tie_weights=True)
        )
        assert torch.allclose(answers[row : row + 1], expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max())), row


class Near:
    """Data double: how near the modules of every task are to its expert's. most: merges scored up to a kill."""

    def __init__(self, experts, most=None):
        self.experts, self.most, self.asked = experts, most, 0

    def validate(self, merged):
        if self.asked == self.most:
            raise KeyboardInterrupt
        self.asked += 1
        keys = [key for key in self.experts.specs() if ".attn." in key or ".mlp." in key]
        gaps = {}
        for index, task in enumerate(self.experts.tasks):
            weights = {key: merged.weight(key, merged.one_hot(index) if merged.deltas else None) for key in keys}
            taus = {key: weights[key] - self.experts.base(key) - self.experts.task_vector(key, index) for key in keys}
            gaps[task] = sum(float(tau.double().square().sum()) for tau in taus.values())
        return {task: Score("near", -gap, 9, 0.1) for task, gap in gaps.items()}


def pairs():
    """Red and green are one expert, blue and grey another."""
    base, (first, second) = family(2, of_block(tower()))
    return opened(base, [first, first, second, second], TASKS)


METHOD = Recombination(search=Evolution(150, 12), coded=False)


def test_the_search_finds_which_tasks_go_together():
    experts = pairs()
    merged = call(METHOD, experts, Context(Near(experts)))
    front = merged.provenance["front"]
    assert [{*map(tuple, groups)} for groups in front[-1]["groups"].values()] == [
        {("blue", "grey"), ("green", "red")}
    ] * 2
    assert front[-1]["storage"] == 0.5 and max(front[-1]["scores"].values()) == min(front[-1]["scores"].values()) == 0
    assert front[0]["storage"] == 0.25 and [*front[0]["groups"].values()] == [[["blue", "green", "grey", "red"]]] * 2
    scores = [sum(point["scores"].values()) for point in front]
    assert scores == sorted(scores) and [point["storage"] for point in front] == sorted(
        point["storage"] for point in front
    )
    key = f"visual.{BLOCK}.mlp.c_fc.weight"
    for index, model in enumerate(models(merged)):
        assert torch.equal(model[key], experts.base(key) + experts.task_vector(key, index))
    (remark,) = merged.remarks
    assert " 0.0000 with 50 % of those of the experts; the front has" in remark


@pytest.mark.parametrize(("storage", "most"), [(0.0, 0.25), (0.3, 0.3), (0.4, 0.4), (1.0, 0.5)])
def test_no_more_is_kept_than_may_be_and_nothing_better_fits(storage, most):
    experts = pairs()
    merged = call(replace(METHOD, storage=storage), experts, Context(Near(experts)))
    fitting = [point for point in merged.provenance["front"] if point["storage"] <= most]
    kept = library(experts)
    chosen = [kept.merged(point["groups"]) for point in fitting][-1]
    assert all(map(equal, models(merged), models(chosen)))


def test_the_seed_decides_and_the_order_of_tasks_does_not():
    experts = pairs()
    front = lambda some, seed=0: call(METHOD, some, Context(Near(some), seed=seed)).provenance["front"]  # noqa: E731
    order = [2, 0, 3, 1]
    turned = replace(experts, tasks=tuple(TASKS[index] for index in order),
                     checkpoints=tuple(experts.checkpoints[index] for index in order))  # fmt: skip
    assert front(experts) == front(experts) == front(turned)
    short = replace(METHOD, search=Evolution(30, 8))
    asked = [call(short, experts, Context(Near(experts), seed=seed)).provenance["front"] for seed in (0, 1)]
    assert asked[0] != asked[1]


def test_a_killed_search_goes_on(tmp_path):
    experts, cache = pairs(), Cache(tmp_path)
    whole, first, second = Near(experts), Near(experts, 9), Near(experts)
    merged = call(METHOD, experts, Context(whole))
    with pytest.raises(KeyboardInterrupt):
        call(METHOD, experts, Context(first, unfinished=cache))
    again = call(METHOD, experts, Context(second, unfinished=cache))
    assert again.provenance == merged.provenance and all(map(equal, models(again), models(merged)))
    assert (
        first.asked + second.asked == whole.asked < METHOD.search.trials
    )  # groups that come again are not scored again


def test_bad_input():
    experts = opened(*family(3, tower()))
    for then, reason in (
        (RegMean(), "merges a few tasks at a time, and RegMean looks at data of all"),
        (Emr(), "recombination: then must be a static method"),
        (Quantised(group=8), "recombination: then was quantised by Quantised"),
    ):
        with pytest.raises(UserError, match=reason):
            applied(Recombination(then=then, group=8), experts)
    with pytest.raises(UserError, match=r"recombination: visual.* has 16 inputs, and group=64"):
        applied(Recombination(), experts)
    with pytest.raises(UserError, match="uses validation scores, and there are none"):
        call(Recombination(group=8), experts, Context())
    for wrong in (
        partial(Recombination, storage=1.5),
        partial(Recombination, bits=2),
        partial(Evolution, population=1),
    ):
        with pytest.raises(UserError, match=r"out of range|is unknown"):
            wrong()
    with pytest.raises(UserError, match=r"trials=0 asks for no trial"):
        Evolution(0)
