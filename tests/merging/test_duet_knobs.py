"""The knobs of DuetMerging: averages, biases, the rest, what is routed, what is cached and what is refused."""

from dataclasses import replace

import pytest
import torch
from ffns import (
    BLOCKS,
    EXACT,
    FFN,
    GIVEN,
    MATRICES,
    SHAPES,
    SMALL,
    TASKS,
    WIDE,
    Given,
    W,
    approximations,
    close,
    filled,
    small_towers,
)
from samples import BACKBONE, drawn, equal, family, merged_of, task_vectors

from merging import Cache, Experts, UserError
from merging.decompose import tucker as module
from merging.decompose.ranks import Ranks
from merging.methods import Base, Duet, Single, TaskArithmetic, TsvM, Twin
from merging.neurons import Neurons
from merging.routing.install import install


@pytest.fixture(scope="module")
def models():
    return family(TASKS, SHAPES)


def test_overlapping_masks_are_averaged_as_documented(models):
    base, experts = models
    hand = torch.zeros(TASKS, WIDE, dtype=torch.bool)
    hand[0, :4], hand[1, 2:6] = True, True
    hand[2, 11] = True
    parts = {
        average: merged_of(
            Duet(ranks=SMALL, neurons=Given(scale="none", given=dict.fromkeys(BLOCKS, hand)), average=average),
            base,
            experts,
        )
        for average in ("all", "kept")
    }
    for key in MATRICES:
        merged = parts["all"]
        left = (task_vectors(base, experts)[key] - approximations(merged, key)).movedim(2 if "c_proj" in key else 1, 0)
        axis = 1 if "c_proj" in key else 0
        everyone, keepers = (parts[name].fixed[key].movedim(axis, 0) for name in ("all", "kept"))
        assert close(everyone[0], left[0, 0] / 3) and close(keepers[0], left[0, 0])
        assert close(everyone[2], (left[2, 0] + left[2, 1]) / 3) and close(keepers[2], (left[2, 0] + left[2, 1]) / 2)
        assert close(keepers[11], left[11, 2]) and not keepers[7].any()


def test_disjoint_masks_at_one_over_t_return_the_owners_residual(models):
    """1 / density cancels the mean over tasks."""
    base, experts = models
    owner = torch.arange(WIDE) % TASKS
    disjoint = owner == torch.arange(TASKS)[:, None]
    merged = merged_of(Duet(ranks=SMALL, neurons=Given(given=dict.fromkeys(BLOCKS, disjoint))), base, experts)
    for key in MATRICES:
        left = task_vectors(base, experts)[key] - approximations(merged, key)
        axis = 1 if "c_proj" in key else 0
        for neuron in range(WIDE):
            mine = left[owner[neuron]].select(axis, neuron)
            assert close(merged.fixed[key].select(axis, neuron), mine), (key, neuron)


def test_no_correction_asks_for_no_images(models):
    base, experts = models
    plain = Experts.open(base, experts)
    for method in (Duet(static=False), Duet(static_coef=0.0)):
        assert not method(plain).fixed
    with pytest.raises(UserError, match="uses unlabelled calibration inputs of every task, and there are none here"):
        Duet()(plain)


def test_biases(models):
    base, experts = models
    taus = task_vectors(base, experts)
    found = {bias: merged_of(Duet(neurons=GIVEN, bias=bias), base, experts) for bias in ("dynamic", "rest", "base")}
    for key in set(FFN) - set(MATRICES):
        dynamic = base[key] + torch.einsum("t,tm->m", W.double(), taus[key])
        assert close(found["dynamic"].weight(key, W), dynamic)
        assert close(found["rest"].weight(key), base[key] + 0.3 * taus[key].sum(0)) and key not in found["rest"].deltas
        assert torch.equal(found["base"].weight(key), base[key]) and key not in found["base"].deltas


def test_a_bias_of_one_expert_acts_through_its_weight_alone(models):
    base, experts = models
    key = "transformer.resblocks.1.mlp.c_fc.bias"
    moved = [experts[0], {**experts[1], key: experts[1][key] + 5}, experts[2]]
    before, after = (merged_of(Duet(neurons=GIVEN), base, each) for each in (experts, moved))
    for w in torch.eye(TASKS):
        assert close(after.weight(key, w) - before.weight(key, w), 5 * w[1].expand(WIDE))


@pytest.mark.parametrize("rest", [TaskArithmetic(0.4), TsvM(), Base()])
def test_the_rest_is_merged_by_any_static_method(models, rest):
    base, experts = models
    merged, alone = merged_of(Duet(neurons=GIVEN, rest=rest), base, experts), merged_of(rest, base, experts)
    assert merged.scale == alone.scale
    for key in set(SHAPES) - set(FFN):
        assert torch.equal(merged.weight(key), alone.weight(key)), key


def test_unmoved_ffns_leave_the_rest_alone():
    base, experts = small_towers()
    still = [{key: base[key] if "mlp" in key else tensor for key, tensor in expert.items()} for expert in experts]
    merged, images = merged_of(Duet(neurons=Neurons(0.25)), base, still), drawn(3, 3, 16, 16)
    arithmetic = filled(dict(merged_of(TaskArithmetic(0.3), base, still).state()))
    assert close(install(BACKBONE.build(), merged)(images, w=W), arithmetic(images), 1e-5)


def test_a_dynamic_rest_is_refused_and_its_fixed_part_kept(models):
    base, experts = models
    with pytest.raises(UserError, match="duet: rest must be a static method"):
        merged_of(Duet(neurons=GIVEN, rest=Twin(start=None)), base, experts)

    def shifted(opened):
        return opened.merged({}, fixed={"proj": torch.ones(SHAPES["proj"])})

    assert close(merged_of(Duet(neurons=GIVEN, rest=shifted), base, experts).weight("proj"), base["proj"] + 1)


def test_everything_may_be_routed(models):
    base, experts = models
    merged = merged_of(Duet(routes="all", ranks=EXACT, neurons=GIVEN), base, experts)
    assert set(merged.deltas) == set(SHAPES) - {"conv1.weight"} and merged.fixed.keys() == set(MATRICES)
    for task, expert in enumerate(experts):
        assert all(close(merged.weight(key, merged.one_hot(task)), expert[key]) for key in merged.deltas)
    arithmetic = merged_of(TaskArithmetic(0.3), base, experts)
    assert torch.equal(merged.weight("conv1.weight"), arithmetic.weight("conv1.weight"))


def test_decomposes_once_per_content_and_ranks(models, tmp_path, monkeypatch):
    """A smaller rank after a larger one gives the same bits as without it."""
    calls, original = [], module.tucker
    monkeypatch.setattr(module, "tucker", lambda *given, **more: calls.append(1) or original(*given, **more))
    found = replace(Experts.open(*models), cache=Cache(tmp_path / "cache"))
    for value in (4, 4, 2, 4):
        method = Duet(static=False, ranks=Ranks("absolute", value))
        again, direct = method(found), method(Experts.open(*models))
        assert all(
            equal(dict(again.deltas[key].named_buffers()), dict(direct.deltas[key].named_buffers())) for key in FFN
        )
    assert len(calls) == 2 * 4 + 4 * 4  # two ranks through the cache, four times without


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (
            Duet(ranks=Ranks("absolute", 13), static=False),
            r"duet: transformer.resblocks.0.mlp.c_fc.weight: out rank 13 .* full rank 12 = min\(m, T n\) = .*12, 15\)",
        ),
        (
            Duet(ranks=Ranks("absolute", 12), static=False),
            r"c_fc.weight: in rank 12 .* full rank 5 = min\(n, T m\) = min\(5, 36\)",
        ),
        (Duet(ranks=Ranks("absolute", 2, task=4), static=False), "task rank 4 is above the full rank 3"),
        (
            Duet(neurons=Neurons(0.001)),
            "keeps none of the 64 hidden neurons of block visual.transformer.resblocks.0 for task0",
        ),
    ],
)
def test_what_cannot_be_done_is_refused(models, method, message):
    base, experts = models if not method.static else small_towers()
    with pytest.raises(UserError, match=message):
        merged_of(method, base, experts)


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"routes": "attention"}, "routes='attention' is unknown. Choose one of ffn, all"),
        ({"factors": "cp"}, "factors='cp' is unknown. Choose one of tucker, svd"),
        ({"engine": "als"}, "engine='als' is unknown. Choose one of hooi"),
        ({"average": "none"}, "average='none' is unknown"),
        ({"bias": "oracle"}, "bias='oracle' is unknown. Choose one of dynamic, rest, base"),
        ({"static_coef": float("nan")}, "static_coef=nan is out of range"),
    ],
)
def test_unknown_names(knobs, message):
    with pytest.raises(UserError, match=message):
        Duet(**knobs)


def test_a_single_expert_may_be_the_rest(models):
    base, experts = models
    merged = merged_of(Duet(neurons=GIVEN, rest=Single("task1")), base, experts)
    assert close(merged.weight("proj"), experts[1]["proj"])
