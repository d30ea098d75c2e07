"""Tasks whose experts are left out: scored with what the others gave, and looked at for nothing else."""

from dataclasses import replace

import pytest
import small
import torch
from torch.nn import functional

from merging import Cache
from merging.context import ALONE, Context
from merging.errors import UserError
from merging.experts import Experts
from merging.fit.gates import Learned, Oracle, TaskId
from merging.methods import Emr, Expert, Smile, TaskArithmetic, Twin
from merging.routing.gates import GateShape
from merging.routing.install import install
from tasks.data import SuiteData
from tasks.engine import Engine
from tasks.evaluate import Grid
from tasks.scales import Search
from tasks.score import accuracy
from tasks.suite import Suite, divided
from tasks.unseen import score_unseen

SEEN, UNSEEN = ("hues", "tints"), "shades"
EARLY = GateShape(sees="early", features="mean")


@pytest.fixture
def suite():
    return divided("small", small.suite(*SEEN, UNSEEN).tasks, [UNSEEN])


@pytest.fixture(scope="module")
def experts(tmp_path_factory):
    made = small.experts(Cache(tmp_path_factory.mktemp("cache")), SEEN, replace(small.RECIPE, steps=20, lr=0.01))
    return Experts.open(small.tower_state(), made, SEEN)


def grid(suite):
    return Grid(suite, small.TOWER, Engine("cpu"))


def fitted(method, experts, suite, shape=EARLY):
    context = Context(SuiteData(suite, small.TOWER))
    return Learned(gate=shape, train=TaskId(steps=10)).fit(method(experts), experts, context)[0]


@torch.no_grad()
def share_right(model, task, **given):
    logits = functional.normalize(model(images(task), **given), dim=1) @ task.head().weight.T
    return int((logits.argmax(1) == task.split("test").labels).sum()) / 24


def images(task):
    return small.TOWER.prepare(task.split("test").inputs)


def test_a_static_merge_is_scored_with_the_head_of_the_unseen_task(suite, experts):
    merged, (task,) = TaskArithmetic(scale=0.7)(experts), suite.held_out
    base, taus = small.tower_state(), {key: experts.tau(key) for key in experts.specs()}
    tower = small.TOWER.build()
    tower.load_state_dict({key: base[key] + 0.7 * taus[key].sum(0) if key in taus else base[key] for key in base})

    found = score_unseen(grid(suite), merged, "test")
    assert found.scores[UNSEEN].value == share_right(tower.eval(), task) and found.weights == {}


@pytest.mark.parametrize("granularity", ["sample", "mixed"])
def test_a_router_lends_the_unseen_task_parts_of_the_others(suite, experts, granularity):
    """A mixed batch is of unseen tasks alone: with one of them it is a batch of that task."""
    shape = replace(EARLY, granularity=granularity)
    merged, (task,) = fitted(Twin(keep=0.5), experts, suite, shape), suite.held_out
    model = install(small.TOWER.build(), merged)
    with torch.no_grad():
        w = model.weights(images(task))
    w = w.expand(24, -1) if granularity == "mixed" else w

    found = score_unseen(grid(suite), merged, "test")
    assert found.scores[UNSEEN].value == share_right(model, task, w=w)
    assert found.weights[UNSEEN] == pytest.approx(w.mean(0).tolist(), abs=2e-6)
    assert sum(found.weights[UNSEEN]) == pytest.approx(1, abs=5e-6) and len(found.weights[UNSEEN]) == len(SEEN)


def test_parts_of_a_task_are_added_up(suite, experts):
    found = score_unseen(grid(suite), Smile(4, 2, 1)(experts), "test")
    assert len(found.weights[UNSEEN]) == 2 and sum(found.weights[UNSEEN]) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("method", [Emr(), Expert()], ids=repr)
def test_who_is_told_the_true_task_has_nothing_for_an_unseen_one(suite, experts, method):
    assert score_unseen(grid(suite), method(experts), "test") == ({UNSEEN: None}, {})


def test_nobody_looks_at_the_unseen_task_before_it_is_scored(suite, experts):
    (task,) = suite.held_out
    search = Search([0.3, 1.0])
    references = lambda split: dict.fromkeys(SEEN, accuracy(1, 1))  # noqa: E731
    merged = search.choose(TaskArithmetic()(experts), grid(suite), references).merged
    routed = fitted(Twin(keep=0.5), experts, suite)
    scored = grid(suite).score(merged, "test")
    assert task.asked == [] and list(scored.scores) == list(SEEN)

    score_unseen(grid(suite), routed, "test")
    assert set(task.asked) == {"test"}


def test_merged_tasks_are_scored_as_without_unseen_ones(suite, experts):
    routed, alone = fitted(Twin(keep=0.5), experts, suite), Suite("small", suite.tasks)
    assert score_unseen(grid(alone), routed, "test") == ({}, {})
    assert grid(suite).score(routed, "test") == grid(alone).score(routed, "test")
    oracle = Oracle().fit(Twin(keep=0.5)(experts), experts, ALONE)[0]
    assert grid(suite).score(oracle, "test") == grid(alone).score(oracle, "test")


def test_a_suite_is_divided_in_its_own_order_and_can_be_turned_round():
    suite = divided("four", small.suite("a", "b", "c", "d").tasks, ["d", "b"])
    assert suite.names == ("a", "c") and [task.name for task in suite.held_out] == ["b", "d"]
    assert [task.name for task in suite.every] == ["a", "c", "b", "d"]
    assert suite.unseen.names == ("b", "d") and suite.unseen.unseen == suite


@pytest.mark.parametrize(
    ("held_out", "message"),
    [
        (["cars"], r"suite\.held_out names cars, no task of the suite two: a, b\."),
        (["a", "a"], r"suite\.held_out=\[a, a\] lists a task more than once"),
        (["b", "a"], r"holds out every task of the suite two: no expert is left to merge"),
    ],
)
def test_what_cannot_be_held_out_is_refused(held_out, message):
    with pytest.raises(UserError, match=message):
        divided("two", small.suite("a", "b").tasks, held_out)
