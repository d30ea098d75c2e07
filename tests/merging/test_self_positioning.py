"""Self Positioning against its steps on flat vectors, and by algebra."""

import math
from dataclasses import replace

import pytest
import torch
from coloured import NAMES, separable
from published_masks import self_positioning
from samples import BACKBONE, Made, context, drawn, family, models, opened, tower
from torch.func import functional_call
from torch.nn import functional

from merging.cache import Cache
from merging.context import ALONE
from merging.errors import UserError
from merging.fit import CrossEntropy, Descent, Entropy
from merging.methods import SelfPositioning
from merging.methods.self_positioning import folded_to

STEPS = Descent([CrossEntropy()], steps=3, lr=0.3, batch=5, schedule="constant", optimizer="sgd")
STILL = replace(STEPS, lr=1e-12)


def flat(parts):
    return torch.cat([part.flatten() for part in parts.values()])


def test_equals_the_described_steps():
    experts, made = separable()
    data, labels, module = made.unlabelled(), made.data.labels("calibration"), BACKBONE.build()
    shapes = {key: spec.shape for key, spec in experts.specs().items()}
    order = ["green", "red", "blue"]
    draws = [data.drawn(task, 5, made.seed) for task in range(3)]
    chosen = [[next(draw) for draw in draws] for _ in range(3)]

    def loss(rows, weights):
        pieces = weights.float().split([shape.numel() for shape in shapes.values()])
        state = {key: piece.view(shape) for (key, shape), piece in zip(shapes.items(), pieces, strict=True)}
        logits = [data.outputs(task, functional_call(module, state, data.inputs(task, some)))
                  for task, some in enumerate(rows)]  # fmt: skip
        pairs = zip(logits, rows, labels, strict=True)
        return sum(functional.cross_entropy(of_task, known[some]) for of_task, some, known in pairs)

    base = flat({key: experts.base(key) for key in shapes}).double()
    taus = torch.stack([flat({key: experts.task_vector(key, NAMES.index(task)) for key in shapes}) for task in order])
    losses = [lambda weights, rows=rows: loss(rows, weights) for rows in chosen]
    expected = self_positioning(base, taus.double(), losses, 0.2, 0.3, 0.9)
    merged = SelfPositioning(0.9, 0.2, order, STEPS)(experts, made)
    ours = flat({key: merged.shared[key] for key in shapes})
    assert torch.allclose(ours, expected.float(), rtol=0, atol=1e-4)
    still = flat(dict(SelfPositioning(0.9, 0.2, order, STILL)(experts, made).shared))
    assert (ours - still).abs().max() > 0.01


def test_two_of_equal_length_meet_in_the_middle_of_their_arc():
    vectors = functional.normalize(drawn(2, 9), dim=1).double()
    inner = vectors @ vectors.T
    folded = folded_to(inner, torch.tensor([2.0, 2.0]).double()) @ vectors
    angle = math.acos(float(inner[0, 1]))
    assert torch.allclose(folded, vectors.sum(0) / (2 * math.cos(angle / 2)), atol=1e-12)
    assert float(folded.norm()) == pytest.approx(1)


def test_only_the_ratios_of_shares_count():
    vectors = drawn(4, 9).double()
    inner, shares = vectors @ vectors.T, torch.tensor([0.3, 1.0, 2.0, 0.7]).double()
    assert torch.allclose(folded_to(inner, shares), folded_to(inner, 5 * shares), atol=1e-12)


@pytest.mark.parametrize("share", [0.1, 1.0, 7.0])
def test_orthogonal_vectors_keep_their_length(share):
    folded = folded_to(4 * torch.eye(2).double(), torch.tensor([1.0, share]).double())
    assert float(folded.norm()) == pytest.approx(1) and folded[1] > 0


def test_one_expert_and_equal_experts_are_scaled():
    base, experts = family(1, tower())
    for count in (1, 3):
        found = opened(base, experts * count)
        (ours,) = models(SelfPositioning(0.5, train=STILL)(found, context(found)))
        tau = {key: experts[0][key] - base[key] for key in ours}
        assert all(torch.allclose(ours[key], base[key] + 0.5 * tau[key], rtol=0, atol=1e-5) for key in ours)


def test_the_order_is_by_name_and_matters():
    experts, made = separable()
    by_name, other = (SelfPositioning(order=order, train=STILL)(experts, made).shared
                      for order in (None, ["red", "green", "blue"]))  # fmt: skip
    same = SelfPositioning(order=["blue", "green", "red"], train=STILL)(experts, made).shared
    assert all(torch.equal(by_name[key], same[key]) for key in same)
    assert any(not torch.allclose(by_name[key], other[key], atol=1e-3) for key in same)


def test_what_was_learned_under_other_names_is_not_used_again(tmp_path):
    """The order is by name."""
    experts, made = separable()
    renamed, cache = replace(experts, tasks=("a", "b", "c")), Cache(tmp_path)
    method = SelfPositioning(train=STILL)
    fresh = method(renamed, made).shared
    for some in (experts, renamed):
        again = method(replace(some, cache=cache), made).shared
    assert all(torch.equal(fresh[key], again[key]) for key in fresh)


def test_the_penalty_shortens():
    experts, made = separable()
    long, short = (SelfPositioning(penalty=penalty, train=STEPS)(experts, made).shared for penalty in (0.0, 1.0))
    assert flat(dict(short)).norm() < flat(dict(long)).norm()


class TestBadInput:
    def test_no_samples(self):
        with pytest.raises(UserError, match="uses labelled calibration inputs"):
            SelfPositioning()(opened(*family(2, tower())), ALONE)

    def test_no_labels(self):
        experts, made = separable()
        with pytest.raises(UserError, match="there are no labels here"):
            SelfPositioning()(experts, replace(made, data=Made(made.data.unlabelled)))
        assert SelfPositioning(train=Descent([Entropy()])).needs == "inputs"

    def test_an_order_of_other_tasks(self):
        experts, made = separable()
        with pytest.raises(
            UserError, match=r"self_positioning: order has red, red, .* are red, green, blue\. Name each"
        ):
            SelfPositioning(order=["red", "red", "blue"])(experts, made)
