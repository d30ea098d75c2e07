"""FW-Merging, hard and soft, against the published steps with autograd, and by algebra."""

from dataclasses import replace

import pytest
import torch
from coloured import separable
from published_masks import frank_wolfe_hard, frank_wolfe_soft
from samples import BACKBONE, IMAGES, Made, context, family, models, opened, tower
from test_concrete import STEPS, entropies
from torch.func import functional_call
from torch.nn import functional

from merging.context import ALONE
from merging.errors import UserError
from merging.fit import Descent, Entropy
from merging.methods import AdaMerging, Average, Emr, FwHard, FwSoft, TaskArithmetic, TsvM
from merging.ops import generator


def weights(experts):
    """Of the base, and of every expert."""
    base = {key: experts.base(key).clone() for key in experts.specs()}
    return base, [{key: base[key] + experts.task_vector(key, task) for key in base}
                  for task in range(len(experts.tasks))]  # fmt: skip


def cross_entropy(experts, made, entropy):
    """Over all samples of all tasks: the batches of a step together."""
    data, module = made.unlabelled(), BACKBONE.build()
    labels = made.data.labels("calibration")

    def loss(state):
        total = torch.zeros(())
        for task in range(len(experts.tasks)):
            logits = data.outputs(task, functional_call(module, state, data.inputs(task, torch.arange(IMAGES))))
            probabilities = logits.softmax(1)
            part = -(probabilities * probabilities.log()).sum(1).mean() if entropy else \
                functional.cross_entropy(logits, labels[task])  # fmt: skip
            total = total + part
        return total

    return loss


def test_starts_where_the_other_method_ends():
    """Also where that one looks at queries, keys and values apart."""
    experts, made = separable()
    experts = replace(experts, separate_qkv=True)
    (ours,), (start,) = models(FwHard(TsvM(), steps=1, scale=0.0)(experts, made)), models(TsvM()(experts))
    assert all(torch.allclose(ours[key], start[key], rtol=0, atol=1e-6) for key in start)


@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("granularity", ["model", "parameter"])
def test_hard_equals_the_published_steps(granularity, entropy):
    experts, made = separable()
    base, checkpoints = weights(experts)
    (start,) = models(TaskArithmetic(0.3)(experts))
    loss = cross_entropy(experts, made, entropy)
    expected = frank_wolfe_hard(start, checkpoints, [loss] * 3, 0.9, 0.8, granularity == "parameter")
    objective = {"objective": Entropy()} if entropy else {}
    merged = FwHard(granularity=granularity, steps=3, rate=0.9, scale=0.8, batch=7, **objective)(experts, made)
    (ours,) = models(merged)
    assert all(torch.allclose(ours[key], expected[key], rtol=0, atol=1e-5) for key in base)
    assert max(float((ours[key] - start[key]).abs().max()) for key in base) > 0.05


def test_a_step_of_one_goes_to_the_chosen_expert():
    experts, made = separable()
    (ours,) = models(FwHard(steps=1, rate=1.0, scale=1.0)(experts, made))
    distances = [max(float((ours[key] - expert[key]).abs().max()) for key in ours)
                 for expert in (*weights(experts)[1], *models(TaskArithmetic(0.3)(experts)))]  # fmt: skip
    assert min(distances) < 1e-5


def test_candidates_that_are_the_start_move_nothing():
    base, experts = family(1, tower())
    found = opened(base, experts * 2)
    (ours,) = models(FwHard(Average(), steps=4)(found, context(found)))
    (expert,) = models(Average()(found))
    assert all(torch.allclose(ours[key], expert[key], rtol=0, atol=1e-5) for key in ours)


def test_the_choice_does_not_depend_on_the_size_of_gradients():
    experts, made = separable()
    plain = FwHard(granularity="parameter", steps=2)(experts, made)
    scaled = FwHard(granularity="parameter", steps=2, objective=replace(plain_objective(), weight=1e-3))(experts, made)
    assert all(torch.allclose(plain.shared[key], scaled.shared[key], rtol=0, atol=1e-6) for key in plain.shared)


def plain_objective():
    return FwHard().objective


def test_soft_equals_the_published_steps():
    experts, made = separable()
    base, checkpoints = weights(experts)
    seeds = [generator("fw_soft", 0, number).initial_seed() for number in range(3)]
    rounds = [entropies(experts, made.unlabelled(), seed) for seed in seeds]
    expected = frank_wolfe_soft(base, checkpoints, rounds, 0.3, 0.01, 0.05)
    (ours,) = models(FwSoft(rounds=3, train=STEPS)(experts, made))
    assert all(torch.allclose(ours[key], expected[key], rtol=0, atol=2e-4) for key in base)
    assert max(float((ours[key] - base[key]).abs().max()) for key in base) > 0.05


def test_one_soft_round_is_ada_merging():
    experts, made = separable()
    seed = generator("fw_soft", 0, 0).initial_seed()
    ours = FwSoft(rounds=1, train=STEPS)(experts, made)
    theirs = AdaMerging("layer", train=STEPS)(experts, replace(made, seed=seed))
    assert all(torch.equal(ours.shared[key], theirs.shared[key]) for key in theirs.shared)


def test_rounds_that_were_killed_are_not_mixed_up(tmp_path):
    from merging import Cache
    from merging.fit import descent

    experts, made = separable()
    whole = FwSoft(rounds=2, train=STEPS)(experts, made)
    count = []

    def killed(values, step):
        count.append(step)
        if len(count) == 5:
            raise KeyboardInterrupt

    seconds, descent.SECONDS = descent.SECONDS, -1.0
    try:
        kept = replace(made, unfinished=Cache(tmp_path / "unfinished"))
        with pytest.raises(KeyboardInterrupt):
            FwSoft(rounds=2, train=STEPS)(experts, replace(kept, log=killed))
        again = FwSoft(rounds=2, train=STEPS)(experts, kept)
    finally:
        descent.SECONDS = seconds
    assert all(torch.equal(whole.shared[key], again.shared[key]) for key in whole.shared)


class TestBadInput:
    def test_the_labels_that_are_scored(self):
        with pytest.raises(UserError, match=r"learn from the labels that are scored. Choose calibration, val or train"):
            FwHard(split="test")(*separable())

    def test_no_samples(self):
        found = opened(*family(2, tower()))
        with pytest.raises(UserError, match="uses labelled calibration inputs"):
            FwHard()(found, ALONE)
        with pytest.raises(UserError, match="uses unlabelled calibration inputs"):
            FwSoft()(found, ALONE)

    def test_no_labels(self):
        experts, made = separable()
        with pytest.raises(UserError, match="there are no labels here"):
            FwHard()(experts, replace(made, data=Made(made.data.unlabelled)))
        assert FwHard(objective=Entropy()).needs == FwSoft().needs == "inputs" and FwHard().needs == "labels"

    def test_a_start_that_is_no_model(self):
        experts, made = separable()
        with pytest.raises(UserError, match="Where Frank-Wolfe starts must be a static method"):
            FwHard(Emr())(experts, made)

    def test_a_loss_that_is_not_finite(self):
        experts, made = separable()
        broken = Made(lambda split: replace(made.unlabelled(split), heads=(lambda x: x * torch.nan,) * 3))
        with pytest.raises(UserError, match="loss of mine is nan at step 0"):
            FwHard(objective=Entropy())(experts, replace(made, data=broken, who="mine"))

    def test_options(self):
        with pytest.raises(UserError, match="granularity='task' is unknown"):
            FwHard(granularity="task")
        with pytest.raises(UserError, match="rounds"):
            FwSoft(rounds=0, train=Descent())
