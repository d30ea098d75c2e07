"""PWE-MoE against its published steps with autograd, and by algebra."""

from dataclasses import replace

import pytest
import torch
from coloured import separable
from published_preferences import pwe_moe
from samples import BACKBONE, Made, family, models, opened, tower
from torch.func import functional_call
from torch.nn import functional

from merging import Cache
from merging.context import ALONE
from merging.errors import UserError
from merging.fit import CrossEntropy, Descent
from merging.fit.preferences import Nets
from merging.methods import PweMoe, TaskArithmetic
from merging.ops import generator

STEPS = Descent([CrossEntropy()], steps=3, lr=0.05, batch=5, schedule="constant")
BLOCKS = ("0", "1")  # of the tiny tower


def module_of(key):
    """An FFN or an attention of a block, by its name."""
    parts = key.split(".")
    return (parts[3], parts[4]) if "resblocks" in parts and parts[4] in ("mlp", "attn") else None


def cross_entropies(made, seed=0, steps=3):
    data, labels, module = made.unlabelled(), made.data.labels("calibration"), BACKBONE.build()
    draws = [data.drawn(task, 5, seed) for task in range(3)]

    def loss(task, rows):
        def of(weights):
            logits = data.outputs(task, functional_call(module, weights, data.inputs(task, rows)))
            return functional.cross_entropy(logits, labels[task][rows])

        return of

    return [[loss(task, next(draw)) for task, draw in enumerate(draws)] for _ in range(steps)]


def rays(names, steps=3):
    order = [sorted(names).index(name) for name in names]
    for step in range(steps):
        drawn = -torch.rand(3, generator=generator("ray", 0, step)).log()
        yield (drawn / drawn.sum())[order]


def layers(nets, free, index):
    """W and b of every layer of one net, as nn.Linear holds them."""
    count, numbers = len(nets.tasks), free[index]
    sizes = [(count, count)] if nets.depth == 1 else [(2 * count, count), (count, 2 * count)]
    made = []
    for rows, width in sizes:
        layer, numbers = numbers[: rows * (width + 1)].view(rows, width + 1), numbers[rows * (width + 1) :]
        made.append((layer[:, :-1], layer[:, -1]))
    return made


@pytest.mark.parametrize("depth", [1, 2])
def test_equals_the_published_steps(depth):
    experts, made = separable()
    base = {key: experts.base(key).clone() for key in experts.specs()}
    taus = {key: experts.tau(key).clone() for key in base}
    modules = {key: module_of(key) for key in base}
    numbers = {module: index for index, module in enumerate(dict.fromkeys(filter(None, modules.values())))}
    assert len(numbers) == 2 * len(BLOCKS)
    nets = Nets(experts.tasks, len(numbers), depth)
    free, preference = nets.start(0.3, 0), {"red": 3.0, "blue": 1.0}
    expected = pwe_moe(
        base, taus, {key: numbers.get(module) for key, module in modules.items()},
        [layers(nets, free, index) for index in range(len(numbers))],
        cross_entropies(made), rays(experts.tasks), 0.3, [0.05] * 3, torch.tensor([0.75, 0.0, 0.25]),
    )  # fmt: skip
    (ours,) = models(PweMoe("ffn+attention", depth, preference=preference, train=STEPS)(experts, made))
    (start,) = models(TaskArithmetic(0.3)(experts))
    assert all(torch.allclose(ours[key], expected[key], rtol=0, atol=2e-4) for key in base)
    assert max(float((ours[key] - start[key]).abs().max()) for key in base) > 0.02


def test_untrained_it_is_task_arithmetic_but_for_the_spread_of_its_nets():
    experts, made = separable()
    (ours,) = models(PweMoe(train=replace(STEPS, lr=1e-12))(experts, made))
    (theirs,) = models(TaskArithmetic(0.3)(experts))
    for key in theirs:
        close = 1e-6 if module_of(key) is None else 0.02
        assert torch.allclose(ours[key], theirs[key], rtol=0, atol=close)


def test_by_default_only_ffns_have_nets():
    experts, made = separable()
    (ours,) = models(PweMoe(train=STEPS)(experts, made))
    (theirs,) = models(TaskArithmetic(0.3)(experts))
    moved = {key for key in theirs if not torch.allclose(ours[key], theirs[key], atol=1e-5)}
    assert moved and all(module_of(key)[1] == "mlp" for key in moved)


def test_learned_once_for_all_preferences(tmp_path):
    experts, made = separable()
    experts, steps = replace(experts, cache=Cache(tmp_path / "cache")), []
    noting = replace(made, log=lambda values, step: steps.append(step))
    one, other = (PweMoe(preference={name: 1.0}, train=STEPS)(experts, noting) for name in ("red", "blue"))
    assert len(steps) == 3
    assert any(not torch.allclose(one.shared[key], other.shared[key], atol=1e-4) for key in one.shared)
    without = replace(experts, cache=None)
    again = PweMoe(preference={"blue": 2.0}, train=STEPS)(without, made)
    assert all(torch.allclose(again.shared[key], other.shared[key], atol=1e-6) for key in again.shared)


class TestBadInput:
    def test_no_samples(self):
        with pytest.raises(UserError, match="uses labelled calibration inputs"):
            PweMoe()(opened(*family(2, tower())), ALONE)

    def test_no_labels(self):
        experts, made = separable()
        with pytest.raises(UserError, match="there are no labels here"):
            PweMoe()(experts, replace(made, data=Made(made.data.unlabelled)))

    @pytest.mark.parametrize(
        ("preference", "message"),
        [({"cyan": 1.0}, "names cyan, and the tasks are red, green, blue"), ({"red": 0.0}, "one of them above 0"),
         ({"red": -1.0, "blue": 2.0}, "shares of 0 or more"), ({"red": float("nan")}, "shares of 0 or more")],
    )  # fmt: skip
    def test_preferences(self, preference, message):
        experts, made = separable()
        with pytest.raises(UserError, match=message):
            PweMoe(preference=preference)(experts, made)
