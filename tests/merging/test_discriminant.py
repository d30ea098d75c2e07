"""The closed form of a linear gate: posteriors of Gaussians, certain by as much as they are right."""

import math
from dataclasses import replace

import pytest
import torch
from coloured import BLOCK, PARTS, PASS, coloured, fitted
from samples import BACKBONE
from test_routers import D, drawn, gate
from torch.distributions import MultivariateNormal

from merging.accounting import macs
from merging.errors import UserError
from merging.fit.discriminant import FOLDS, calibrated, discriminant
from merging.fit.gates import Discriminant, Learned
from merging.routing.gates import GateShape
from merging.routing.install import install

CLOSED = Discriminant()
F, C, EACH = 5, 3, 40


def samples(each=EACH, seed=0):
    """fp64 features of C classes, unlike in every direction, and their labels."""
    rng = torch.Generator().manual_seed(seed)
    labels = torch.arange(C).repeat_interleave(each)
    means, spread = (torch.randn(size, F, generator=rng, dtype=torch.float64) for size in (C, F))
    noise = torch.randn(len(labels), F, generator=rng, dtype=torch.float64)
    return means[labels] + noise @ (torch.eye(F) + 0.3 * spread), labels


def posterior(weight, bias, x):
    return (x @ weight.T + bias).softmax(1)


def test_it_is_the_posterior_of_gaussians_of_one_covariance():
    """Of very many samples, which are not shrunk: by densities, and not by the linear form."""
    x, labels = samples(20_000)
    means = torch.stack([x[labels == label].mean(0) for label in range(C)])
    covariance = (x - means[labels]).T @ (x - means[labels]) / len(x)
    densities = torch.stack([MultivariateNormal(mean, covariance).log_prob(x) for mean in means], 1)
    assert torch.allclose(posterior(*discriminant(x, labels, C), x), densities.softmax(1), atol=5e-3)


@pytest.mark.parametrize("each", [3, EACH])  # fewer samples than features, and more
def test_it_is_that_of_scikit_learn(each):
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

    x, labels = samples(each)
    x[:, 1] = 2.0  # never varies
    x[labels == 0, 2] = 1.0  # nor does this in one class
    expected = LinearDiscriminantAnalysis("lsqr", shrinkage="auto", priors=[1 / C] * C).fit(x.numpy(), labels.numpy())
    shares = posterior(*discriminant(x, labels, C), x)
    assert torch.allclose(shares, torch.from_numpy(expected.predict_proba(x.numpy())), atol=1e-9)


def test_long_descent_finds_the_same_certainty():
    x, labels = samples()
    weight, bias = discriminant(x, labels, C)
    within = torch.arange(EACH).repeat(C) % FOLDS
    logits = torch.empty(len(x), C, dtype=torch.float64)
    for fold in range(FOLDS):
        part = discriminant(x[within != fold], labels[within != fold], C)
        logits[within == fold] = x[within == fold] @ part[0].T + part[1]
    factor = torch.ones(1, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.SGD([factor], 0.5)
    for _ in range(500):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(logits * factor, labels).backward()
        optimizer.step()
    found, shift = calibrated(x, labels, C)
    assert torch.allclose(found, weight * factor.detach(), rtol=1e-3, atol=1e-6)
    assert torch.allclose(shift, bias * factor.detach(), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("classes", [2, C])
def test_the_order_of_tasks_plays_no_role(classes):
    x, labels = samples()
    x, labels = x[labels < classes], labels[labels < classes]
    order = torch.arange(classes).roll(1)
    plain, turned = calibrated(x, labels, classes), calibrated(x, order[labels], classes)
    assert torch.allclose(posterior(*plain, x), posterior(*turned, x)[:, order], atol=1e-6)


def test_what_says_nothing_gives_equal_weights():
    """More features than samples, none of which tells the classes: held-out samples say how little is known."""
    rng = torch.Generator().manual_seed(1)
    x, labels = torch.randn(60, 100, generator=rng, dtype=torch.float64), torch.arange(C).repeat_interleave(20)
    assert posterior(*calibrated(x, labels, C), x).max() < 0.5
    assert posterior(*discriminant(x, labels, C), x).max() > 0.9


@pytest.mark.parametrize("shape", [BLOCK, PASS, replace(PASS, after=1, features="mean_std_cls")], ids=str)
def test_a_gate_tells_tasks_apart_and_weighs_every_sample_alone(shape):
    merged = fitted(shape, CLOSED)
    model = install(BACKBONE.build(), merged)
    images = torch.cat([coloured(task, seed=1) for task in range(PARTS)])
    gate = model.gate
    with torch.no_grad():
        if shape.sees == "pass":
            w = model.weights(images)
            assert torch.equal(w.argmax(1), torch.arange(PARTS).repeat_interleave(len(images) // PARTS))
            assert torch.allclose(w, torch.cat([model.weights(image[None]) for image in images]), atol=1e-5)
        assert gate is not None and model(images).isfinite().all()


def test_padding_behind_or_in_front_plays_no_role():
    made, tokens = gate(features="mean_std_cls"), drawn(2, 3, D)
    rest, mask = drawn(2, 4, D, seed=9), torch.ones(2, 7)
    behind, front = torch.cat([tokens, rest], 1), torch.cat([rest, tokens], 1)
    mask[:, 3:] = 0
    assert torch.allclose(made(behind, mask), made(tokens), atol=1e-12)
    assert torch.allclose(made(front, mask.flip(1)), made(tokens), atol=1e-12)
    assert torch.equal(made.features(tokens)[:, -D:], tokens[:, 0])


def test_a_pass_sees_what_enters_the_block_that_it_stops_at():
    merged = fitted(replace(PASS, after=1), CLOSED)
    model, images, seen = install(BACKBONE.build(), merged), coloured(0), []
    model.blocks[1].module.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    assert torch.equal(model.seen(images), model.tokens(("enter", 1), images))
    with torch.no_grad():
        model(images, w=torch.zeros(PARTS))
    assert torch.allclose(model.seen(images), seen[-1], atol=1e-6)


def test_a_pass_costs_the_blocks_that_it_goes_through():
    whole, half, none = (macs(fitted(replace(PASS, after=after), CLOSED), BACKBONE) for after in (None, 1, 0))
    assert whole - none == BACKBONE.macs and half - none == math.ceil(BACKBONE.macs / 2)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        (GateShape(depth=2), "router=discriminant solves for a linear gate"),
        (GateShape(activation="sigmoid"), "router=discriminant solves for a linear gate"),
        (GateShape(features="mean", pool="after"), "no granularity=token, or router=task_id"),
    ],
)
def test_gates_that_have_no_closed_form(shape, message):
    with pytest.raises(UserError, match=message):
        Learned(gate=shape, train=CLOSED)


def test_too_few_samples_and_too_many_blocks():
    x, labels = samples(1)
    with pytest.raises(UserError, match=r"two samples or more of each, .* one has 1. Give more"):
        calibrated(x, labels, C)
    with pytest.raises(UserError, match=r"gate.after=2 is behind the last of the 2 blocks .* set 0 to 1, or null"):
        fitted(replace(PASS, after=2), CLOSED)
    with pytest.raises(UserError, match=r"gate.after=1 ends a static pass, and router.gate.sees=block asks for none"):
        GateShape(after=1)
