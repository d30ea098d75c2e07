"""The search for numbers by validation scores: what it finds, that it repeats itself, and what it refuses."""

import sys
from dataclasses import replace

import pytest
from samples import Made, context, family, opened

from merging import Cache, UserError
from merging.context import ALONE, Context, Opened
from merging.fit.black_box import Axis, BlackBox, Evolution, Validation, mean, signed
from merging.methods import EvoMerging, TaskArithmetic
from merging.methods.method import call
from tasks.score import Score

AXES = {"a": Axis(0.0, 1.0, 0.9), "b": Axis(1e-3, 1e3, 1.0, True), "c": Axis(-2.0, 2.0, 0.1)}


def hill(point):
    """Highest where a = 0.3, b = 0.1, c = -1."""
    return -sum((AXES[name].share(point[name]) - AXES[name].share(top)) ** 2
                for name, top in (("a", 0.3), ("b", 0.1), ("c", -1.0)))  # fmt: skip


def seen(search, value=hill, axes=AXES, seed=3):
    points, told = [], []

    def noted(point):
        points.append(point)
        return value(point)

    best = search.best(noted, axes, Context(seed=seed, log=lambda values, step: told.append((step, values))))
    return best, points, told


@pytest.mark.parametrize("sampler", ["tpe", "cma_es", "random"])
def test_it_starts_at_the_start_and_climbs(sampler):
    best, points, told = seen(BlackBox(60, sampler))
    assert points[0] == {"a": 0.9, "b": 1.0, "c": 0.1} and len(points) == len(told) == 60
    assert best.value == max(map(hill, points)) == hill(best.point) and best.start == hill(points[0])
    assert best.value > (-0.02 if sampler != "random" else best.start)
    assert all(axis.low <= point[name] <= axis.high for point in points for name, axis in AXES.items())
    assert [step for step, _ in told] == [*range(60)] and told[-1][1]["search/best"] == best.value


@pytest.mark.parametrize("sampler", ["tpe", "cma_es"])
def test_the_seed_decides_and_the_order_of_axes_does_not(sampler):
    search = BlackBox(20, sampler)
    first, turned = seen(search), seen(search, axes=dict(reversed(AXES.items())))
    assert first[1] == turned[1] and first[0].value == turned[0].value
    assert seen(search, seed=4)[1][1:] != first[1][1:]


def test_the_first_of_equals_is_taken_and_one_trial_is_the_start():
    assert (
        seen(BlackBox(12), lambda point: 1.0)[0].point == seen(BlackBox(1))[0].point == {"a": 0.9, "b": 1.0, "c": 0.1}
    )


def hills(point):
    """One top at a = 0.2 and another at 0.8, where b is 0.1: a front between them."""
    away = (AXES["b"].share(point["b"]) - AXES["b"].share(0.1)) ** 2
    return -((point["a"] - 0.2) ** 2) - away, (point["a"] - 0.8) ** 2 + away


def evolved(search=Evolution(200, 10), axes=AXES, seed=3):  # noqa: B008
    starts, told = [{"a": 0.9, "b": 1.0, "c": 0.1}, {"a": 0.0, "b": 1.0, "c": 0.0}], []
    asked = Context(seed=seed, log=lambda values, step: told.append((step, values)))
    goals = {"left": "maximize", "right": "minimize"}
    return search.tried(hills, goals, axes, starts, asked, "both"), told


def test_evolution_starts_at_the_starts_and_comes_nearer_to_the_front():
    tried, told = evolved()
    assert [trial.point for trial in tried[:2]] == [{"a": 0.9, "b": 1.0, "c": 0.1}, {"a": 0.0, "b": 1.0, "c": 0.0}]
    assert len(tried) == 200 and all(trial.values == hills(trial.point) for trial in tried)
    assert told[-1] == (199, {"both/left": tried[-1].values[0], "both/right": tried[-1].values[1]})
    distance = lambda some: sum((AXES["b"].share(trial.point["b"]) - 1 / 3) ** 2 for trial in some)  # noqa: E731
    assert distance(tried[-50:]) < distance(tried[:50])


def test_the_seed_decides_evolution_and_the_order_of_axes_does_not():
    first, turned, other = (evolved(**more)[0] for more in ({}, {"axes": dict(reversed(AXES.items()))}, {"seed": 4}))
    assert first == turned and first[:2] == other[:2] and first[2:] != other[2:]


class Counted:
    """Data double whose scores are a merge's coefficient, up to a kill."""

    def __init__(self, most=None):
        self.asked, self.most = [], most

    def validate(self, merged):
        if len(self.asked) == self.most:
            raise KeyboardInterrupt
        self.asked.append(merged.scale)
        return {"up": Score("accuracy", 0.5, 9, 0.1), "down": Score("mse", (merged.scale - 0.3) ** 2, 9, 0.1, False)}


def searched(data, unfinished=None):
    experts = opened(*family(2))
    asked = Context(data, unfinished=unfinished, who="method=mine", opened=Opened())
    scores = Validation(lambda point: TaskArithmetic(point["scale"])(experts), TaskArithmetic(), asked)
    found = BlackBox(15).best(lambda point: mean(scores(point)), {"scale": Axis(0.0, 1.0, 1.0)}, asked)
    return found, asked


def test_a_killed_search_goes_on_and_ends_as_one_that_was_not(tmp_path):
    whole, cache = Counted(), Cache(tmp_path)
    best, _ = searched(whole)
    first, second, third = Counted(6), Counted(), Counted()
    with pytest.raises(KeyboardInterrupt):
        searched(first, cache)
    again, _ = searched(second, cache)
    assert again == best and first.asked + second.asked == whole.asked
    last, asked = searched(third, cache)
    assert last == best and not third.asked and asked.opened.splits == {"val": ["method=mine with labels"]}


def test_a_point_is_scored_once():
    data = Counted()
    scores = Validation(
        lambda point: TaskArithmetic(point["scale"])(opened(*family(2))), TaskArithmetic(), Context(data)
    )
    assert scores({"scale": 0.5}) == scores({"scale": 0.5}) == {"up": 0.5, "down": -((0.5 - 0.3) ** 2)}
    assert data.asked == [0.5]


def test_lower_is_better_counts_as_its_negative():
    scores = {"a": Score("accuracy", 0.25, 9, 0.1), "b": Score("mse", 0.5, 9, 0.1, False)}
    assert signed(scores) == {"a": 0.25, "b": -0.5} and mean(signed(scores)) == -0.125


@pytest.mark.parametrize("trials", [0, -3, 2.5])
def test_no_trials_are_refused(trials):
    with pytest.raises(UserError, match=r"trials=.* asks for no trial\. Give 1"):
        BlackBox(trials)


def test_other_bad_input():
    experts = opened(*family(2))
    for wrong in ({"sampler": "grid"}, {"sigma": 0.0}):
        with pytest.raises(UserError, match=r"is unknown|out of range"):
            BlackBox(**wrong)
    with pytest.raises(UserError, match="uses validation scores, and there are none here"):
        call(EvoMerging(), experts, ALONE)
    with pytest.raises(UserError, match="uses validation scores, and these data have none: labels are needed"):
        call(EvoMerging(), experts, Context(Made(None)))
    with pytest.raises(UserError, match="opens the labelled val inputs, but says that it needs nothing"):
        call(EvoMerging(), experts, context(experts).acting("method=mine", TaskArithmetic()))


@pytest.mark.parametrize("package", ["optuna", "cmaes"])
def test_a_missing_package_is_named(package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    experts = opened(*family(2))
    with pytest.raises(UserError, match=r"needs the packages optuna and cmaes\. .*'duet-merging\[search\]'"):
        call(EvoMerging(), experts, context(experts))


def test_the_context_says_what_a_method_that_searches_opens():
    method = replace(EvoMerging(), keeping=BlackBox(1), weighing=BlackBox(2))
    experts = opened(*family(2))
    asked = context(experts).acting("method=mine", method)
    assert asked.needs == "labels" and asked.splits == ("val",)
    call(method, experts, asked)
    assert asked.opened.splits == {"val": ["method=mine with labels"]}
