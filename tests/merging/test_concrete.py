"""Concrete Subspace Learning against its published steps with autograd, and by algebra."""

from dataclasses import replace

import pytest
import torch
from coloured import separable
from published_masks import adam, concrete, concrete_adamerging, moved, relaxed
from samples import BACKBONE, context, family, models, opened, tower
from torch.func import functional_call

from merging.context import ALONE
from merging.errors import UserError
from merging.fit import Descent, Entropy
from merging.fit.coefficients import Shape, columns
from merging.fit.masks import Masks, mask_of
from merging.methods import AdaMerging, Concrete, TaskArithmetic
from merging.ops import generator

STEPS = Descent([Entropy()], steps=3, lr=0.05, batch=5, schedule="constant")


def taken(experts):
    """Weights of the base and task vectors by parameter."""
    return ({key: experts.base(key).clone() for key in experts.specs()},
            {key: experts.tau(key).clone() for key in experts.specs()})  # fmt: skip


def entropies(experts, data, seed, steps=3):
    """Of every step the summed entropies of all tasks on their batches, as a function of weights."""
    module, draws = BACKBONE.build(), [data.drawn(task, 5, seed) for task in range(len(experts.tasks))]
    chosen = [[next(draw) for draw in draws] for _ in range(steps)]

    def loss(rows, weights):
        total = torch.zeros(())
        for task, some in enumerate(rows):
            probabilities = data.outputs(task, functional_call(module, weights, data.inputs(task, some))).softmax(1)
            total = total - (probabilities * probabilities.log()).sum(1).mean()
        return total

    return [lambda weights, rows=rows: loss(rows, weights) for rows in chosen]


def uniforms(experts, seed, *names):
    specs = experts.specs()
    return [{key: torch.rand(specs[key].shape, generator=generator("mask", seed, name, key)) for key in specs}
            for name in names]  # fmt: skip


def changes(weights, base):
    return {key: weight - base[key] for key, weight in weights.items()}


def test_task_arithmetic_equals_the_published_steps():
    experts, made = separable()
    base, taus = taken(experts)
    losses, noise = entropies(experts, made.unlabelled(), 0), uniforms(experts, 0, 0, 1, 2, "final")
    logits = concrete(base, taus, losses, noise[:3], 0.3, 0.5, 0.05)
    assert max(float(x.abs().max()) for x in logits.values()) > 0.1
    expected = changes(moved(base, taus, torch.full((3, 1), 0.3), relaxed(logits, noise[3], 0.5)), base)
    merged = Concrete(train=STEPS)(experts, made)
    assert merged.scale == 0.3
    assert all(torch.allclose(0.3 * merged.shared[key], expected[key], rtol=0, atol=2e-4) for key in expected)


@pytest.mark.parametrize("level", ["task", "layer"])
def test_ada_merging_equals_the_published_steps(level):
    experts, made = separable()
    base, taus = taken(experts)
    data, noise = made.unlabelled(), uniforms(experts, 0, 0, 1, 2, "final")
    init = torch.full((3, len(base) if level == "layer" else 1), 0.3)
    inner, outer = entropies(experts, data, "0 inner"), entropies(experts, data, 0)
    logits = concrete_adamerging(base, taus, inner, outer, noise[:3], init, 0.5, 0.01, 0.2)
    masks, values = relaxed(logits, noise[3], 0.5), init.clone().requires_grad_()
    moments = torch.zeros_like(init), torch.zeros_like(init)
    for step, loss in enumerate(outer, 1):
        (gradient,) = torch.autograd.grad(loss(moved(base, taus, values, masks)), values)
        adam(values, gradient, moments, step, 0.05)
    expected = changes(moved(base, taus, values.detach(), masks), base)
    method = Concrete(level, inner_lr=0.2, train=replace(STEPS, lr=0.01), adapt=STEPS)
    merged = method(experts, made)
    assert merged.scale is None
    assert all(torch.allclose(merged.shared[key], expected[key], rtol=0, atol=5e-4) for key in expected)


def test_equal_logits_are_task_arithmetic_and_ada_merging():
    experts, made = separable()
    still = replace(STEPS, lr=1e-12)
    ours, theirs = Concrete(mask="expected", train=still)(experts, made), TaskArithmetic(0.3)(experts)
    for mine, other in zip(models(ours), models(theirs), strict=True):
        assert all(torch.allclose(mine[key], other[key], rtol=0, atol=1e-6) for key in other)
    learned = Concrete("layer", mask="expected", train=still, adapt=STEPS)(experts, made)
    plain = AdaMerging("layer", train=STEPS)(experts, made)
    assert all(torch.allclose(learned.shared[key], plain.shared[key], rtol=0, atol=1e-5) for key in plain.shared)


def test_masks_have_mean_one_and_follow_their_seed():
    logits = torch.linspace(-2, 2, 4000)
    for draw in ("relaxed", "discrete", "expected"):
        mask = mask_of(logits, draw, 0.5, 1)
        assert float(mask.mean()) == pytest.approx(1, abs=1e-5) and (mask >= 0).all()
        assert torch.equal(mask, mask_of(logits, draw, 0.5, 1))
        assert torch.equal(mask, mask_of(logits, draw, 0.5, 2)) == (draw == "expected")
    ones = mask_of(logits, "discrete", 0.5, 1) > 0
    assert float(ones.float().mean()) == pytest.approx(float(logits.sigmoid().mean()), abs=0.03)
    assert not mask_of(torch.full((3,), -100.0), "discrete", 0.5).any()  # and not a number of none


def test_what_no_expert_has_changed_has_no_logits():
    base, experts = family(3, tower())
    key = next(iter(tower()))
    for expert in experts:
        expert[key] = base[key].clone()
    found = opened(base, experts)
    shape = Shape.constant(found, columns(found, by_parameter=False), 0.3)
    model = Masks(found, context(found).unlabelled(), shape, 0.5, 0)
    assert model.logits.keys() == found.specs().keys() - {key}
    assert not Concrete(train=STEPS)(found, context(found)).shared[key].any()


def test_the_entropy_falls():
    experts, made = separable()
    losses = []
    noting = replace(made, log=lambda values, step: losses.append(values["concrete/entropy"]))
    Concrete(train=replace(STEPS, steps=12, batch=24, lr=0.3))(experts, noting)
    assert losses[-1] < losses[0]


class TestBadInput:
    def test_no_inputs(self):
        with pytest.raises(UserError, match="uses unlabelled calibration inputs"):
            Concrete()(opened(*family(2, tower())), ALONE)

    def test_options(self):
        with pytest.raises(UserError, match=r"coefficients='block' is unknown. Choose one of fixed, task, layer"):
            Concrete("block")
        with pytest.raises(UserError, match="temperature"):
            Concrete(temperature=0.0)
