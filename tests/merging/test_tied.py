"""Tied weights stay tied: through random masks, files that store them once, and loading."""

import pytest
import torch
from safetensors.torch import load_file, save_model
from samples import assert_slopes, drawn, lasting
from torch import nn

from merging import Experts, UserError, load, merge
from merging.calibration import Calibration
from merging.checkpoints import StateDict
from merging.checkpoints.tied import tied
from merging.context import Context
from merging.fit import CrossEntropy, Descent
from merging.fit.coefficients import Coefficients, Shape, columns
from merging.methods import (
    Atlas,
    Average,
    Base,
    Concrete,
    Dare,
    Della,
    FwHard,
    FwSoft,
    LearnedCat,
    LearnedLocalizeAndStitch,
    SelfPositioning,
    Ties,
    Twin,
)


class Tied(nn.Module):
    """A language model's two ends."""

    def __init__(self, seed=0):
        super().__init__()
        self.embed, self.head, self.norm = nn.Embedding(12, 6), nn.Linear(6, 12, bias=False), nn.LayerNorm(6)
        self.embed.weight.data = drawn(12, 6, seed=seed)
        self.head.weight = self.embed.weight


def parted(module):
    return {key: tensor.clone() for key, tensor in module.state_dict().items()}


@pytest.fixture(params=["in memory", "copies", "files", "files without the copy"])
def sources(request, tmp_path, stored):
    modules = [Tied(seed) for seed in range(3)]
    if request.param == "in memory":
        return [module.state_dict() for module in modules]
    if request.param == "copies":
        return [parted(module) for module in modules]
    if request.param == "files":
        return [stored(parted(module)) for module in modules]
    paths = [tmp_path / f"{index}.safetensors" for index in range(3)]
    for module, path in zip(modules, paths, strict=True):
        save_model(module, str(path))
        assert len(load_file(path)) == 3
    return paths


METHODS = [
    Dare(0.5), Dare(0.5, then=Ties()), Della(), Della(rescale="norm"),
    Twin(shared=Base(), sparsify="dropout", keep=0.5, start=None),
]  # fmt: skip


@pytest.mark.parametrize("method", METHODS, ids=lambda method: type(method).__name__)
def test_one_mask_is_drawn_for_all_names_of_a_weight(sources, method):
    base, *experts = sources
    merged = merge(method, base, experts)
    for gate in [None] if not merged.deltas else [merged.one_hot(0), merged.one_hot(1)]:
        state = dict(merged.state(gate))
        assert torch.equal(state["embed.weight"], state["head.weight"])
        assert 0 < (state["embed.weight"] != Experts.open(base, experts).base("embed.weight")).float().mean() < 1


def test_a_merge_of_tied_experts_is_loaded_into_a_tied_module(sources, tmp_path):
    base, *experts = sources
    path = merge(Average(), base, experts).save(tmp_path / "merged.safetensors")
    model = load(path, Tied())
    assert model.head.weight is model.embed.weight
    assert torch.allclose(model.embed.weight, (drawn(12, 6, seed=1) + drawn(12, 6, seed=2)) / 2, atol=1e-6)


def test_a_module_that_is_tied_takes_a_file_with_one_name(tmp_path):
    """As transformers writes it: the second name is nowhere in the file."""
    states = [{key: value for key, value in parted(Tied(seed)).items() if key != "head.weight"} for seed in range(3)]
    path = merge(Average(), states[0], states[1:]).save(tmp_path / "merged.safetensors")
    assert torch.allclose(load(path, Tied()).head.weight, (drawn(12, 6, seed=1) + drawn(12, 6, seed=2)) / 2, atol=1e-6)
    untied = Tied()
    untied.head.weight = nn.Parameter(torch.zeros(12, 6))
    with pytest.raises(UserError, match=r"it lacks head.weight"):
        load(path, untied)


def test_weights_that_are_no_longer_tied_are_refused_by_a_tied_module(tmp_path):
    states = [parted(Tied(seed)) for seed in range(3)]
    states[2]["head.weight"] += 1
    path = merge(Average(), states[0], states[1:]).save(tmp_path / "merged.safetensors")
    with pytest.raises(UserError, match=r"embed.weight and head.weight are one tensor in the module and differ"):
        load(path, Tied())


class Tokens:
    """Data double: prompts of three tokens, their labels, and the last of 12 outputs per token as logits."""

    def unlabelled(self, split):
        ids = torch.arange(12).view(4, 3)
        return Calibration(split, ("a", "b"), (4, 4), lambda task, some: ids[some], (None, None), Tied, {},
                           read=lambda module, some: module.head(module.norm(module.embed(some)).mean(1)))  # fmt: skip

    def labels(self, split):
        return [torch.arange(4), torch.arange(4) + 6]


LEARNING = [Atlas(0.3), Concrete(), Concrete("layer"), FwHard(), FwSoft(rounds=2), LearnedCat(), SelfPositioning(),
            LearnedLocalizeAndStitch(0.5, train=Descent([CrossEntropy()], 3, None, 1e3, optimizer="sgd"))]  # fmt: skip


@pytest.mark.parametrize(
    "method", [lasting(method, 3) for method in LEARNING], ids=lambda method: type(method).__name__
)
def test_what_learns_leaves_tied_weights_tied(method):
    states = [parted(Tied(seed)) for seed in range(3)]
    experts = Experts.open(states[0], states[1:], ["a", "b"])
    state = dict(lasting(method, 3)(experts, Context(Tokens())).state())
    assert torch.equal(state["embed.weight"], state["head.weight"])
    assert not torch.equal(state["embed.weight"], states[0]["embed.weight"])


def test_a_learned_mask_of_a_tied_weight_is_the_one_that_the_model_ran_with():
    """The loss falls that the stitched model has, which it would not with a mask of a name that no gradient reaches."""
    states = [parted(Tied(seed)) for seed in range(2)]
    experts, losses = Experts.open(states[0], states[1:], ["a"]), []
    train = Descent([CrossEntropy()], 20, None, 100.0, "constant", optimizer="sgd")
    noting = Context(Tokens(), log=lambda values, step: losses.extend(values.values()))
    LearnedLocalizeAndStitch(0.5, push=0.0, train=train)(experts, noting)
    assert losses[-1] < losses[0]


def test_the_gradient_of_a_coefficient_counts_a_tied_weight_once():
    """Against finite differences, beside a weight that is not tied."""
    states = [Tied(seed).state_dict() for seed in range(3)]
    for seed, state in enumerate(states):
        state["norm.weight"] = 1 + drawn(6, seed=seed)
    experts = Experts.open(states[0], states[1:])
    data = Tokens().unlabelled("calibration")
    shape = Shape.constant(experts, columns(experts, by_parameter=False), 0.3)
    model = Coefficients(experts, data, experts.stream, shape)

    def loss():
        features = model.features([data.inputs(task, torch.arange(4)) for task in range(2)])
        return sum(some.square().mean() for some in features)

    loss().backward()
    model.after()
    assert_slopes(model.free, model.free.grad, loss)


def test_what_one_expert_holds_apart_is_not_tied():
    states = [parted(Tied(seed)) for seed in range(3)]
    assert Experts.open(states[0], states[1:]).tied == {"head.weight": "embed.weight"}
    states[2]["head.weight"][0, 0] += 1
    assert Experts.open(states[0], states[1:]).tied == {}
    merged = merge(Dare(0.5), states[0], states[1:])
    assert not torch.equal(merged.weight("embed.weight"), merged.weight("head.weight"))


@pytest.mark.parametrize("kept", range(1, 12))
def test_ties_keeps_or_trims_an_entry_under_all_of_its_names(kept):
    base, *experts = [parted(Tied(seed)) for seed in range(3)]
    entries = sum(tensor.numel() for tensor in base.values())
    state = dict(merge(Ties(density=kept / entries), base, experts).state())  # one more is kept: of a pair the first
    assert torch.equal(state["embed.weight"], state["head.weight"])


def test_names_are_not_compared_one_by_one():
    """A view may have to put a tensor together whenever it is asked for."""
    asked = []

    class Counting(StateDict):
        def tensor(self, key):
            asked.append(key)
            return super().tensor(key)

    state = {f"w{index}": drawn(4, 4, seed=index) for index in range(20)}
    assert tied([Counting(state | {"z": state["w3"].clone()})]) == {"z": "w3"}
    assert sorted(asked) == sorted([*state, "z", "w3", "z"])
