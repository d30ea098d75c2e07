"""MAP: planted quadratics are found again, the front of a convex case is the known one, and what it refuses."""

from dataclasses import replace
from itertools import combinations_with_replacement

import numpy as np
import published_search as published
import pytest
import torch
from samples import applied, family, models, opened
from test_evo_merging import adapters

from merging import UserError
from merging.combined import mix_of
from merging.context import Context
from merging.fit.surrogate import Quadratic, highest, undominated, unknowns
from merging.methods import Map, TaskArithmetic
from merging.methods.map import made
from merging.methods.method import call
from merging.saving_adapter import check_adapters
from tasks.score import Score

TASKS = ("one", "two", "three")


def planted(size, bounded, seed=0):
    """A quadratic by the public code's factors, as a function of a point."""
    factors = (1 if bounded else 5) * np.random.default_rng(seed).normal(size=unknowns(size))
    return lambda point: published.map_score(point, factors, bounded)


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("bounded", [True, False])
def test_a_planted_quadratic_is_found_as_the_published_steps_have_it(size, bounded):
    score = planted(size, bounded)
    rng = np.random.default_rng(1)
    points, others = rng.uniform(size=(unknowns(size) + 3, size)), rng.uniform(size=(9, size))
    values = np.array([score(point) for point in points])
    assert bounded or values.min() < 0 or values.max() > 1
    found = Quadratic.fitted(points, values)
    assert found.bounded == bounded
    assert np.allclose(found(others), [score(point) for point in others], atol=1e-6)
    for point in others:
        steps = [found(point[None] + 1e-6 * axis) - found(point[None] - 1e-6 * axis) for axis in np.eye(size)]
        assert np.allclose(found.gradient(point), np.concatenate(steps) / 2e-6, atol=1e-5)


def bowls(*tops):
    """-(c - top)^2 for every top."""
    made = []
    for top in np.array(tops, dtype=float):
        pairs = combinations_with_replacement(range(len(top)), 2)
        squares = [-1.0 if first == second else 0.0 for first, second in pairs]
        made.append(Quadratic(np.array([*squares, *(2 * top), -(top @ top)]), False))
    return made


def test_the_front_of_two_bowls_is_the_line_between_their_tops():
    tried = np.random.default_rng(0).uniform(size=(20, 2))
    for share in (0.0, 0.3, 0.5, 1.0):
        point = highest(bowls((0.2, 0.9), (0.8, 0.1)), np.array([1 - share, share]), tried, (0.0, 1.0))
        assert np.allclose(point, (0.2 + 0.6 * share, 0.9 - 0.8 * share), atol=1e-4)
    outside = highest(bowls((1.7, -0.4)), np.ones(1), tried, (0.0, 1.0))
    assert np.allclose(outside, (1.0, 0.0), atol=1e-6)


def test_undominated_rows():
    values = np.array([[1.0, 0.0], [0.0, 1.0], [0.5, 0.5], [0.4, 0.5], [0.5, 0.5], [0.0, 0.0]])
    assert undominated(values) == [0, 1, 2]


class Bowls:
    """Data double: logistic functions of quadratics in the coefficients of a merge, which its weights tell."""

    def __init__(self, experts, tops):
        self.key = "square.weight"
        self.tau = torch.stack([experts.task_vector(self.key, task).flatten() for task in range(len(TASKS))]).double()
        self.base, self.tops = experts.base(self.key).flatten().double(), tops

    def validate(self, merged):
        change = merged.weight(self.key).flatten().double() - self.base
        c = torch.linalg.lstsq(self.tau.T, change[:, None]).solution[:, 0]
        gaps = {name: (c - torch.tensor(self.tops[name])).square().sum() for name in merged.tasks}
        return {name: Score("bowl", float(torch.sigmoid(1 - gap)), 9, 0.1) for name, gap in gaps.items()}


TOPS = {"one": (0.9, 0.1, 0.2), "two": (0.3, 0.6, 0.2), "three": (0.3, 0.2, 0.8)}


@pytest.mark.parametrize("preference", [None, {"one": 1, "two": 0, "three": 0}, {"one": 0, "two": 0, "three": 2.5}])
def test_the_preferred_point_of_the_front_is_taken(preference):
    experts = opened(*family(3), TASKS)
    merged = call(Map(preference=preference), experts, Context(Bowls(experts, TOPS)))
    front = merged.provenance["front"]
    assert len(front) > 10 and all(set(point["coefficients"]) == set(TASKS) for point in front)
    if preference is None:
        assert front[0]["coefficients"].values() != TOPS["one"]
        wanted = [front[0]["coefficients"][task] for task in TASKS]
        value = lambda c: sum(1 / (1 + np.exp(((c - np.array(top)) ** 2).sum() - 1)) for top in TOPS.values())  # noqa: E731
        nearby = np.random.default_rng(0).normal(0, 0.05, (50, 3)) + wanted
        assert value(np.array(wanted)) > max(map(value, nearby)) - 1e-6
    else:
        wanted = TOPS[max(preference, key=lambda task: preference[task])]
    by_hand = experts.base("wide.weight") + torch.tensordot(torch.tensor(wanted).float(), experts.tau("wide.weight"), 1)
    assert torch.allclose(merged.weight("wide.weight"), by_hand, atol=1e-2)
    (remark,) = merged.remarks
    predicted, scored = (
        float(part.split()[-1]) for part in (remark.split(" was predicted")[0], remark.split(" where")[0])
    )
    assert abs(predicted - scored) < 1e-3


def test_equal_coefficients_are_task_arithmetic():
    experts = opened(*family(3), TASKS)
    tops = dict.fromkeys(TASKS, (0.3, 0.3, 0.3))
    (model,) = models(call(Map(), experts, Context(Bowls(experts, tops))))
    for key, weight in TaskArithmetic(0.3)(experts).state():
        assert torch.allclose(model[key], weight, atol=2e-2), key


class Spiked(Bowls):
    """The highest scores lie where a single expert is alone, which no quadratic sees."""

    def validate(self, merged):
        scores = super().validate(merged)
        spiked = torch.allclose(merged.weight(self.key).flatten().double(), self.base + self.tau[1], atol=1e-4)
        return {name: replace(score, value=0.99) if spiked else score for name, score in scores.items()}


def test_a_scored_merge_is_taken_where_it_is_better_than_what_was_predicted():
    experts = opened(*family(3), TASKS)
    verified, published_way = (call(Map(verify=way), experts, Context(Spiked(experts, TOPS))) for way in (True, False))
    alone = experts.base("wide.weight") + experts.task_vector("wide.weight", 1)
    assert torch.allclose(verified.weight("wide.weight"), alone, atol=1e-5)
    assert verified.remarks[0] == f"a scored merge was taken: {published_way.remarks[0]}"
    assert not torch.allclose(published_way.weight("wide.weight"), alone, atol=1e-1)


def test_of_adapters_it_is_a_mix_of_their_factors():
    experts, _ = adapters(ranks=(1, 2, 3), alpha=2)
    point = {"one": 0.5, "two": -0.25, "three": 1.0}
    merged = made(experts, point)
    for key in experts.specs():
        taus = [experts.task_vector(key, task) for task in range(3)]
        by_hand = sum(number * tau for number, tau in zip(point.values(), taus, strict=True))
        assert mix_of(merged.shared, key) and torch.allclose(merged.weight(key), by_hand, atol=1e-5)
    check_adapters(experts.checkpoints, experts.tasks, Map())


def test_bad_input():
    experts = opened(*family(3), TASKS)
    for preference in ({"one": 1.0}, {"one": 1, "two": -1, "three": 1}, dict.fromkeys(TASKS, 0.0)):
        with pytest.raises(UserError, match=r"gives no weights of one, three, two\."):
            applied(Map(preference=preference), experts)
    with pytest.raises(UserError, match=r"merges=9 leaves a quadratic in 3 coefficients open\. Give 10 or more"):
        applied(Map(merges=9), experts)
    with pytest.raises(UserError, match="out of range"):
        Map(high=0.0)
    with pytest.raises(UserError, match="uses validation scores, and there are none"):
        call(Map(), experts, Context())
