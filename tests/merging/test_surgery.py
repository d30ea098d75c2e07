"""Representation Surgery against its published steps, and by algebra."""

from dataclasses import replace

import pytest
import torch
from coloured import NAMES, Coloured, separable
from published_masks import surgery
from samples import BACKBONE, IMAGES, context, family, models, opened, tower

from merging.context import ALONE
from merging.errors import UserError
from merging.fit import CrossEntropy, Descent, Entropy, FeatureL1
from merging.merged import Routing
from merging.methods import Average, Emr, Surgery, TaskArithmetic

STEPS = Descent([FeatureL1()], steps=4, lr=0.05, batch=7, schedule="constant")


def features(state, data, task):
    module = BACKBONE.build()
    module.load_state_dict(state, strict=False)
    with torch.no_grad():
        return module(data.inputs(task, torch.arange(IMAGES)))


def test_equals_the_published_steps():
    experts, made = separable()
    data, merged = made.unlabelled(), Surgery(rank=3, train=STEPS)(experts, made)
    start = Surgery(rank=3, train=replace(STEPS, lr=1e-12))(experts, made)
    (encoder,) = models(TaskArithmetic()(experts))
    for task, name in enumerate(experts.tasks):
        draw = data.drawn(task, 7, made.seed)
        expert = {key: experts.base(key) + experts.task_vector(key, task) for key in experts.specs()}
        expected = surgery(
            features(encoder, data, task), features(expert, data, task),
            start.corrections[name].down, torch.zeros(8, 3), [next(draw).tolist() for _ in range(4)], 0.05,
        )  # fmt: skip
        for numbers, leaf in zip(expected, (merged.corrections[name].down, merged.corrections[name].up), strict=True):
            assert torch.allclose(leaf, numbers, rtol=0, atol=1e-4)
        assert merged.corrections[name].up.abs().max() > 0.01


def test_the_encoder_is_that_of_the_method_behind_at_its_coefficient():
    experts, made = separable()
    merged = Surgery(TaskArithmetic(0.7), train=STEPS)(experts, made)
    (ours,), (theirs,) = models(merged), models(TaskArithmetic(0.7)(experts))
    assert all(torch.allclose(ours[key], theirs[key], rtol=0, atol=1e-6) for key in theirs)
    assert merged.scale is None and merged.routing == Routing("oracle")
    assert {*merged.corrections} == {*experts.tasks}


def test_a_task_learns_as_if_it_were_alone():
    """On an encoder that does not depend on the others: the base."""
    experts, made = separable()
    alone = opened({key: experts.base(key) for key in experts.specs()},
                   [{key: experts.checkpoints[0].tensor(key) for key in experts.specs()}], NAMES[:1])  # fmt: skip
    whole = Surgery(TaskArithmetic(0.0), train=STEPS)(experts, made).corrections["red"]
    single = Surgery(TaskArithmetic(0.0), train=STEPS)(alone, context(alone, Coloured(alone))).corrections["red"]
    assert torch.allclose(whole.up, single.up, rtol=0, atol=1e-5) and whole.up.any()


def test_experts_equal_to_the_merge_leave_features_as_they_are():
    base, _ = family(0, tower())
    found = opened(base, [dict(base), dict(base)])
    losses = []
    noting = replace(context(found), log=lambda values, step: losses.append(values["surgery/l1"]))
    Surgery(Average(), train=replace(STEPS, steps=1))(found, noting)
    assert losses[0] < 1e-5  # rounding: two forwards of one model may differ in the last digit


def test_the_loss_falls():
    experts, made = separable()
    losses = []
    noting = replace(made, log=lambda values, step: losses.append(values["surgery/l1"]))
    Surgery(train=replace(STEPS, steps=60, lr=0.02, batch=IMAGES))(experts, noting)
    assert losses[-1] < 0.7 * losses[0]


class TestBadInput:
    def test_no_inputs(self):
        with pytest.raises(UserError, match="uses unlabelled calibration inputs"):
            Surgery()(opened(*family(2, tower())), ALONE)

    def test_what_is_behind_it_must_be_one_model(self):
        experts, made = separable()
        with pytest.raises(UserError, match="What surgery corrects must be a static method"):
            Surgery(Emr())(experts, made)

    def test_labels_are_asked_for_where_an_objective_needs_them(self):
        assert Surgery().needs == Surgery(train=Descent([Entropy()])).needs == "inputs"
        assert Surgery(train=Descent([CrossEntropy()])).needs == "labels"
