"""CAT with learned weights: LoRA experts side by side against the published steps, and by algebra."""

from dataclasses import replace

import published_learned as published
import pytest
import torch
from coloured import NAMES, Coloured
from samples import context, drawn, family, opened, tower
from test_learned import close, cross_entropy

from merging import Experts
from merging.checkpoints import StateDict
from merging.checkpoints.lora import Lora, LoraConfig
from merging.combined import mix_of
from merging.errors import UserError
from merging.fit import CrossEntropy, Descent
from merging.fit.samples import opened as opened_samples
from merging.methods import Cat, LearnedCat
from merging.saving_adapter import check_adapters

FEW = Descent((CrossEntropy(),), 3, None, 0.3, "constant", 0.0, "adamw")
TARGETS = [f"visual.transformer.resblocks.{block}.mlp.{name}" for block in (0, 1) for name in ("c_fc", "c_proj")]


def adapted(tasks=3):
    """Adapters of ranks 1, 2, 3 on the matrices of FFNs, their factors with alpha / r, a base, and a context."""
    base, _ = family(0, tower(), size=0.25)
    adapters, factors = [], {f"{name}.weight": [] for name in TARGETS}
    for rank in range(1, tasks + 1):
        tensors = {}
        for index, name in enumerate(TARGETS):
            m, n = base[f"{name}.weight"].shape
            down, up = drawn(rank, n, seed=100 * rank + index) / 8, drawn(m, rank, seed=100 * rank + index + 50) / 8
            tensors |= {f"base_model.model.{name}.lora_A.weight": down, f"base_model.model.{name}.lora_B.weight": up}
            factors[f"{name}.weight"].append((8.0 / rank, up, down))
        adapters.append(Lora(StateDict(base), StateDict(tensors), LoraConfig(rank, 8)))
    experts = Experts.open(StateDict(base), adapters, NAMES[:tasks])
    return experts, factors, base, context(experts, Coloured(experts))


@pytest.mark.parametrize("init", ["equal", "random"])
def test_equals_the_published_steps(init):
    experts, factors, base, known = adapted()
    merged = LearnedCat(init, train=FEW)(experts, known)
    logits = torch.zeros(3, 4)
    if init == "random":  # the same numbers, of the columns of these matrices
        unmoved = LearnedCat(init, train=replace(FEW, lr=1e-9))(experts, known)
        logits = torch.stack([mix_of(unmoved.shared, key).weights.log() for key in factors], 1)
        assert float(logits.std()) > 0.3 and not torch.equal(logits[:, 0], logits[:, 1])
    changes = published.cat(
        cross_entropy(opened_samples(known, "calibration", "labels")), base, factors, logits, 3, 0.3
    )
    assert close(merged, changes, 1e-4)
    for key, change in changes.items():
        mix = mix_of(merged.shared, key)
        assert sum(mix.low_rank.ranks) == 6 and float(mix.weights.sum()) == pytest.approx(1)
        assert not torch.allclose(change, experts.tau(key).mean(0), atol=0.01)


def test_is_an_adapter_again_and_equals_what_whole_experts_give():
    experts, _, base, known = adapted()
    check_adapters(experts.checkpoints, experts.tasks, LearnedCat())
    whole = opened(base, [{key: expert.tensor(key) for key in base} for expert in experts.checkpoints], NAMES)
    factored, dense = (LearnedCat(train=FEW, scale=2.0)(given, known) for given in (experts, whole))
    assert all(torch.allclose(factored.weight(key), dense.weight(key), atol=1e-4) for key in tower())


def test_equal_weights_are_the_fixed_form_and_one_expert_is_kept():
    experts, _, _, known = adapted()
    merged, fixed = LearnedCat(train=replace(FEW, lr=1e-9))(experts, known), Cat()(experts)
    assert all(torch.allclose(merged.shared[key], fixed.shared[key], atol=1e-6) for key in fixed.shared)
    alone, factors, base, known = adapted(1)
    merged = LearnedCat("random", train=FEW)(alone, known)
    for key, ((scale, up, down),) in factors.items():
        assert torch.allclose(merged.weight(key), base[key] + scale * up @ down, atol=1e-6)


def test_the_start_belongs_to_tasks_and_seeds():
    experts, _, _, known = adapted()
    unmoved = LearnedCat("random", train=replace(FEW, lr=1e-9))

    def weights(seed):
        return mix_of(unmoved(experts, replace(known, seed=seed)).shared, f"{TARGETS[0]}.weight").weights

    assert torch.equal(weights(0), weights(0)) and not torch.equal(weights(0), weights(1))


def test_bad_input():
    with pytest.raises(UserError, match=r"learned_cat: init='zero' is unknown\. Choose one of equal, random"):
        LearnedCat("zero")
