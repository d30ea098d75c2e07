"""AdaMerging against a plain loop with autograd through task vectors, and by algebra."""

from dataclasses import replace

import pytest
import torch
from coloured import separable
from samples import BACKBONE, IMAGES, Made, assert_slopes, context, family, opened, task_vectors, tower
from torch.func import functional_call

from merging import Cache
from merging.context import ALONE
from merging.errors import UserError
from merging.fit import CrossEntropy, Descent, Entropy, FeatureDistillation, LogitDistillation, MarginalEntropy
from merging.fit.coefficients import Coefficients, Shape, columns
from merging.methods import AdaMerging, TaskArithmetic
from merging.methods.ties import agreeing

STEPS = Descent(steps=3, lr=0.05, batch=IMAGES, schedule="constant")


def loop(experts, data, by_parameter, steps, lr):
    """The authors' steps: lambda in autograd, the entropies of all tasks summed, Adam. Batches are all inputs."""
    tau = {key: experts.tau(key).clone() for key in experts.specs()}
    values = torch.full((3, len(tau) if by_parameter else 1), 0.3, requires_grad=True)
    optimizer, module = torch.optim.Adam([values], lr=lr), BACKBONE.build()
    for _ in range(steps):
        weights = {key: experts.base(key) + torch.tensordot(values[:, by_parameter * i], tau[key], 1)
                   for i, key in enumerate(tau)}  # fmt: skip
        loss = torch.zeros(())
        for task in range(3):
            features = functional_call(module, weights, data.inputs(task, torch.arange(IMAGES)))
            logs = data.outputs(task, features).log_softmax(1)
            loss = loss - (logs.exp() * logs).sum(1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return {key: torch.tensordot(values.detach()[:, by_parameter * i], tau[key], 1) for i, key in enumerate(tau)}


@pytest.mark.parametrize("level", ["task", "layer"])
def test_equals_a_plain_loop(level):
    experts, context = separable()
    merged = AdaMerging(level, train=STEPS)(experts, context)
    expected = loop(experts, context.unlabelled(), level == "layer", 3, 0.05)
    assert all(torch.allclose(merged.shared[key], expected[key], rtol=0, atol=2e-5) for key in expected)
    start = TaskArithmetic(scale=0.3)(experts)
    assert max(float((merged.shared[key] - 0.3 * start.shared[key]).abs().max()) for key in expected) > 0.01


def test_the_gradient_is_that_of_the_folded_loss():
    """Finite differences in fp64 of one coefficient at a time."""
    experts, context = separable()
    shape = Shape.constant(experts, columns(experts, by_parameter=False), 0.3)
    model = Coefficients(experts, context.unlabelled(), experts.stream, shape)

    def loss():
        inputs = [model.data.inputs(task, torch.arange(IMAGES)) for task in range(3)]
        return sum(features.square().mean() for features in model.features(inputs))

    loss().backward()
    model.after()
    assert_slopes(model.free, model.free.grad.clone(), loss)


def test_what_no_expert_has_changed_has_no_gradient():
    experts, context = separable()
    frozen = experts.keys()[0]
    zeroed = lambda keys: ((key, 0 * tau if key == frozen else tau) for key, tau in experts.stream(keys))  # noqa: E731
    model = Coefficients(experts, context.unlabelled(), zeroed, Shape.constant(experts, columns(experts), 0.3))
    assert [name for name, weight in model.module.named_parameters() if not weight.requires_grad] == [frozen]
    assert torch.equal(dict(model.module.named_parameters())[frozen], experts.base(frozen))


def test_plus_plus_trims_and_elects_first():
    base, experts = family(3, tower())
    found, tau = opened(base, experts), task_vectors(base, experts)
    kept = dict(agreeing(found, 0.2))
    flat = torch.cat([tau[key].flatten(1) for key in kept], 1).float()
    count = int(0.2 * flat.shape[1]) + 1
    bound = flat.abs().sort(1, descending=True).values[:, count - 1 : count]
    trimmed = torch.where(flat.abs() >= bound, flat, 0)
    signs = trimmed.sum(0).sign()
    signs[signs == 0] = signs.sum().sign()
    expected = torch.where(trimmed * signs > 0, trimmed, 0)
    assert torch.equal(torch.cat([kept[key].flatten(1) for key in kept], 1), expected)
    merged = AdaMerging("task", density=0.2, train=replace(STEPS, lr=1e-9))(found, context(found))
    assert all(torch.allclose(merged.shared[key], 0.3 * kept[key].sum(0), rtol=0, atol=1e-5) for key in kept)


def test_coefficients_stay_in_their_interval_where_asked():
    experts, context = separable()
    key, train = "visual.conv1.weight", replace(STEPS, lr=0.9)
    tau = experts.tau(key).flatten(1)

    def coefficients(clamp):
        merged = AdaMerging("task", init=0.5, clamp=clamp, train=train)(experts, context)
        return torch.linalg.lstsq(tau.T, merged.shared[key].flatten()[:, None]).solution

    free, held = coefficients(False), coefficients(True)
    assert not ((free >= -1e-5) & (free <= 1 + 1e-5)).all()
    assert ((held >= -1e-5) & (held <= 1 + 1e-5)).all()


def test_learned_once_per_content_and_recorded(tmp_path):
    experts, context = separable()
    experts = replace(experts, cache=Cache(tmp_path / "cache"))
    method, steps = AdaMerging("task", train=STEPS), []
    noting = replace(context, log=lambda values, step: steps.append(values)).acting("mine", method)
    first = method(experts, noting)
    assert [list(values) for values in steps] == [["ada_merging/entropy"]] * 3
    again = method(experts, noting)
    assert len(steps) == 3 and all(torch.equal(first.shared[key], again.shared[key]) for key in first.shared)
    assert context.opened.splits == {"calibration": ["mine"]}
    other = replace(method, split="test")
    other(experts, noting.acting("other", other))
    assert len(steps) == 6 and context.opened.splits["test"] == ["other"]


def test_a_killed_descent_goes_on(tmp_path):
    experts, context = separable()
    whole = AdaMerging("task", train=STEPS)(experts, context)

    def killed(values, step):
        if step == 1:
            raise KeyboardInterrupt

    import merging.fit.descent as module

    seconds, module.SECONDS = module.SECONDS, -1.0
    try:
        kept = replace(context, unfinished=Cache(tmp_path / "unfinished"))
        with pytest.raises(KeyboardInterrupt):
            AdaMerging("task", train=STEPS)(experts, replace(kept, log=killed))
        steps = []
        again = AdaMerging("task", train=STEPS)(experts, replace(kept, log=lambda values, step: steps.append(step)))
    finally:
        module.SECONDS = seconds
    assert steps == [1, 2]
    assert all(torch.equal(whole.shared[key], again.shared[key]) for key in whole.shared)


@pytest.mark.parametrize("objective", [MarginalEntropy(), FeatureDistillation(), LogitDistillation(temperature=2.0)])
def test_other_objectives_fall(objective):
    experts, context = separable()
    losses = []
    noting = replace(context, log=lambda values, step: losses.extend(values.values()))
    AdaMerging("layer", train=replace(STEPS, objectives=[objective], lr=0.02, steps=6))(experts, noting)
    assert losses[-1] < losses[0]


class TestLabels:
    METHOD = AdaMerging("task", train=replace(STEPS, objectives=[Entropy(0.1), CrossEntropy()]))

    def test_are_opened_where_an_objective_needs_them(self):
        experts, context = separable()
        known = context.acting("mine", self.METHOD)
        assert self.METHOD.needs == "labels" and AdaMerging().needs == "inputs"
        self.METHOD(experts, known)
        assert context.opened.splits["calibration"] == ["mine with labels"]

    def test_are_refused_where_there_are_none(self):
        experts, context = separable()
        with pytest.raises(UserError, match=r"labelled calibration inputs .* no labels here"):
            self.METHOD(experts, replace(context, data=Made(context.data.unlabelled)))


class TestBadInput:
    def test_no_data(self):
        with pytest.raises(UserError, match="uses unlabelled calibration inputs"):
            AdaMerging()(opened(*family(2, tower())), ALONE)

    def test_no_objective(self):
        with pytest.raises(UserError, match="no objective with a weight"):
            Descent(objectives={"entropy": Entropy(0.0)})

    def test_a_loss_that_is_not_finite(self):
        experts, context = separable()
        broken = Made(lambda split: replace(context.unlabelled(split), heads=(lambda x: x * torch.nan,) * 3))
        with pytest.raises(UserError, match=r"loss of mine is nan at step 0: lower train.lr=0.05"):
            AdaMerging(train=STEPS)(experts, replace(context, data=broken, who="mine"))

    def test_an_unknown_level(self):
        with pytest.raises(UserError, match="Choose one of task, layer"):
            AdaMerging("block")
