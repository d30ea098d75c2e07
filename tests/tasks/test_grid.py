"""Scores are shares of right answers, and the test split is opened once, at the end."""

from types import SimpleNamespace

import pytest
import small
import torch
from torch import nn

from merging import Cache
from merging.backbones.tower import Backbone
from merging.errors import UserError
from merging.experts import Experts
from merging.methods import Average, Base, Expert, TaskArithmetic
from tasks.finetune import Recipe
from tasks.grid import Fixed, Grid, Search, accuracy
from tasks.suite import Split

NAMES = ("hues", "tints", "shades")
PLAIN = Backbone("plain", 3, {}, mean=(0.0,) * 3, std=(1.0,) * 3)


@pytest.fixture
def suite():
    return small.suite(*NAMES)


@pytest.fixture(scope="module")
def experts(tmp_path_factory):
    """Experts that are good at their own task, by another head than the others'."""
    made = small.experts(Cache(tmp_path_factory.mktemp("cache")), NAMES, Recipe(steps=60, batch=24, lr=0.01))
    return Experts.open(small.tower_state(), made, NAMES)


def pixel_task(answers, labels):
    """One-pixel images whose brightest channel is the answer of an identity tower and head."""
    images = (255 * nn.functional.one_hot(torch.tensor(answers), 3)).to(torch.uint8)[:, :, None, None]
    split = Split("test", images, torch.tensor(labels))
    return SimpleNamespace(name="pixels", head=lambda: torch.eye(3), split=lambda name: split)


def plain_score(state, task, split):
    """The same number the long way: one image at a time."""
    tower, data, right = small.TOWER.build(), task.split(split), 0
    tower.load_state_dict(state)
    for image, label in zip(data.images, data.labels, strict=True):
        with torch.no_grad():
            feature = tower((image[None].float() / 255 - 0.5) / 0.5)[0]
        logits = [float((feature / feature.norm()) @ row) for row in task.head()]
        right += logits.index(max(logits)) == int(label)
    return right / len(data.labels)


def told(table):
    """A grid double that looks scores up by scale."""
    asked = []
    score = lambda merged, split: asked.append((merged.scale, split)) or table[merged.scale]  # noqa: E731
    return SimpleNamespace(score=score, asked=asked)


@pytest.mark.parametrize("batch", [1, 3, 100])
def test_accuracy_is_the_share_of_right_answers(batch):
    task = pixel_task([0, 1, 2, 2, 0], [0, 1, 2, 0, 1])
    assert accuracy(nn.Flatten(), PLAIN, task, task.split("test"), batch) == 0.6


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_no_numbers_are_an_error(value):
    class Broken(nn.Flatten):
        def forward(self, images):
            return super().forward(images) * value

    task = pixel_task([0], [0])
    with pytest.raises(UserError, match=r"NaN or Inf on pixels \(test\)"):
        accuracy(Broken(), PLAIN, task, task.split("test"))


@pytest.mark.parametrize("method", [Base(), Average(), TaskArithmetic(0.5)])
def test_a_score_is_that_of_a_plain_loop(suite, experts, method):
    merged, heard = method(experts), []
    scores = Grid(suite, small.TOWER, batch=7).score(merged, "test", lambda *pair: heard.append(pair))

    assert scores == {task.name: plain_score(dict(merged.state()), task, "test") for task in suite.tasks}
    assert heard == list(scores.items())


def test_every_task_is_scored_with_its_own_expert(suite, experts):
    states = [{key: expert.tensor(key) for key in expert.specs()} for expert in experts.checkpoints]
    by_hand = {task.name: plain_score(state, task, "test") for task, state in zip(suite.tasks, states, strict=True)}
    grid = Grid(suite, small.TOWER)

    assert grid.score(Expert()(experts), "test") == by_hand
    assert plain_score(states[1], suite.tasks[0], "test") < min(by_hand.values())  # another's would show
    fresh = Grid(suite, small.TOWER).score(Base()(experts), "test")
    assert grid.score(Base()(experts), "test") == fresh  # towers that are used again keep nothing


def test_search_takes_the_best_and_of_equals_the_smallest(experts):
    table = {0.1: {"a": 0.2, "b": 0.4}, 0.3: {"a": 0.5, "b": 0.5}, 0.5: {"a": 0.75, "b": 0.25}, 1.0: {"a": 0.9, "b": 0}}
    grid = told(table)
    chosen, validation = Search([1.0, 0.5, 0.3, 0.1]).choose(TaskArithmetic()(experts), grid)

    assert chosen.scale == 0.3 and validation == table[0.3]
    assert sorted(grid.asked) == [(scale, "val") for scale in table]


def test_what_has_no_scale_is_not_searched(experts):
    merged, grid = Average()(experts), told({})
    assert Search([0.1, 0.2]).choose(merged, grid) == (merged, None)
    assert Fixed().choose(TaskArithmetic(0.7)(experts), grid)[0].scale == 0.7
    assert grid.asked == [] and Search([0.1]).source == "search:val" and Fixed().source == "fixed"


def test_searching_never_opens_the_test_split(suite, experts):
    Search([0.1, 0.3]).choose(TaskArithmetic()(experts), Grid(suite, small.TOWER))
    assert [set(task.asked) for task in suite.tasks] == [{"val"}] * 3


@pytest.mark.parametrize(
    ("wrong", "message"), [({"scales": []}, "scales is empty"), ({"scales": [1], "split": "test"}, "Choose on val")]
)
def test_a_search_that_would_cheat_or_try_nothing_is_refused(wrong, message):
    with pytest.raises(UserError, match=message):
        Search(**wrong)
