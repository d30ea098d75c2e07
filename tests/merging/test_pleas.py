"""PLeaS against its steps on whole models, on models that are each other's permutations, and what it cannot match."""

from functools import cache

import published_pleas as published
import pytest
import torch
from published_regression import loaded
from samples import BACKBONE, Made, context, drawn, models, opened
from test_regression import assert_near
from tiny_models import backbone

from merging.backbones.base import table
from merging.calibration import Calibration
from merging.errors import UserError
from merging.methods import Pleas
from merging.methods.method import call
from merging.permutations import Couple, axes, matched, turned

TASKS, IMAGES = ("red", "green"), 16
HEADS, SIZE = 2, 4  # of tiny models
TOWER, BARE = backbone("CLIPVisionModelWithProjection"), backbone("CLIPVisionModel")


@cache
def drawn_state(seed, build=TOWER.build):
    """A model of its own, whose numbers are as large as trained ones."""
    torch.manual_seed(seed)
    state = build().state_dict()
    return {key: w + 0.2 * drawn(*w.shape, seed=seed + i) for i, (key, w) in enumerate(state.items()) if w.ndim}


def read(module, images):
    """What heads read: behind the projection, where there is one."""
    answer = module(images)
    return answer.image_embeds if "image_embeds" in answer else answer.pooler_output


@cache
def pictures():
    images = drawn(2, IMAGES, 3, 8, 8, seed=5)
    images[0, :, 0] += 1
    return images


def merged(method, states, kind=TOWER):
    images = pictures()
    data = Calibration("calibration", TASKS, (IMAGES,) * 2, lambda task, some: images[task][some], (None,) * 2,
                       kind.build, kind.identity(), read=read)  # fmt: skip
    experts = opened(states[0], list(states), TASKS[: len(states)])
    return models(call(method, experts, context(experts, Made(lambda split: data))))[0]


def features(state):
    with torch.no_grad():
        return read(loaded(TOWER.build, state), pictures().flatten(0, 1))


def permuted(state, seed=0):
    """The same function with features, hidden neurons, heads and what lies in them in other orders."""
    rng = torch.Generator().manual_seed(seed)
    sizes = [w.shape[0] for key, w in state.items() if key.endswith("fc1.weight")]
    orders = [torch.randperm(size, generator=rng).tolist() for size in (state_width(state), *sizes)]
    return published.reordered(state, orders[0], orders[1:], [(in_heads(rng), in_heads(rng)) for _ in sizes])


def in_heads(rng, size=SIZE):
    """Both heads exchanged, and what lies in each of them in another order."""
    return [size * head + i for head in (1, 0) for i in torch.randperm(size, generator=rng).tolist()]


def state_width(state):
    return len(next(w for key, w in state.items() if key.endswith("layer_norm1.weight")))


@pytest.mark.parametrize(("ratio", "stream", "heads", "solve", "ridge"), [
    (1.0, True, True, True, 1e-3), (0.6, True, False, True, 0.1), (0.3, False, True, True, 1e-3),
    (1.0, True, True, False, 1e-3),
])  # fmt: skip
def test_equals_the_published_steps(ratio, stream, heads, solve, ridge):
    """Of two initialisations; but for heads, the authors' wider layers and their descent, which is solved."""
    states, images = (drawn_state(1), drawn_state(2)), pictures().flatten(0, 1)
    expected = published.pleas(TOWER.build, states, images, ratio, stream, ridge, HEADS if heads else None, solve)
    assert_near(merged(Pleas(ratio, stream, heads, solve, ridge, IMAGES), states), expected, 2e-4)


@pytest.mark.parametrize("ratio", [1.0, 0.5])
def test_a_permuted_model_is_found_again(ratio):
    state = drawn_state(1)
    other = permuted(state)
    assert torch.allclose(features(other), features(state), atol=1e-5)
    found = merged(Pleas(ratio, ridge=1e-7, samples=IMAGES), (state, other))
    assert torch.allclose(features(found), features(state), atol=1e-3)
    average = {key: (state[key] + other[key]) / 2 for key in state}
    assert not torch.allclose(features(average), features(state), atol=0.1)
    if ratio == 1:
        assert_near(found, state, 1e-4)


def test_equal_experts_are_a_fixed_point():
    state = drawn_state(1)
    assert_near(merged(Pleas(samples=IMAGES), (state, state)), state)


def test_which_expert_is_the_first_does_not_matter_to_the_function():
    states = drawn_state(1), drawn_state(2)
    one, other = (features(merged(Pleas(samples=IMAGES), pair)) for pair in (states, states[::-1]))
    assert torch.allclose(one, other, atol=1e-3) and not torch.allclose(one, features(states[0]), atol=0.1)


@pytest.mark.parametrize(("kind", "size"), [
    (BACKBONE, 8), (backbone("ViTModel"), SIZE), (backbone("BertForSequenceClassification"), SIZE),
    (backbone("GPT2ForSequenceClassification", "last"), SIZE),
])  # fmt: skip
def test_heads_in_another_order_change_nothing(kind, size):
    """Of fused and of separate matrices, stored as they are applied or turned."""
    state = drawn_state(3, kind.build)
    experts, inputs = opened(state, [state]), kind.prepare(kind.example(2))
    rng, orders = torch.Generator().manual_seed(0), {}
    for block in sorted({experts.param(key).block or "" for key in experts.specs()} - {""}):
        v, q = (torch.tensor(in_heads(rng, size)) for _ in range(2))
        orders |= {f"{block} v": v, f"{block} q": q, f"{block} qkv": torch.cat([q, len(q) + q, 2 * len(q) + v])}
    other = turned(experts, {key: state[key] for key in experts.specs()}, orders, width=0)
    with torch.no_grad():
        before, after = (kind.features(loaded(kind.build, state | weights), inputs) for weights in ({}, other))
    changed = {experts.param(key).family for key in other if not torch.equal(other[key], state[key])}
    assert torch.allclose(before, after, atol=1e-4) and changed == {"attention"}


@pytest.mark.parametrize(
    ("name", "count"), [("CLIPVisionModel", 2), ("T5EncoderModel", None), ("LlamaForCausalLM", None)]
)
def test_heads_are_counted_where_attention_says_how_many_it_has(name, count):
    module = backbone(name).build()
    block = next(key for key, _ in module.named_modules() if key.endswith(("layers.0", "block.0")))
    assert Couple(None, 1, module, module).heads(block) == count  # type: ignore[arg-type]


def test_axes_of_matrices_that_are_stored_turned():
    info = table("gpt2").param
    assert axes(info("transformer.h.1.mlp.c_fc.weight"), torch.Size((8, 20)), 8) == {"transformer.h.1": 1, "": 0}
    assert axes(info("transformer.h.1.mlp.c_fc.bias"), torch.Size((20,)), 8) == {"transformer.h.1": 0}
    assert axes(info("transformer.h.1.mlp.c_proj.weight"), torch.Size((20, 8)), 8) == {"transformer.h.1": 0, "": 1}
    assert axes(info("transformer.h.1.mlp.c_proj.bias"), torch.Size((8,)), 8) == {"": 0}
    assert axes(info("transformer.wte.weight"), torch.Size((30, 8)), 8) == {"": 1}


class TestBadInput:
    def test_models_of_different_widths(self):
        with pytest.raises(
            UserError, match=r"The FFN of h.0 has 4 units in one model and 6 in the other: a permutation"
        ):
            matched(drawn(4, 6), "The FFN of h.0")
        state = drawn_state(1)
        wide = {key: torch.cat([w, w]) if "fc1" in key else w for key, w in state.items()}
        with pytest.raises(UserError, match=r"fc1"):
            merged(Pleas(), (state, wide))

    def test_more_or_fewer_models_than_two(self):
        for count in (1, 3):
            experts = opened(drawn_state(1), [drawn_state(1)] * count)
            with pytest.raises(UserError, match=rf"pleas merges 2 experts, and here are {count}"):
                call(Pleas(), experts)

    def test_heads_that_read_the_features_themselves(self):
        states = drawn_state(1, BARE.build), drawn_state(2, BARE.build)
        with pytest.raises(UserError, match=r"Take method.stream=false"):
            merged(Pleas(samples=IMAGES), states, BARE)
        assert merged(Pleas(samples=IMAGES, stream=False), states, BARE).keys() == states[0].keys()

    def test_options(self):
        for wrong in ({"ratio": 0.0}, {"ridge": 0.0}, {"samples": 0}):
            with pytest.raises(UserError, match=r"pleas: .* out of range"):
                Pleas(**wrong)
        with pytest.raises(UserError, match=r"pleas: solve=false averages all neurons"):
            Pleas(ratio=0.5, solve=False)
