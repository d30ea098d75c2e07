"""aTLAS and Expert Merging against their published steps and by algebra; what may be learned from without labels."""

from dataclasses import replace

import published_learned as published
import pytest
import torch
from coloured import separable
from samples import BACKBONE, Made, drawn, lasting
from torch.func import functional_call

from merging.cache import Cache
from merging.errors import UserError
from merging.fit import CrossEntropy, Descent, descent
from merging.fit.objectives import Batch, PseudoLabels
from merging.fit.samples import opened, trusted
from merging.methods import AdaMerging, Atlas, ExpertMerging, FwHard, TaskArithmetic

WHOLE = Descent((CrossEntropy(),), 3, None, 0.05, "constant", 0.1, "adamw", 1.0)  # three steps on all samples


def of_experts(experts):
    """Base and task vectors in memory."""
    keys = list(experts.specs())
    return {key: experts.base(key) for key in keys}, {key: experts.tau(key).clone() for key in keys}


def cross_entropy(samples):
    """Of labels, mean over samples and summed over tasks, as a function of all weights."""
    module = BACKBONE.build()

    def loss(weights):
        total = torch.zeros(())
        for task, labels in enumerate(samples.labels):
            inputs = samples.data.inputs(task, torch.arange(len(labels)))
            logs = samples.data.outputs(task, functional_call(module, weights, inputs)).log_softmax(1)
            total = total - logs[torch.arange(len(labels)), labels].mean()
        return total

    return loss


def close(merged, changes, tolerance=2e-5):
    return all(torch.allclose(merged.shared[key], changes[key], rtol=0, atol=tolerance) for key in changes)


class TestAtlas:
    @pytest.mark.parametrize(("init", "penalty", "norm", "shots"), [(0.0, 0.0, 1, None), (0.1, 0.5, 2, 3)])
    def test_equals_the_published_steps(self, init, penalty, norm, shots):
        experts, context = separable()
        merged = Atlas(init, shots, penalty, norm, WHOLE)(experts, context)
        loss = cross_entropy(opened(context, "calibration", "labels").few(shots))
        base, taus = of_experts(experts)
        changes = published.atlas(loss, base, taus, 3, 0.05, 0.1, init, penalty, norm)
        assert close(merged, changes)
        assert max(float(change.abs().max()) for change in changes.values()) > 0.01

    @pytest.mark.parametrize("init", [0.0, 0.3])
    def test_where_nothing_is_learned_is_task_arithmetic(self, init):
        experts, context = separable()
        merged = Atlas(init, train=replace(WHOLE, lr=1e-9))(experts, context)
        assert close(merged, {key: init * change for key, change in TaskArithmetic()(experts).shared.items()}, 1e-6)

    def test_labels_fall_into_place(self):
        experts, context = separable()
        losses = []
        noting = replace(context, log=lambda values, step: losses.append(values["atlas/cross_entropy"]))
        Atlas(train=replace(WHOLE, steps=8))(experts, noting)
        assert losses[-1] < losses[0]

    def test_without_labels_none_is_opened(self):
        experts, context = separable()
        method = Atlas(train=replace(WHOLE, objectives=[PseudoLabels(threshold=0.3)]))
        merged = method(experts, context.acting("mine", method))
        assert context.opened.splits == {"calibration": ["mine"]} and method.needs == "inputs"
        assert any(change.any() for change in merged.shared.values())

    def test_refuses_to_learn_from_labels_where_there_are_none(self):
        experts, context = separable()
        with pytest.raises(UserError, match=r"labelled calibration inputs .* no labels here"):
            Atlas()(experts, replace(context, data=Made(context.data.unlabelled)))
        with pytest.raises(UserError, match="atlas: shots=0 is out of range"):
            Atlas(shots=0)


def distances(experts, data):
    """Cross-entropy with the expert's predictions and squared error of features, of every task, summed over them."""
    module = BACKBONE.build()

    def loss(weights):
        total = torch.zeros(())
        for task, size in enumerate(data.sizes):
            inputs, expert = data.inputs(task, torch.arange(size)), data.model(experts.checkpoints[task])
            features = functional_call(module, weights, inputs)
            with torch.no_grad():
                known = expert(inputs)
                target = data.outputs(task, known).softmax(1)
            total = total - (target * data.outputs(task, features).log_softmax(1)).sum(1).mean()
            total = total + (features - known).square().mean()
        return total

    return loss


class TestExpertMerging:
    @pytest.mark.parametrize(("budget", "power"), [(None, 1.0), (1.5, 0.5), (0.9, 1.0)])
    def test_equals_the_published_steps(self, budget, power):
        experts, context = separable()
        method = ExpertMerging(0.2, 4, 0.5, budget, power)
        method = replace(method, train=replace(method.train, steps=3))
        merged = method(experts, context)
        base, taus = of_experts(experts)
        matrices = {key: tau for key, tau in taus.items() if tau.ndim == 3 and ".resblocks." in key}
        loss = distances(experts, opened(context, "calibration", "inputs").few(4).data)
        counts = dict.fromkeys(matrices, 1)
        steps = 3, 0.5, 1e-5, 0.2, 0.5
        alpha, changes = published.expert_merging(loss, base, matrices, *steps, counts)
        if budget is not None:
            counts = published.chunk_counts(alpha, matrices, budget, power)
            assert len(set(counts.values())) > 1
            alpha, changes = published.expert_merging(loss, base, matrices, *steps, counts)
        assert merged.shared.keys() == matrices.keys() and close(merged, changes, 1e-4)
        assert max(float((one - 0.2).abs().max()) for one in alpha.values()) > 0.05

    def test_a_state_of_the_first_descent_is_none_of_the_second(self, tmp_path, monkeypatch):
        monkeypatch.setattr(descent, "SECONDS", -1.0)
        experts, context = separable()
        method = lasting(ExpertMerging(0.2, 4, budget=1.5), 2)
        whole = method(experts, context)
        kept = method(experts, replace(context, unfinished=Cache(tmp_path)))
        assert all(torch.equal(whole.shared[key], kept.shared[key]) for key in whole.shared)

    def test_a_strong_penalty_keeps_the_start(self):
        experts, context = separable()
        merged = ExpertMerging(0.3, penalty=1e6, budget=1.0)(experts, context)
        start = TaskArithmetic(scale=0.3)(experts)
        assert all(torch.allclose(merged.shared[key], 0.3 * start.shared[key], atol=0.1) for key in merged.shared)

    def test_chunks_follow_what_is_important_and_not_its_size(self):
        experts, _ = separable()
        keys = [key for key, spec in experts.specs().items() if len(spec.shape) == 2]
        part, method = experts.part(keys), ExpertMerging(budget=3.0)
        values = {key: drawn(3, 1, seed=index).abs() for index, key in enumerate(keys)}
        counts = method.chunks(part, values)
        assert counts == method.chunks(part, {key: 0.25 * value for key, value in values.items()})
        assert 0 < sum(counts.values()) <= 3 * len(keys)
        sizes = {key: float(values[key][:, 0] @ part.tau(key).flatten(1).abs().sum(1)) for key in keys}
        assert max(counts, key=counts.get) == max(sizes, key=sizes.get)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"init": 1.0}, "expert_merging: init=1.0 is out"),
            ({"budget": 0.0}, "budget=0.0"),
            ({"samples": 0}, "samples=0"),
        ],
    )
    def test_bad_input(self, options, message):
        with pytest.raises(UserError, match=message):
            ExpertMerging(**options)

    def test_models_without_such_matrices_are_refused(self):
        experts, context = separable()
        norms = experts.part([key for key in experts.specs() if key.endswith("ln_1.weight")])
        with pytest.raises(UserError, match="no matrix of attention or FFN"):
            ExpertMerging()(norms, context)


class TestPseudoLabels:
    def test_are_trusted_or_confident(self):
        logits = torch.tensor([[5.0, 0, 0], [0.2, 0.1, 0], [0, 0.2, 0.1], [0.1, 0, 4]])
        labels = torch.tensor([-1, -1, 2, 0])
        batch = Batch(logits, lambda x: x, lambda: labels, lambda: logits)
        logs = logits.log_softmax(1)
        expected = -(logs[0, 0] + logs[2, 2] + logs[3, 0]) / 3
        assert float(PseudoLabels(threshold=0.9)(batch)) == pytest.approx(float(expected))

    def test_of_which_there_are_none_cost_nothing(self):
        batch = Batch(drawn(4, 3), lambda x: x, lambda: torch.full((4,), -1), lambda: drawn(4, 3))
        assert float(PseudoLabels(threshold=1.0)(batch)) == 0

    @pytest.mark.parametrize("method", [AdaMerging(), FwHard(objective=PseudoLabels())])
    def test_are_known_to_atlas_alone(self, method):
        method = lasting(method, 1)
        if hasattr(method, "train"):
            method = replace(method, train=Descent([PseudoLabels()], 1))
        with pytest.raises(UserError, match="pseudo_labels is for atlas"):
            method(*separable())

    def test_stand_in_for_no_labels(self):
        with pytest.raises(UserError, match=r"atlas: .* pseudo_labels beside an objective that compares with labels"):
            Atlas(train=Descent([PseudoLabels(), CrossEntropy()]))

    def test_the_base_is_trusted_where_it_is_most_certain(self):
        experts, context = separable()
        data = replace(context.unlabelled(), heads=(lambda x: x[:, :2],) * 3)
        module = data.model(experts.origin)
        for task, labels in enumerate(trusted(data, experts)):
            with torch.inference_mode():
                likelihoods = module(data.inputs(task, torch.arange(data.sizes[task])))[:, :2].softmax(1)
            for kind in range(2):  # a tenth of 24 samples of two classes is one of each
                assert labels[likelihoods[:, kind].argmax()] == likelihoods[likelihoods[:, kind].argmax()].argmax()
            assert int((labels >= 0).sum()) == 2 and int(trusted(data, experts, 0)[task].max()) == -1
