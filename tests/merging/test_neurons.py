"""Neuron masks: which are kept, what keeping means, and how alike the masks of two tasks are."""

from dataclasses import replace

import pytest
import torch
from ffns import close, small_towers
from samples import Made, applied, context, drawn, family, opened, tower
from torch import nn

from merging import Cache, Experts, UserError
from merging import neurons as module
from merging.calibration import Calibration
from merging.context import ALONE, Context
from merging.methods import Multitask, NeuronMask
from merging.neurons import Neurons, chance, jaccard, largest_mass, largest_share, selected

TASKS, HIDDEN = 3, 6
FIRST, SECOND = "transformer.resblocks.0", "transformer.resblocks.1"


class Ffn(nn.Module):
    """One FFN without anything around it."""

    def __init__(self):
        super().__init__()
        self.c_fc, self.c_proj = nn.Linear(4, HIDDEN), nn.Linear(HIDDEN, 4)

    def forward(self, x):
        return self.c_proj(torch.relu(self.c_fc(x)))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        blocks = nn.ModuleList([nn.ModuleDict({"mlp": Ffn()}) for _ in range(2)])
        self.transformer = nn.ModuleDict({"resblocks": blocks})

    def forward(self, x):
        for block in self.transformer["resblocks"]:
            x = x + block["mlp"](x)
        return x


def hand_made():
    """Experts in whose first block neuron t, and in whose second neuron t + 3, alone fires."""
    base = {key: torch.zeros_like(tensor) for key, tensor in Model().state_dict().items()}
    experts = [{key: tensor.clone() for key, tensor in base.items()} for _ in range(TASKS)]
    for task, expert in enumerate(experts):
        expert["transformer.resblocks.0.mlp.c_fc.bias"][task] = 1
        expert["transformer.resblocks.1.mlp.c_fc.bias"][task + 3] = 2
    images = drawn(10, 5, 4)
    calibration = Calibration("calibration", ("x",) * TASKS, (10,) * TASKS, lambda t, i: images[i], (), Model, {})
    return Experts.open(base, experts), Context(Made(lambda split: calibration))


def test_an_expert_keeps_the_neurons_that_fire_for_it():
    masks = Neurons(1 / HIDDEN).masks(*hand_made())
    assert torch.equal(masks[FIRST], torch.eye(HIDDEN)[:3].bool()) and torch.equal(
        masks[SECOND], torch.eye(HIDDEN)[3:].bool()
    )
    assert torch.equal(jaccard(masks[FIRST]), torch.eye(TASKS, dtype=torch.float64))


def test_a_share_of_the_model_may_lie_in_one_block():
    """The second block's neuron fires stronger: with one of twelve kept the first block is left without any."""
    with pytest.raises(
        UserError, match=r"ratio=0.08 keeps none of the 6 hidden neurons of block transformer.resblocks.0 for task0"
    ):
        Neurons(0.08, scope="model").masks(*hand_made())
    masks = Neurons(2 / 12, scope="model").masks(*hand_made())
    assert masks[FIRST].sum() == masks[SECOND].sum() == TASKS
    with pytest.raises(UserError, match=r"Raise it to at least 0.1667, or use scope=layer"):
        Neurons(0.08).masks(*hand_made())


def test_the_base_may_be_asked_instead():
    masks = Neurons(1 / HIDDEN, source="base").masks(*hand_made())
    assert torch.equal(masks[FIRST], torch.eye(HIDDEN)[:1].bool().expand(TASKS, -1))  # all silent: of equals the first


def test_counts_are_rounded_and_ties_go_to_the_first():
    values = torch.tensor([[1.0, 3, 3, 3, 0, 2], [0.0, 0, 0, 0, 0, 0]])
    assert largest_share(values, 0.34).tolist() == [
        [False, True, True, False, False, False],
        [True, True, False, False, False, False],
    ]
    for ratio, count in ((0.1, 307), (0.125, 384), (0.3, 922), (1.0, 3072)):
        assert largest_share(drawn(2, 3072), ratio).sum(1).tolist() == [count] * 2


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("scale", ["inverse_density", "energy", "density", "none"])
def test_scaling(scale, axis):
    change = drawn(TASKS, HIDDEN, 4) if axis == 0 else drawn(TASKS, 4, HIDDEN)
    mask = torch.tensor([[1, 0, 0, 0, 0, 0], [1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1]]).bool()
    found = Neurons(scale=scale).apply(change, mask, axis)
    assert torch.equal(found[2], change[2])
    for task, density in enumerate((1 / 6, 1 / 2)):
        kept = change[task].movedim(axis, 0).clone()
        kept[~mask[task]] = 0
        kept = kept.movedim(0, axis)
        assert torch.equal(selected(change, mask, axis)[task], kept)
        factor = {
            "inverse_density": 1 / density,
            "density": density,
            "none": 1.0,
            "energy": float(change[task].norm() / kept.norm()),
        }[scale]
        assert close(found[task], factor * kept, 1e-5)
    silent = Neurons(scale="energy").apply(torch.zeros(TASKS, HIDDEN), mask, 0)
    assert torch.equal(silent, torch.zeros(TASKS, HIDDEN))


def test_a_share_of_the_mass_takes_the_fewest_neurons():
    values = torch.tensor([[4.0, 1, 3, 2, 0, 0], [1.0, 1, 1, 1, 1, 1], [0.0, 0, 0, 0, 0, 7]])
    for share in (0.1, 0.4, 0.41, 0.7, 0.99, 1.0):
        kept = largest_mass(values, share)
        for row, mask in zip(values, kept, strict=True):
            held = row[mask].sum()
            assert held >= share * row.sum() - 1e-6 and held - row[mask].min() < share * row.sum()
            assert mask.all() or row[mask].min() >= row[~mask].max()
    masks = Neurons(0.5, scope="mass").masks(*hand_made())
    assert torch.equal(masks[FIRST], torch.eye(HIDDEN)[:3].bool())  # one neuron holds everything


def test_activity_before_and_after_the_activation_function():
    experts = opened(*small_towers())
    before, after = (
        Neurons(0.5, at=at, statistic="positive").measured(experts, context(experts)) for at in ("input", "output")
    )
    assert before.keys() == after.keys()
    for block in before:
        assert torch.allclose(before[block], after[block]) and before[block].std() > 0  # GELU keeps the sign
    raw, activated = (Neurons(0.5, at=at).measured(experts, context(experts)) for at in ("input", "output"))
    assert all((raw[block] > activated[block]).all() for block in raw)  # and |GELU(x)| < |x|
    inner = Neurons(1 / HIDDEN, at="input").masks(*hand_made())
    assert torch.equal(inner[FIRST], torch.eye(HIDDEN)[:3].bool())


@pytest.mark.parametrize("axis", [0, 1])
def test_learned_factors_leave_the_least_of_the_changes(axis):
    change = drawn(TASKS, HIDDEN, 4) if axis == 0 else drawn(TASKS, 4, HIDDEN)
    mask = torch.tensor([[1, 0, 1, 0, 0, 0], [1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 0, 1]]).bool()
    kept, found = selected(change, mask, axis), Neurons(scale="learned").apply(change, mask, axis)

    def left(correction):
        return float((change - correction).double().square().sum())

    best = left(found.mean(0))
    for task in range(TASKS):
        for step in (-0.05, 0.05):
            assert left((found + step * kept * (torch.arange(TASKS) == task)[:, None, None]).mean(0)) > best
    owner = (torch.arange(HIDDEN) % TASKS == torch.arange(TASKS)[:, None]).bool()
    own = selected(change, owner, axis)
    assert close(Neurons(scale="learned").apply(own, owner, axis), own, 1e-5)  # nobody else's: the factor is 1
    none = torch.zeros(TASKS, HIDDEN, 4)
    assert torch.equal(Neurons(scale="learned").apply(none, mask, 0), none)


def test_jaccard_counts_what_two_masks_share():
    mask = torch.tensor([[1, 1, 0, 0, 0, 0], [0, 1, 1, 0, 0, 0], [0, 0, 0, 0, 0, 0]]).bool()
    assert close(jaccard(mask), torch.tensor([[1, 1 / 3, 0], [1 / 3, 1, 0], [0, 0, 1]], dtype=torch.float64), 1e-12)


@pytest.mark.parametrize(("ratio", "expected"), [(0.1, 0.053), (0.2, 0.111), (0.3, 0.176), (1.0, 1.0)])
def test_random_masks_have_the_jaccard_of_chance(ratio, expected):
    assert chance(ratio) == pytest.approx(expected, abs=5e-4)
    random = jaccard(largest_share(drawn(8, 20000), ratio))
    others = random[~torch.eye(8, dtype=torch.bool)].mean()
    # the overlap of two draws of k n of n has deviation below sqrt(n) k; the mean of 28 pairs lies within a few percent
    assert float(others) == pytest.approx(chance(ratio), rel=0.03)


def test_more_images_change_few_masks():
    """Masks from n and from 2 n of the same images agree; those of noise are stable from few on."""
    base, experts = small_towers()
    found = opened(base, experts)
    few, many = (Neurons(0.25, images=count).masks(found, context(found)) for count in (12, 24))
    for block in few:
        for one, other in zip(few[block], many[block], strict=True):
            assert jaccard(torch.stack([one, other]))[0, 1] > 0.75
    every = Neurons(0.25, images=999).masks(found, context(found))
    assert all(torch.equal(many[block], every[block]) for block in many)


def test_measured_once_per_content_and_question(tmp_path, monkeypatch):
    calls, original = [], module.activations
    monkeypatch.setattr(module, "activations", lambda *given: calls.append(given) or original(*given))
    made_by_hand, seen = hand_made()
    found = replace(made_by_hand, cache=Cache(tmp_path / "cache"))
    for neurons, made in (
        (Neurons(0.5), 1),
        (Neurons(0.2, scale="none", scope="model"), 1),
        (Neurons(0.5, statistic="rms"), 2),
        (Neurons(0.5, tokens="class"), 3),
        (Neurons(0.5, images=4), 4),
        (Neurons(0.5, source="base"), 5),
        (Neurons(0.5), 5),
    ):
        first = neurons.measured(found, seen)
        assert len(calls) == made
        assert all(torch.equal(first[block], again) for block, again in neurons.measured(*hand_made()).items())
        calls[:] = calls[:made]


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"ratio": 0.0}, r"neurons: ratio=0.0 is out of range: it must lie in \(0.0, 1.0\]"),
        ({"images": 0}, "images=0 is out of range"),
        ({"scope": "block"}, "scope='block' is unknown. Choose one of layer, model, mass"),
        ({"scope": "mass", "statistic": "mean"}, "scope=mass adds up activity, and statistic=mean has signs"),
        ({"at": "middle"}, "at='middle' is unknown. Choose one of output, input"),
        ({"scale": "sqrt"}, "scale='sqrt' is unknown"),
        ({"statistic": "max"}, "statistic='max' is unknown. Choose one of mean_abs, mean, positive, rms"),
        ({"tokens": "patches"}, "tokens='patches' is unknown. Choose one of all, class"),
        ({"source": "merged"}, "source='merged' is unknown. Choose one of expert, base"),
    ],
)
def test_unknown_names(knobs, message):
    with pytest.raises(UserError, match=message):
        Neurons(**knobs)


def test_no_images_no_masks():
    with pytest.raises(UserError, match="uses unlabelled calibration inputs"):
        Neurons().masks(Experts.open(*family(1)), ALONE)


def test_no_masks_for_a_model_that_is_none_of_the_experts():
    with pytest.raises(UserError, match="neuron_mask: then=Multitask merges all tasks, no expert"):
        applied(NeuronMask(then=Multitask()), opened(*family(2, tower())))
