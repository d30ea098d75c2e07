"""What activations say about an expert: statistics against a forward pass written out."""

from dataclasses import replace

import pytest
import torch
from architectures import inputs, model
from ffns import close, small_towers
from samples import BACKBONE, IMAGES, context, opened
from torch.nn import functional

from merging.errors import UserError
from merging.statistics import STATISTICS, activations, grams, moments, observe

NAMES = tuple(f"visual.transformer.resblocks.{block}.mlp.c_proj.weight" for block in (0, 1))
MEASURES = {
    "mean_abs": lambda a: a.abs().mean((0, 1)),
    "mean": lambda a: a.mean((0, 1)),
    "positive": lambda a: (a > 0).double().mean((0, 1)),
    "rms": lambda a: a.square().mean((0, 1)).sqrt(),
}


@pytest.fixture(scope="module")
def found():
    return opened(*small_towers())


def hidden(state, images):
    """GELU outputs [B, N, 64] of the two FFNs in fp64, from the weights alone."""
    w = {key.removeprefix("visual."): tensor.double() for key, tensor in state.items()}
    norm = lambda x, name: functional.layer_norm(x, (16,), w[f"{name}.weight"], w[f"{name}.bias"])  # noqa: E731
    patches = functional.conv2d(images.double(), w["conv1.weight"], stride=8).flatten(2).transpose(1, 2)
    x = torch.cat([w["class_embedding"].expand(len(images), 1, -1), patches], 1) + w["positional_embedding"]
    x, seen = norm(x, "ln_pre"), []
    for block in (0, 1):
        part = lambda name, b=block: w[f"transformer.resblocks.{b}.{name}"]  # noqa: E731
        y = norm(x, f"transformer.resblocks.{block}.ln_1")
        q, k, v = (y @ part("attn.in_proj_weight").T + part("attn.in_proj_bias")).chunk(3, -1)
        q, k, v = (each.unflatten(-1, (2, 8)).transpose(1, 2) for each in (q, k, v))
        attended = ((q @ k.mT / 8**0.5).softmax(-1) @ v).transpose(1, 2).flatten(2)
        x = x + attended @ part("attn.out_proj.weight").T + part("attn.out_proj.bias")
        y = norm(x, f"transformer.resblocks.{block}.ln_2")
        seen.append(functional.gelu(y @ part("mlp.c_fc.weight").T + part("mlp.c_fc.bias")))
        x = x + seen[-1] @ part("mlp.c_proj.weight").T + part("mlp.c_proj.bias")
    return seen


@pytest.mark.parametrize("count", [5, IMAGES, None])
@pytest.mark.parametrize("tokens", ["all", "class"])
@pytest.mark.parametrize("statistic", STATISTICS)
def test_equals_a_forward_pass_by_hand(found, statistic, tokens, count):
    calibration = context(found).unlabelled()
    measured = activations(calibration, found.checkpoints, NAMES, count, statistic, tokens=tokens)
    for task, checkpoint in enumerate(found.checkpoints):
        images = calibration.inputs(task, torch.arange(IMAGES if count is None else count))
        state = {key: checkpoint.tensor(key) for key in BACKBONE.build().state_dict()}
        for name, seen in zip(NAMES, hidden(state, images), strict=True):
            expected = MEASURES[statistic](seen[:, :1] if tokens == "class" else seen)
            assert measured[name].shape == (3, 64) and measured[name].dtype == torch.float32
            assert close(measured[name][task], expected, 1e-6), (name, task)


def test_magnitude_is_the_default(found):
    calibration = context(found).unlabelled()
    plain = activations(calibration, found.checkpoints, NAMES, 4)
    asked = activations(calibration, found.checkpoints, NAMES, 4, "mean_abs", tokens="all", side="input")
    assert all(torch.equal(plain[name], asked[name]) for name in NAMES)


@pytest.mark.parametrize("statistic", STATISTICS)
def test_batches_of_any_size_give_the_same(found, statistic):
    """Every image counts once, also in a last batch that is smaller."""
    calibration = context(found).unlabelled()
    tower = calibration.tower()
    together, split = (moments(tower, NAMES, calibration.batches(0, 7, batch), statistic) for batch in (7, 3))
    assert all(close(together[name], split[name], 1e-6) for name in NAMES)


def test_leaves_no_hooks(found):
    tower = context(found).unlabelled().tower()
    moments(tower, NAMES, context(found).unlabelled().batches(0, 2))
    assert not any(module._forward_pre_hooks for module in tower.modules())


def test_every_expert_sees_its_own_images(found):
    """Swapped images change what is measured of every expert."""
    calibration = context(found).unlabelled()
    swapped = replace(calibration, inputs=lambda task, some: calibration.inputs(2 - task, some))
    own, other = (activations(each, found.checkpoints, NAMES) for each in (calibration, swapped))
    for name in NAMES:
        moved = (own[name] - other[name]).abs().amax(1)
        assert moved[0] > 1e-3 and moved[2] > 1e-3 and moved[1] == 0


MATRICES = {
    "open_clip": (
        "visual.conv1.weight",
        "visual.proj",
        "attn.in_proj_weight",
        "attn.out_proj.weight",
        "mlp.c_fc.weight",
    ),
    "CLIPVision with projection": ("patch_embedding.weight", "visual_projection.weight", "q_proj.weight", "fc2.weight"),
    "GPT-2": ("attn.c_attn.weight", "mlp.c_proj.weight", "lm_head.weight"),
    "T5": ("SelfAttention.q.weight", "EncDecAttention.v.weight", "DenseReluDense.wo.weight"),
    "Llama": ("self_attn.o_proj.weight", "mlp.gate_proj.weight"),
}


@pytest.mark.parametrize("name", MATRICES)
@torch.no_grad()
def test_every_matrix_is_seen(name):
    """y = W x + b of what is seen to go in and to come out, whatever applies the matrix; the model is left alone."""
    module, kwargs, seen = model(name), inputs(name), {}
    names = [key for key, _ in module.named_parameters(remove_duplicate=False)]
    keys = [key for key in names if key.endswith(MATRICES[name])]
    assert {part for part in MATRICES[name] for key in keys if key.endswith(part)} == set(MATRICES[name])
    kinds = [type(child) for child in module.modules()]
    for side in ("input", "output"):
        observe(
            module, keys, [kwargs], lambda key, rows, side=side: seen.update({(key, side): rows.double()}), side=side
        )
    assert [type(child) for child in module.modules()] == kinds
    for key in keys:
        weight, bias = module.get_parameter(key).double(), key.replace("weight", "bias")
        transposed = "proj" in key.split(".")[-1:] or (name == "GPT-2" and not key.startswith("lm_head"))
        weight = weight.T if transposed else weight.flatten(1)
        shift = module.get_parameter(bias).double() if bias in names and bias != key else 0
        torch.testing.assert_close(seen[key, "input"] @ weight.T + shift, seen[key, "output"], rtol=1e-4, atol=1e-4)


def test_grams_are_those_of_all_inputs_block_by_block_too(found):
    calibration, keys = context(found).unlabelled(), (*NAMES, "visual.proj", "visual.conv1.weight")
    for task, checkpoint in enumerate(found.checkpoints):
        sums, rows = grams(calibration, checkpoint, task, keys, 7)
        assert sums[NAMES[0]].shape == (64, 64) and sums["visual.conv1.weight"].shape == (192, 192)
        state = {key: checkpoint.tensor(key) for key in BACKBONE.build().state_dict()}
        for name, x in zip(NAMES, hidden(state, calibration.inputs(task, torch.arange(7))), strict=True):
            x = x.flatten(0, 1)
            assert rows[name] == len(x) == 35 and close(sums[name], x.T @ x, 1e-5)
        assert rows["visual.proj"] == 7
        for key in keys:
            assert close(grams(calibration, checkpoint, task, (key,), 7)[0][key], sums[key], 1e-5)


def test_padding_does_not_count():
    module, kwargs = model("RoBERTa"), inputs("RoBERTa")
    key, rows = "roberta.encoder.layer.1.output.dense.weight", []
    observe(module, [key], [kwargs], lambda _, some: rows.append(len(some)))
    assert rows == [int(kwargs["attention_mask"].sum())]


@pytest.mark.parametrize("key", ["visual.positional_embedding", "visual.ln_pre.bias"])
def test_what_is_no_matrix_of_features_is_refused(key):
    with pytest.raises(UserError, match="is not a matrix that is applied to features"):
        observe(model("open_clip"), [key], [inputs("open_clip")], lambda *_: None)
