"""What gates are trained on, against torch.distributions and the formulas written out; the collapse guard."""

import math

import pytest
import torch
from samples import BACKBONE, IMAGES, context, family, noise, opened, tower
from torch.distributions import Categorical
from torch.nn import functional

from merging.calibration import expert_features
from merging.fit.descent import collapsed, summary
from merging.fit.gates import task_loss
from merging.fit.objectives import marginal_entropy, mean_entropy


def drawn(*shape, seed=0, size=1.0):
    return size * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class TestEntropy:
    @pytest.mark.parametrize("classes", [2, 10, 397])
    def test_of_undecided_predictions(self, classes):
        for logits in (torch.zeros(4, classes), torch.full((4, classes), 88.0)):
            assert float(mean_entropy(logits)) == pytest.approx(math.log(classes), rel=1e-6)
            assert float(marginal_entropy(logits)) == pytest.approx(math.log(classes), rel=1e-6)

    def test_of_certain_predictions(self):
        """No small number inside the logarithm: zero, not almost, and no 0 times infinity."""
        certain = 1e4 * functional.one_hot(torch.tensor([0, 1, 2, 2]), 3).float()
        assert float(mean_entropy(certain)) == 0
        expected = Categorical(probs=torch.tensor([0.25, 0.25, 0.5]).double()).entropy()
        assert float(marginal_entropy(certain)) == pytest.approx(float(expected), rel=1e-6)
        assert float(marginal_entropy(certain[2:])) == 0

    @pytest.mark.parametrize("size", [0.1, 3.0, 30.0])
    def test_against_distributions_in_fp64(self, size):
        logits = drawn(16, 7, size=size)
        each = Categorical(logits=logits.double())
        assert float(mean_entropy(logits)) == pytest.approx(float(each.entropy().mean()), rel=1e-5, abs=1e-7)
        mean = Categorical(probs=each.probs.mean(0))
        assert float(marginal_entropy(logits)) == pytest.approx(float(mean.entropy()), rel=1e-5)
        assert mean_entropy(logits) <= marginal_entropy(logits)

    def test_is_computed_in_fp32(self):
        logits = drawn(16, 7).bfloat16()
        assert mean_entropy(logits).dtype == marginal_entropy(logits).dtype == torch.float32
        assert torch.equal(mean_entropy(logits), mean_entropy(logits.float()))

    def test_gradient(self):
        logits = drawn(5, 4).double().requires_grad_()
        for loss in (mean_entropy, marginal_entropy):
            (found,) = torch.autograd.grad(loss(logits), logits)
            p = logits.detach().softmax(1)
            logs = p.log() if loss is mean_entropy else p.mean(0).log().expand_as(p)
            expected = -p * (logs - (p * logs).sum(1, keepdim=True)) / len(p)
            assert torch.allclose(found, expected, atol=1e-7)


class TestTaskLoss:
    TASKS = torch.tensor([0, 2, 1, 0, 2])

    @pytest.mark.parametrize("parts", [1, 4])
    def test_of_shares_is_cross_entropy(self, parts):
        """The weights of a task's parts add up to its probability."""
        weights = drawn(5, 3 * parts).softmax(1)
        grouped = weights.double().view(5, 3, parts).sum(2)
        expected = sum(-math.log(float(row[task])) for row, task in zip(grouped, self.TASKS, strict=True)) / 5
        assert float(task_loss(weights, self.TASKS, 3, "softmax")) == pytest.approx(expected, rel=1e-5)

    @pytest.mark.parametrize("parts", [1, 4])
    def test_of_independent_weights_is_binary_cross_entropy(self, parts):
        weights, total = drawn(5, 3 * parts).sigmoid(), 0.0
        for row, task in zip(weights.double().view(5, 3, parts).mean(2).tolist(), self.TASKS.tolist(), strict=True):
            total += sum(-math.log(p if t == task else 1 - p) for t, p in enumerate(row)) / 15
        assert float(task_loss(weights, self.TASKS, 3, "sigmoid")) == pytest.approx(total, rel=1e-5)

    @pytest.mark.parametrize("activation", ["none", "soft_top_k"])
    @pytest.mark.parametrize("parts", [1, 4])
    def test_of_real_weights_is_the_squared_error(self, parts, activation):
        weights, total = drawn(5, 3 * parts), 0.0
        for row, task in zip(weights.double().view(5, 3, parts).mean(2).tolist(), self.TASKS.tolist(), strict=True):
            total += sum((w - (t == task)) ** 2 for t, w in enumerate(row)) / 15
        assert float(task_loss(weights, self.TASKS, 3, activation)) == pytest.approx(total, rel=1e-5)

    @pytest.mark.parametrize("activation", ["softmax", "sigmoid", "none"])
    def test_is_least_for_the_true_task(self, activation):
        right = functional.one_hot(self.TASKS, 3).float()
        assert float(task_loss(right, self.TASKS, 3, activation)) == pytest.approx(0, abs=1e-6)
        wrong = task_loss(right.roll(1, 1), self.TASKS, 3, activation)
        assert wrong.isfinite() and wrong > 0.5


def watched(*tasks):
    """The tasks that are suspected after steps [B, C] of each."""
    summaries = [torch.stack([summary(logits) for logits in steps]) for steps in tasks]
    return [f"task{index}" for index, steps in enumerate(summaries) if collapsed(steps)]


def sharpened(logits, steps=20, by=8.0):
    return [logits * by * step / steps for step in range(1, steps + 1)]


def pushed(classes, size, steps=20, count=16):
    """All predictions drift to the first class."""
    start, drift = drawn(count, classes), torch.zeros(classes)
    drift[0] = size
    return [start + drift * step / steps for step in range(1, steps + 1)]


class TestWatch:
    @pytest.mark.parametrize("size", [6.0, 40.0, 400.0])  # the last leaves probabilities of exactly zero
    @pytest.mark.parametrize("classes", [2, 10])
    def test_a_collapse_is_seen(self, classes, size):
        assert watched(pushed(classes, size)) == ["task0"]

    @pytest.mark.parametrize("classes", [2, 10])
    def test_certain_and_diverse_predictions_are_healthy(self, classes):
        answers = functional.one_hot(torch.arange(20) % classes, classes).float()
        assert watched(sharpened(answers, by=300.0)) == []

    def test_only_the_task_that_collapsed_is_named(self):
        healthy = sharpened(functional.one_hot(torch.arange(20) % 5, 5).float())
        assert watched(healthy, pushed(3, 20.0), healthy) == ["task1"]

    def test_what_was_so_from_the_start_did_not_collapse(self):
        """Images of one class: their predictions lie on it, but no entropy went down."""
        same = [torch.tensor([[5.0, 0, 0]]).expand(4, 3)] * 12
        assert watched(same) == [] and watched(same[::-1] + pushed(3, -4.0)) == []

    def test_half_of_the_greatest_entropy_is_the_border(self):
        """Of 16 classes used alike, 4 hold half of log 16."""
        used = lambda count: [  # noqa: E731
            scale * functional.one_hot(torch.arange(60) % count, 16).float() for scale in (1.0, 50.0, 50.0, 50.0)
        ]
        assert watched(used(3)) == ["task0"] and watched(used(5)) == []

    def test_one_step_says_nothing(self):
        assert watched(pushed(3, 50.0)[-1:]) == []


def test_features_of_the_matching_expert():
    base, experts = family(3, tower(), size=0.25, spread=0.0625)
    found = opened(base, experts, ["a", "b", "c"])
    features = expert_features(found.checkpoints, context(found).unlabelled())
    for name, state, each in zip(found.tasks, experts, features, strict=True):
        plain = BACKBONE.build()
        plain.load_state_dict({key: state[key] for key in plain.state_dict()})
        with torch.no_grad():
            expected = plain(noise(name))
        assert each.shape == (IMAGES, 8)
        assert torch.allclose(each, expected, atol=1e-6)
