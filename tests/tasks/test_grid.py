"""Scores are shares of right answers, and the test split is opened once, at the end."""

from types import SimpleNamespace

import pytest
import small
import torch
from torch import nn

from merging import Cache
from merging.backbones.open_clip import OpenClip
from merging.context import ALONE, Context
from merging.errors import UserError
from merging.experts import Experts
from merging.fit.gates import Learned, Oracle, TaskId
from merging.merged import Routing
from merging.methods import Average, Base, Expert, TaskArithmetic, Twin, Wemoe
from merging.routing.gates import GateShape, answered, listening
from merging.routing.install import install
from tasks.data import SuiteData
from tasks.engine import Engine
from tasks.evaluate import Grid, Outcome, outcome, per_sample, routing_of
from tasks.finetune import Recipe
from tasks.heads.head import Given, ZeroShot
from tasks.score import accuracy
from tasks.split import Split
from tasks.task import LabelledTask

NAMES = ("hues", "tints", "shades")
PLAIN = OpenClip("plain", 3, {}, mean=(0.0,) * 3, std=(1.0,) * 3)


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
    return LabelledTask(
        "pixels", SimpleNamespace(classes="rgb", split=lambda name: split), Given(ZeroShot(torch.eye(3)))
    )


def plain_score(state, task, split):
    """The same number the long way: one image at a time."""
    tower, data, right = small.TOWER.build(), task.split(split), 0
    tower.load_state_dict(state)
    for image, label in zip(data.inputs, data.labels, strict=True):
        with torch.no_grad():
            feature = tower((image[None].float() / 255 - 0.5) / 0.5)[0]
        logits = [float((feature / feature.norm()) @ row) for row in task.head().weight]
        right += logits.index(max(logits)) == int(label)
    return right / len(data.labels)


@pytest.mark.parametrize("batch", [1, 3, 100])
def test_accuracy_is_the_share_of_right_answers(batch):
    task = pixel_task([0, 1, 2, 2, 0], [0, 1, 2, 0, 1])
    assert outcome(nn.Flatten(), PLAIN, task, "test", Engine("cpu", batch=batch)) == Outcome(accuracy(3, 5), None)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_no_numbers_are_an_error(value):
    class Broken(nn.Flatten):
        def forward(self, images):
            return super().forward(images) * value

    task = pixel_task([0], [0])
    with pytest.raises(UserError, match=r"NaN or Inf on pixels \(test\)"):
        outcome(Broken(), PLAIN, task, "test")


@pytest.mark.parametrize("method", [Base(), Average(), TaskArithmetic(0.5)])
def test_a_score_is_that_of_a_plain_loop(suite, experts, method):
    merged, heard = method(experts), []
    scored = Grid(suite, small.TOWER, Engine("cpu", batch=7)).score(merged, "test", lambda *pair: heard.append(pair))

    assert scored.routing is None
    scores = scored.values
    assert scores == {task.name: plain_score(dict(merged.state()), task, "test") for task in suite.tasks}
    assert heard == list(scores.items())


def test_every_task_is_scored_with_its_own_expert(suite, experts):
    states = [{key: expert.tensor(key) for key in expert.specs()} for expert in experts.checkpoints]
    by_hand = {task.name: plain_score(state, task, "test") for task, state in zip(suite.tasks, states, strict=True)}
    grid = Grid(suite, small.TOWER)

    assert grid.score(Expert()(experts), "test").values == by_hand
    assert plain_score(states[1], suite.tasks[0], "test") < min(by_hand.values())  # another's would show
    fresh = Grid(suite, small.TOWER).score(Base()(experts), "test")
    assert grid.score(Base()(experts), "test") == fresh  # towers that are used again keep nothing


@pytest.mark.parametrize("waiting", [Wemoe(), Twin(keep=1.0)])
def test_what_waits_for_a_gate_is_scored_by_the_true_task(suite, experts, waiting):
    merged = waiting(experts)
    dense = [dict(merged.state(merged.one_hot(index))) for index in range(3)]
    by_hand = {task.name: plain_score(state, task, "val") for task, state in zip(suite.tasks, dense, strict=True)}
    oracle, _ = Oracle().fit(merged, experts, ALONE)

    assert merged.routing.router == "learned" and oracle.routing == Routing("oracle")
    for each in (merged, oracle):
        assert Grid(suite, small.TOWER).score(each, "val").values == by_hand


def test_gated_scores_and_routing_are_those_of_a_plain_loop(suite, experts):
    """Image by image: ask the gate, mix the weights it gives into a dense tower, and classify."""
    router = Learned(gate=GateShape(sees="early"), train=TaskId(steps=20))
    merged, _ = router.fit(Twin(keep=0.5)(experts), experts, Context(SuiteData(suite, small.TOWER)))
    gated, dense, by_hand, right, means = install(small.TOWER.build(), merged), small.TOWER.build(), {}, {}, []
    for index, task in enumerate(suite.tasks):
        data, hits, weights = task.split("test"), 0, []
        for image, label in zip(data.inputs, data.labels, strict=True):
            with torch.no_grad(), listening() as heard:
                gated(small.TOWER.prepare(image[None]))
            weights.append(heard[0][0])
            dense.load_state_dict(dict(merged.state(weights[-1])))
            with torch.no_grad():
                hits += int((dense(small.TOWER.prepare(image[None])) @ task.head().weight.T).argmax() == label)
        by_hand[task.name] = hits / len(data)
        right[task.name] = sum(int(w.argmax()) == index for w in weights) / len(data)
        means.append(torch.stack(weights).mean(0).tolist())

    scored = Grid(suite, small.TOWER, Engine("cpu", batch=7)).score(merged, "test")
    routing = scored.routing
    assert scored.values == by_hand and routing.accuracy == pytest.approx(right)
    assert [sum(row) for row in routing.matrix] == pytest.approx([1] * 3, abs=1e-5)
    for found, expected in zip(routing.matrix, means, strict=True):
        assert found == pytest.approx(expected, abs=1e-5)
    assert len({tuple(row) for row in routing.matrix}) == 3


def test_the_weights_of_several_gates_are_averaged_image_by_image():
    class Gated(nn.Flatten):
        def forward(self, images):
            pixels = super().forward(images)
            answered(pixels)  # by sample
            answered(torch.tensor([1.0, 0.0, 0.0]))  # by batch
            answered(torch.stack([pixels, 1 - pixels], 1))  # by token
            return pixels

    task = pixel_task([0, 1, 2, 2, 0], [0, 1, 2, 0, 1])
    seen = nn.functional.one_hot(torch.tensor([0, 1, 2, 2, 0]), 3)
    expected = (seen + torch.tensor([1.0, 0.0, 0.0]) + 0.5) / 3
    score, weights = outcome(Gated(), PLAIN, task, "test", Engine("cpu", batch=2))
    assert score.value == 0.6 and torch.allclose(weights, expected)
    assert per_sample(torch.ones(3), 5).shape == per_sample(torch.ones(5, 3), 5).shape == (5, 3)


def test_the_parts_of_a_task_are_added_up():
    merged = SimpleNamespace(tasks=("a", "b"))
    a = torch.tensor([[0.2, 0.4, 0.4, 0.0], [0.3, 0.1, 0.0, 0.6]])  # 0.6 to a; 0.4 to a
    b = torch.tensor([[0.0, 0.1, 0.8, 0.1]])
    found = routing_of({"a": Outcome(accuracy(2, 2), a), "b": Outcome(accuracy(1, 2), b)}, merged)

    assert found.accuracy == {"a": 0.5, "b": 1.0}
    assert [number for row in found.matrix for number in row] == pytest.approx([0.5, 0.5, 0.1, 0.9], abs=1e-6)
    assert routing_of({"a": Outcome(accuracy(2, 2), None)}, merged) is None
