"""FeatCal against its authors' steps on a whole model, and by algebra."""

from dataclasses import replace

import published_regression as published
import pytest
import torch
from coloured import separable
from samples import drawn, models
from test_regression import BACKBONE, IMAGES, assert_near, measured, merged, pictures, states

from merging.affine import Gain, Layer, Terms
from merging.errors import UserError
from merging.methods import Average, FeatCal, Smile, TaskArithmetic
from merging.methods.method import call
from merging.statistics import Pair


@pytest.mark.parametrize(("mix", "unread"), [(0.25, None), (1.0, 1.0), (0.0, 0.3)])
def test_equals_the_published_steps(mix, unread):
    base, experts = states()
    start = {key: base[key] + 0.3 * sum(expert[key] - base[key] for expert in experts) for key in base}
    images, weight = [pictures(task) for task in range(3)], 0.01 if unread is None else unread
    expected = published.feat_cal(BACKBONE.build, base, start, experts, images, 0.05, 2.2, mix, weight)
    assert_near(merged(FeatCal(mix=mix, unread=unread, samples=IMAGES)), expected)


def test_experts_equal_to_what_is_calibrated_are_a_fixed_point():
    base, experts = states()
    method = FeatCal(extrapolation=1.0, then=TaskArithmetic(1 / 3))
    assert_near(merged(method, (base, experts[:1] * 3)), experts[0], 1e-3)


def test_without_bound_the_ridge_gives_the_anchor():
    base, experts = states()
    found = merged(FeatCal(ridge=1e9, extrapolation=2.0, then=Average()))
    for key, weight in found.items():
        factor = 2.0 if "layers" in key else 1.0
        average = sum(expert[key] - base[key] for expert in experts) / 3
        assert torch.allclose(weight, base[key] + factor * average, atol=1e-5), key


def pair(seed):
    x, y = (drawn(40, 6, seed=seed + i).double() for i in range(2))
    return Pair(x.T @ x, (y - x).T @ x, x.sum(0), (y - x).sum(0), torch.tensor(40.0)).means()


def terms(m, n, seed):
    return Terms(drawn(m, n, seed=seed).double(), drawn(m, seed=seed + 1).double(), drawn(m, n, seed=seed + 2).double())


def test_what_all_experts_and_the_anchor_have_in_common_is_added():
    """In the weights: K x where the targets are those of x itself."""
    more = terms(4, 6, 50)
    plain, moved = Layer(), Layer()
    for task in range(3):
        expert = terms(4, 6, 10 * task)
        plain = plain.plus(pair(task), expert, 0.0, "frobenius")
        added = Terms(expert.tau + more.tau, expert.bias + more.bias, expert.weight)
        moved = moved.plus(pair(task), added, 0.0, "frobenius")
    anchor = terms(4, 6, 40)
    (tau, bias) = plain.solved(anchor, 0.05)
    (tau_moved, bias_moved) = moved.solved(Terms(anchor.tau + more.tau, anchor.bias + more.bias, anchor.weight), 0.05)
    assert torch.allclose(tau_moved - tau, more.tau) and torch.allclose(bias_moved - bias, more.bias)


def test_a_norm_that_is_met_by_one_expert_is_the_expert():
    """Gain and shift, and the gain alone where there is no shift."""
    expert, anchor = (Terms(*drawn(3, 6, seed=seed).double()) for seed in (1, 2))
    x = drawn(40, 6).double()
    seen = Pair(x.square().sum(0), torch.zeros(6), x.sum(0), torch.zeros(6), torch.tensor(40.0)).means()
    gain = Gain().plus(seen, expert, 0.25, "frobenius")
    assert all(map(torch.allclose, gain.solved(anchor, 0.0), expert[:2]))
    alone = Gain().plus(seen, Terms(expert.tau, torch.zeros(6).double(), expert.weight), 0.25, "frobenius")
    assert torch.allclose(alone.without_shift(anchor, 0.0), expert.tau)


def test_fused_attention_of_another_library_is_calibrated_row_by_row():
    """Queries of the last block as if read by the first token, keys and values by all."""
    experts, context = separable()
    one, other, both = (models(call(FeatCal(unread=unread), experts, context))[0] for unread in (1e-9, 1.0, 0.3))
    key = "visual.transformer.resblocks.1.attn.in_proj_weight"
    assert not torch.allclose(one[key][:16], other[key][:16], atol=1e-4)
    assert torch.equal(one[key][16:], other[key][16:]) and torch.equal(both[key][16:], other[key][16:])


def test_what_lies_outside_the_blocks_stays_as_merged():
    start, found = merged(TaskArithmetic(0.3)), merged(FeatCal())
    for key, weight in start.items():
        assert torch.allclose(weight, found[key], atol=1e-6) == ("layers" not in key), key


def test_bad_input():
    experts, context = measured()
    with pytest.raises(UserError, match="What FeatCal calibrates must be a static method"):
        call(FeatCal(then=Smile()), experts, context)
    for wrong in ({"mix": 1.5}, {"ridge": -1.0}, {"samples": 0}):
        with pytest.raises(UserError, match="out of range"):
            replace(FeatCal(), **wrong)
