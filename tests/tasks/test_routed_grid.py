"""Scores of routed models: what a batch may change and what it may not, and for which tasks a router was trained."""

from dataclasses import replace
from functools import partial

import pytest
import small
import torch
from torch import nn
from torch.nn import functional

from merging import Cache
from merging.context import ALONE, Context
from merging.errors import UserError
from merging.experts import Experts
from merging.fit import Entropy, FeatureDistillation, MarginalEntropy
from merging.fit.gates import Gradient, Learned, Oracle, TaskId
from merging.methods import Average, Smile, Twin, Wemoe
from merging.ops import generator
from merging.routing.gates import Gate, GateShape, listening
from merging.routing.groups import grouped, k_means
from merging.routing.install import install
from tasks.data import SuiteData
from tasks.engine import Engine
from tasks.evaluate import Grid
from tasks.finetune import Recipe
from tasks.split import Split
from tasks.suite import Suite

NAMES = ("hues", "tints", "shades")
EACH, ALL = 24, 72
EARLY = GateShape(sees="early", features="mean")


@pytest.fixture(scope="module")
def suite():
    return small.suite(*NAMES)


@pytest.fixture(scope="module")
def experts(tmp_path_factory, suite):
    """Experts that are good at their own task, by another head than the others'."""
    made = small.experts(Cache(tmp_path_factory.mktemp("cache")), NAMES, Recipe(steps=60, batch=24, lr=0.01))
    return Experts.open(small.tower_state(), made, NAMES)


@pytest.fixture(scope="module")
def routed(experts):
    """By sample; a few steps leave the weights undecided, so that means of them differ."""
    return fitted(Twin(keep=0.5), experts)


def fitted(method, experts, shape=EARLY, train=None, suite=None):
    router, context = (
        Learned(gate=shape, train=train or TaskId(steps=10)),
        SuiteData(suite or small.suite(*NAMES), small.TOWER),
    )
    return router.fit(method(experts), experts, Context(context))[0]


def at(merged, granularity, groups=20, **how):
    """The same gates, asked at another granularity."""
    shape = replace(merged.routing.gate, granularity=granularity, groups=groups, **how)
    gates = [Gate(16, merged.parts, shape).eval() for _ in merged.routing.gates]
    for gate, trained in zip(gates, merged.routing.gates, strict=True):
        gate.load_state_dict(trained.state_dict())
    return replace(
        merged, routing=replace(merged.routing, granularity=granularity, gate=shape, gates=nn.ModuleList(gates))
    )


def score(merged, suite, batch=100):
    return Grid(suite, small.TOWER, Engine("cpu", batch=batch)).score(merged, "test")


@torch.no_grad()
def by_hand(merged, suite, shared):
    """Accuracies and routing matrix, where `shared` turns the weights of all images [n, G] into those that are used."""
    model = install(small.TOWER.build(), merged)
    splits = [task.split("test") for task in suite.tasks]
    images = small.TOWER.prepare(torch.cat([split.inputs for split in splits]))
    w = shared(model.weights(images))
    features = functional.normalize(model(images, w=w), dim=1).split(EACH)
    hits = {
        task.name: int(((some @ task.head().weight.T).argmax(1) == split.labels).sum()) / EACH
        for task, some, split in zip(suite.tasks, features, splits, strict=True)
    }
    return hits, [rows.double().mean(0).tolist() for rows in w.split(EACH)], w


def assert_scored(found, expected):
    hits, matrix, w = expected
    assert found.values == hits
    for row, wanted in zip(found.routing.matrix, matrix, strict=True):
        assert row == pytest.approx(wanted, abs=2e-6) and sum(row) == pytest.approx(1, abs=5e-6)
    right = [float((rows.argmax(1) == task).float().mean()) for task, rows in enumerate(w.split(EACH))]
    assert list(found.routing.accuracy.values()) == pytest.approx(right)


SAMPLE_BY_SAMPLE = [
    GateShape(),
    EARLY,
    GateShape("pass", 3, "mean"),
    GateShape("pass", features="mean_std_cls", after=0),
    GateShape(features="mean", granularity="token"),
    GateShape(depth=2, features="mean", pool="after", activation="none"),
    GateShape(top_k=1),
]


@pytest.mark.parametrize("shape", [*SAMPLE_BY_SAMPLE, None], ids=str)
def test_the_batch_size_plays_no_role(suite, experts, shape):
    merged = Smile(4, 2, 3)(experts) if shape is None else fitted(Wemoe(), experts, shape)
    one, few, many = (score(merged, suite, batch) for batch in (1, 7, 100))
    assert one.scores == few.scores == many.scores
    assert one.routing.accuracy == few.routing.accuracy == many.routing.accuracy
    for other in (few, many):
        for row, expected in zip(other.routing.matrix, one.routing.matrix, strict=True):
            assert row == pytest.approx(expected, abs=5e-6)
            assert sum(row) == pytest.approx(1, abs=1e-5) or shape.activation == "none"


def test_by_sample(suite, routed):
    assert_scored(score(routed, suite), by_hand(routed, suite, lambda w: w))


def test_a_batch_of_one_task_shares_its_weights(suite, routed):
    def shared(w, size):
        return torch.cat([some.mean(0).expand_as(some) for each in w.split(EACH) for some in each.split(size)])

    for batch, size in ((100, EACH), (7, 7), (1, 1)):
        expected = by_hand(routed, suite, partial(shared, size=size))
        assert_scored(score(at(routed, "batch"), suite, batch), expected)


def test_a_mixed_batch_shares_its_weights_between_tasks(suite, routed):
    order = torch.randperm(ALL, generator=generator("mixed"))

    def shared(w, size):
        mixed = torch.empty_like(w)
        for some in order.split(size):
            mixed[some] = w[some].mean(0)
        return mixed

    for batch in (ALL, 9, 1):
        expected = by_hand(routed, suite, partial(shared, size=batch))
        assert_scored(score(at(routed, "mixed"), suite, batch), expected)
    matrix = score(at(routed, "mixed"), suite, ALL).routing.matrix
    assert matrix[0] == matrix[1] == matrix[2]


def test_block_gates_in_mixed_batches_of_one_are_per_sample(suite, experts):
    merged = fitted(Wemoe(), experts, GateShape())
    expected, found = score(merged, suite), score(at(merged, "mixed"), suite, 1)
    assert found.scores == expected.scores and found.routing.accuracy == expected.routing.accuracy


@pytest.mark.parametrize("batch", [7, 100])
def test_as_many_groups_as_images_are_per_sample(suite, routed, batch):
    assert score(at(routed, "group", ALL), suite, batch) == score(routed, suite, batch)
    assert_scored(score(at(routed, "group", 1000), suite, batch), by_hand(routed, suite, lambda w: w))


def test_a_group_shares_its_weights(suite, routed):
    """With fewer groups than tasks there is one for every part that is the largest of some image."""

    def shared(w):
        best, mixed = w.argmax(1), torch.empty_like(w)
        for part in best.unique():
            mixed[best == part] = w[best == part].mean(0)
        return mixed

    for batch in (7, 100):
        assert_scored(score(at(routed, "group", 1, per_bin=False), suite, batch), by_hand(routed, suite, shared))
        assert_scored(score(at(routed, "group", 1), suite, batch), by_hand(routed, suite, shared))


@torch.no_grad()
def clustered(model, images, w, count, points):
    """Twin-Merging's appendix: bins of the largest part, `count` clusters in each, the mean of the weights."""
    logits = model.gate.logits(model.gate.features(model.seen(images)))
    seen, mixed, groups = {"logits": logits, "weights": w}[points], torch.empty_like(w), 0
    for part in logits.argmax(1).unique():
        inside = (logits.argmax(1) == part).nonzero()[:, 0]
        labels = k_means(seen[inside], count)
        groups += len(labels.unique())
        for label in labels.unique():
            some = inside[labels == label]
            mixed[some] = w[some].mean(0)
    return mixed, groups


@pytest.mark.parametrize("points", ["logits", "weights"])
def test_groups_are_those_of_the_appendix(suite, routed, points):
    """Four of every largest part, clustered by the logits unless told otherwise."""
    model, counted = install(small.TOWER.build(), routed), []
    images = small.TOWER.prepare(torch.cat([task.split("test").inputs for task in suite.tasks]))

    def shared(w, points=points):
        mixed, groups = clustered(model, images, w, 4, points)
        counted.append(groups)
        return mixed

    options = {} if points == "logits" else {"points": "weights"}
    expected = by_hand(routed, suite, shared)
    for batch in (7, 100):
        assert_scored(score(at(routed, "group", 4, **options), suite, batch), expected)
    bins = len(expected[2].argmax(1).unique())
    assert counted[0] == 4 * bins > 4
    other = by_hand(routed, suite, lambda w: shared(w, "logits" if points == "weights" else "weights"))
    assert not torch.allclose(other[2], expected[2], rtol=0, atol=1e-4)  # the choice is seen


def test_four_groups_in_all(suite, routed):
    w = by_hand(routed, suite, lambda w: w)[2]
    model = install(small.TOWER.build(), at(routed, "group", 4, per_bin=False))
    images = small.TOWER.prepare(torch.cat([task.split("test").inputs for task in suite.tasks]))
    with torch.no_grad():
        labels, means = grouped(model.gate, model.gate.logits(model.gate.features(model.seen(images))))
    assert len(means) == len(labels.unique()) == 4 > len(w.argmax(1).unique())
    mixed = lambda w: torch.stack([w[labels == label].mean(0) for label in labels])  # noqa: E731
    assert_scored(score(at(routed, "group", 4, per_bin=False), suite), by_hand(routed, suite, mixed))


def test_routed_weights_are_heard_once_per_gate_and_batch(suite, experts):
    merged = fitted(Wemoe(), experts, GateShape())
    with listening() as heard, torch.inference_mode():
        install(small.TOWER.build(), merged)(torch.randn(5, 3, 16, 16))
    assert [w.shape for w in heard] == [(5, 3)]


class TestOtherTasks:
    @pytest.mark.parametrize("names", [("tints", "hues", "shades"), ("hues", "tints"), ("hues", "tints", "colours"),
                                       ("hues", "tints", "shades", "more")])  # fmt: skip
    @pytest.mark.parametrize("kind", ["router", "oracle", "waiting", "subspace"])
    def test_are_refused(self, experts, routed, kind, names):
        waiting = Wemoe()(experts)
        merged = {"router": routed, "waiting": waiting, "subspace": Smile(4, 2)(experts),
                  "oracle": Oracle().fit(waiting, experts, ALONE)[0]}[kind]  # fmt: skip
        message = rf"for the tasks hues, tints, shades, in this order; the suite small has {', '.join(names)}\. Score"
        with pytest.raises(UserError, match=message):
            score(merged, small.suite(*names))

    def test_are_no_matter_to_a_static_merge(self, experts):
        merged = Average()(experts)
        expected, found = (score(merged, small.suite(*names)).scores for names in (NAMES, ("shades", "hues", "other")))
        assert all(found[name] == expected[name] for name in ("shades", "hues"))


@pytest.mark.parametrize(
    "train",
    [TaskId(steps=5), Gradient([Entropy(), MarginalEntropy(0.5), FeatureDistillation()], steps=3, batch=4, lr=0.01)],
)
def test_labels_play_no_role_in_training(experts, suite, train):
    """Any labels at all give the same gates."""

    class Corrupt(small.Coloured):
        def split(self, name):
            split = super().split(name)
            return Split(name, split.inputs, (split.labels + 1) % 3)

    corrupt = Suite("small", tuple(small.Colours(name, Corrupt(name)) for name in NAMES))
    fits = [fitted(Wemoe(), experts, GateShape(), train, some) for some in (suite, corrupt)]
    first, second = (merged.routing.gates.state_dict() for merged in fits)
    assert all(torch.equal(first[key], second[key]) for key in first)
