"""Localize-and-Stitch with learned masks, against the published steps and by algebra."""

from dataclasses import replace

import published_learned as published
import pytest
import torch
from coloured import separable
from samples import BACKBONE, Made, drawn
from test_learned import of_experts
from torch.func import functional_call

from merging.errors import UserError
from merging.fit.samples import opened
from merging.methods import LearnedLocalizeAndStitch, LocalizeAndStitch
from merging.methods.localize_and_stitch import stitched

METHOD = LearnedLocalizeAndStitch(0.2, 2.0, shots=3)


def short(lr=1e4, **options):
    method = replace(METHOD, **options)
    return replace(method, train=replace(method.train, steps=3, lr=lr))


def loss_of(samples, task):
    module, inputs = BACKBONE.build(), samples.data.inputs(task, torch.arange(samples.data.sizes[task]))

    def loss(weights):
        logs = samples.data.outputs(task, functional_call(module, weights, inputs)).log_softmax(1)
        return -logs[torch.arange(len(inputs)), samples.labels[task]].mean()

    return loss


def test_equals_the_published_steps():
    experts, context = separable()
    merged = short(push=0.5)(experts, context)
    samples, (base, taus) = opened(context, "calibration", "labels").few(3), of_experts(experts)
    masks = [
        published.localize(
            loss_of(samples, task), base, {key: tau[task] for key, tau in taus.items()}, 0.2, 2.0, 0.5, 3, 1e4
        )
        for task in range(3)
    ]
    changes = published.stitch(masks, taus)
    differing = sum(int((merged.shared[key] - changes[key]).abs().gt(1e-5).sum()) for key in changes)
    entries = sum(change.numel() for change in changes.values())
    assert differing < 1e-3 * entries  # logits next to 0 fall to either side
    start = short(1e-9)(experts, context)
    moved = sum(int((merged.shared[key] - start.shared[key]).abs().gt(1e-5).sum()) for key in changes)
    assert moved > 0.02 * entries


def test_without_gradients_is_the_form_without_data():
    experts, context = separable()
    merged, start = short(1e-9)(experts, context), LocalizeAndStitch(0.2)(experts)
    assert all(torch.allclose(merged.shared[key], start.shared[key], atol=1e-6) for key in start.shared)


def test_a_mask_lowers_the_loss_of_its_task():
    experts, context = separable()
    alone = replace(experts, tasks=experts.tasks[:1], checkpoints=experts.checkpoints[:1])
    one = replace(context, data=type(context.data)(alone))
    loss = loss_of(opened(one, "calibration", "labels").few(3), 0)
    before, after = (float(loss(dict(short(lr)(alone, one).state()))) for lr in (1e-9, 3e3))
    assert after < before


def test_what_all_keep_of_equal_experts_is_kept_and_disjoint_masks_add_up():
    tau, mask = drawn(5), torch.tensor([True, False, True, True, False])
    assert torch.allclose(stitched(tau.expand(3, 5), mask.expand(3, 5)), tau * mask)
    assert torch.equal(stitched(torch.stack([tau, -tau]), torch.stack([mask, ~mask])), torch.where(mask, tau, -tau))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"density": 0.0}, "learned_localize_and_stitch: density=0.0"),
        ({"bias": 0.0}, "bias=0.0"),
        ({"shots": 0}, "shots=0"),
    ],
)
def test_bad_input(options, message):
    with pytest.raises(UserError, match=message):
        LearnedLocalizeAndStitch(**options)


def test_needs_labels():
    experts, context = separable()
    with pytest.raises(UserError, match=r"labelled calibration inputs .* no labels here"):
        METHOD(experts, replace(context, data=Made(context.data.unlabelled)))
