"""Methods that look at what goes into layers, on every kind of architecture that has a table."""

import copy
from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import pytest
import torch
from architectures import inputs, model
from samples import Made, context, drawn, models, opened
from tiny_models import backbone

from merging import resumed
from merging.calibration import Calibration
from merging.methods import Average, Bayesian, FeatCal, Fisher, Lot, RegMean, RegMeanPp
from merging.methods.method import call
from merging.resumed import Kept

NAMES = (
    "open_clip with LayerScale",
    "CLIPVision with projection",
    "RoBERTa",
    "GPT-2",
    "T5",
    "Qwen3",
    "Gemma",
)
POOLER = ("bert.pooler.dense.weight", "bert.pooler.dense.bias")
FIXED = (RegMeanPp(), FeatCal(extrapolation=1.0, then=Average()), Bayesian(anchor=Average()), Fisher(samples=2))


def logits(module, kwargs):
    output = module(**kwargs) if isinstance(kwargs, dict) else module(kwargs)
    tensors = output.values() if isinstance(output, dict) else [output]
    return next(tensor for tensor in tensors if torch.is_tensor(tensor)).flatten(1)[:, :5]


def experts_of(name, copies=1):
    """Three experts, the first of them `copies` times in their place, and a context with one batch of inputs each."""
    base = dict(model(name).state_dict())
    tensors = list(dict.fromkeys(tensor.data_ptr() for tensor in base.values()))  # of tied ones one
    noise = lambda w, task: 0.0625 * drawn(*w.shape, seed=100 * task + tensors.index(w.data_ptr()))  # noqa: E731
    floating = {key: w for key, w in base.items() if w.is_floating_point()}
    states = [base | {key: w + noise(w, task) for key, w in floating.items()} for task in range(3)]
    states = states[:1] * 3 if copies > 1 else states
    batch = inputs(name)
    size = len(next(iter(batch.values()))) if isinstance(batch, dict) else len(batch)
    take = lambda task, some: {key: x[some] for key, x in batch.items()} if isinstance(batch, dict) else batch[some]  # noqa: E731
    data = Calibration("calibration", ("a", "b", "c"), (size,) * 3, take, (None,) * 3,
                       lambda: copy.deepcopy(model(name)), {}, read=logits)  # fmt: skip
    experts = opened(base, states, ("a", "b", "c"))
    return experts, context(experts, Made(lambda split: data)), states


@pytest.mark.parametrize("name", NAMES)
def test_equal_experts_are_a_fixed_point(name):
    experts, found, states = experts_of(name, copies=3)
    for method in FIXED:
        for key, weight in models(call(method, experts, found))[0].items():
            assert torch.allclose(weight, states[0][key], atol=1e-4), (method, key)
    ours, theirs = (answer(name, state) for state in (models(call(Lot(cutoff=1e-9), experts, found))[0], states[0]))
    assert (ours - theirs).abs().max() < 1e-3 * theirs.abs().max()


@torch.no_grad()
def answer(name, state):
    module = copy.deepcopy(model(name))
    module.load_state_dict(state, strict=False)
    return logits(module, inputs(name))[::2]  # texts without padding, which is not looked at


@pytest.mark.parametrize("name", NAMES)
def test_different_experts_are_merged_to_finite_numbers_that_are_not_their_mean(name):
    experts, found, states = experts_of(name)
    changed = [key for key in experts.keys("ffn") if key.endswith("weight")]
    assert changed
    for method in (*FIXED, Lot()):
        (merged,) = models(call(method, experts, found))
        assert all(weight.isfinite().all() for weight in merged.values())
        average = {key: sum(state[key] for state in states) / 3 for key in changed}
        assert all(not torch.allclose(merged[key], average[key], atol=1e-5) for key in changed), method


def test_a_pooler_comes_behind_the_blocks():
    made = backbone("BertForPreTraining").build()
    base = dict(made.state_dict())
    states = [base | {key: base[key] + 0.5 * drawn(*base[key].shape, seed=s) for key in POOLER} for s in range(2)]
    ids = torch.arange(3, 27).view(4, 6)
    data = Calibration("calibration", ("a", "b"), (4, 4), lambda task, some: (ids + task)[some], (None,) * 2,
                       lambda: copy.deepcopy(made), {})  # fmt: skip
    experts = opened(base, states, ("a", "b"))
    found = context(experts, Made(lambda split: data))
    merged, plain = (models(call(method, experts, found))[0] for method in (RegMeanPp(), RegMean()))
    assert all(torch.allclose(merged[key], plain[key], atol=1e-5) for key in base)
    assert not torch.allclose(merged[POOLER[0]], base[POOLER[0]], atol=1e-2)
    assert not torch.allclose(merged[POOLER[0]], (states[0][POOLER[0]] + states[1][POOLER[0]]) / 2, atol=1e-4)


@pytest.mark.parametrize("name", ["open_clip with LayerScale", "RoBERTa", "T5", "Qwen3"])
def test_what_finished_blocks_gave_is_what_they_would_give_again(name, monkeypatch):
    experts, found, _ = experts_of(name)
    before = [models(call(method, experts, found))[0] for method in FIXED[:2]]
    monkeypatch.setattr(Kept, "behind", lambda self, module, done: nullcontext())
    everything = partial(resumed.expert_weights, chosen=lambda key: True)
    monkeypatch.setattr(resumed, "expert_weights", lambda experts, task, chosen: everything(experts, task))
    for method, model_ in zip(FIXED, before, strict=False):
        for key, weight in models(call(method, experts, found))[0].items():
            assert torch.allclose(weight, model_[key], atol=1e-6), key


def test_blocks_that_are_done_are_not_run_again():
    class Counted(torch.nn.Linear):
        def forward(self, x):
            calls.append(self)
            return super().forward(x)

    module, calls = torch.nn.Sequential(*(Counted(3, 3) for _ in range(4))), []
    batches, kept = [drawn(2, 3, seed=seed) for seed in range(2)], Kept()
    expected = [module(x) for x in batches]
    for done in ([], ["0"], ["0", "1"], ["0", "1"], ["0", "1", "2"]):
        with kept.behind(module, done):
            calls.clear()
            assert all(torch.equal(module(x), y) for x, y in zip(batches, expected, strict=True))
            assert len(calls) == 2 * (4 - max(len(done) - 1, 0))
    assert all(torch.equal(module(x), y) for x, y in zip(batches, expected, strict=True))


def test_two_models_are_built_however_many_experts_and_blocks():
    """And a block that is measured runs once a batch, but for the first forwards, which run to their end."""
    experts, found, _ = experts_of("RoBERTa")
    data, built, calls = found.unlabelled(), [], []

    def tower():
        built.append(data.tower())
        for name, module in built[-1].named_modules():
            if name.endswith(".layer.1"):
                module.register_forward_pre_hook(lambda module, *_: calls.append(module))
        return built[-1]

    counted = replace(data, tower=tower)
    call(FIXED[1], experts, context(experts, Made(lambda split: counted)))
    assert len(built) <= 3  # one of them for its names alone
    assert len(calls) == 2 * len(experts.tasks) + 2  # of both models, on a batch of each task, and the first run
