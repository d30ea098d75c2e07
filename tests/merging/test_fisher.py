"""Fisher merging against the steps of public code, and by algebra."""

import published_regression as published
import pytest
import torch
from coloured import separable
from samples import IMAGES, family, models, opened, task_vectors, tower

from merging.context import ALONE
from merging.errors import UserError
from merging.methods import Fisher
from merging.methods.method import call


def known(experts, data, task, batch=32, expected=False):
    """The published information of one expert."""
    module = data.model(experts.checkpoints[task])
    images = data.inputs(task, torch.arange(IMAGES))
    return published.information(module, lambda features: data.outputs(task, features), images, batch, expected)


@pytest.mark.parametrize(("labels", "batch"), [("summed", 10), ("summed", 32), ("expected", 32)])
def test_the_information_of_an_expert(labels, batch):
    experts, context = separable()
    data = context.unlabelled()
    ours = Fisher(labels, IMAGES, batch).information(experts, data, 1)
    for key, value in known(experts, data, 1, batch, labels == "expected").items():
        assert torch.allclose(ours[key].double(), value, rtol=1e-3, atol=1e-5 * float(value.max())), key


@pytest.mark.parametrize("normalise", [True, False])
def test_equals_the_published_steps(normalise):
    experts, context = separable()
    data = context.unlabelled()
    taus = {key: experts.tau(key).double() for key in experts.keys()}  # noqa: SIM118
    expected = published.fisher(taus, [known(experts, data, task) for task in range(3)], normalise, 1e-6)
    merged = call(Fisher(normalise=normalise), experts, context)
    for key, change in expected.items():
        assert torch.allclose(merged.shared[key].double(), change, rtol=0, atol=1e-4), key


def test_every_entry_lies_between_those_of_the_experts_and_equal_experts_are_kept():
    base, experts = family(3, tower(), size=0.25, spread=0.0625)
    taus = task_vectors(base, experts)
    found, context = separable()
    merged = call(Fisher(), found, context)
    for key in taus:
        tau = found.tau(key)
        assert ((merged.shared[key] <= tau.amax(0) + 1e-6) & (merged.shared[key] >= tau.amin(0) - 1e-6)).all()
    same = opened(base, experts[:1] * 3, found.tasks)
    (model,) = models(call(Fisher(), same, context))
    assert all(torch.allclose(weight, experts[0][key], atol=1e-6) for key, weight in model.items())


def test_summed_and_expected_are_the_same_for_one_sample_of_one_output():
    experts, context = separable()
    data = context.unlabelled()
    single = data.__class__(**{**vars(data), "heads": (lambda features: features[:, :1],) * 3})
    one, other = (Fisher(labels, 1).information(experts, single, 0) for labels in ("summed", "expected"))
    assert all(torch.allclose(one[key], other[key]) for key in one) and any(value.any() for value in one.values())


def test_bad_input():
    experts, _ = separable()
    with pytest.raises(UserError, match="uses unlabelled calibration inputs"):
        call(Fisher(), experts, ALONE)
    for wrong in ({"labels": "drawn"}, {"batch": 0}, {"floor": 0.0}):
        with pytest.raises(UserError, match=r"is unknown|out of range"):
            Fisher(**wrong)
