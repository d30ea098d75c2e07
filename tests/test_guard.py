"""Saved models of format 2 compute what they computed when they were saved, and merging again gives the same models.

fixtures/guard/tiny.tar.xz holds saved/NAME.safetensors (every method, every form of gate; T = 3 tasks on a two-block
tower), inputs.safetensors (images [6, 3, 8, 8], base/KEY and expert0..2/KEY that were merged, calibration images and
heads) and outputs.safetensors: called/NAME, the features [6, D] of the loaded model ([T, 6, D] where it is called with
the one-hot w of each task), and folded/NAME [T or 1, 6, D], those of the dense models of the single tasks. tiny.json
names the options of every model.
"""

import json
import tarfile
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_module
from hydra.utils import instantiate
from safetensors.torch import load_file

from merging import load, merge, open_merged

FIXTURES = Path(__file__).parent / "fixtures" / "guard"
MODELS = json.loads((FIXTURES / "tiny.json").read_text())
NEEDS_IMAGES = ("duet", "duet_all", "duet_svd_static", "duet_tsv", "neuron_mask", "neuron_mask_ties", "multitask")
MERGED_AGAIN = [name for name in MODELS if "." not in name and name not in NEEDS_IMAGES]
ROUNDING = 1e-5  # of the largest feature: a relative change of 1e-6 in the images moves features by up to 5e-6
DECOMPOSED = 1e-4  # where matrices are decomposed anew


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    folder = tmp_path_factory.mktemp("guard")
    with tarfile.open(FIXTURES / "tiny.tar.xz") as packed:
        packed.extractall(folder, filter="data")
    return folder


@pytest.fixture(scope="module")
def inputs(stored):
    return load_file(stored / "inputs.safetensors")


@pytest.fixture(scope="module")
def outputs(stored):
    return load_file(stored / "outputs.safetensors")


def below(tensors, prefix):
    return {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}


def folded(merged, stored, images):
    """Features [T, B, D] of the dense models of the single tasks, [1, B, D] of a static merge."""
    tower = load(stored / "saved" / "base.safetensors")
    gates = [merged.one_hot(task) for task in range(3)] if merged.routing is not None else [None]
    features = []
    for gate in gates:
        tower.load_state_dict({key: weight.clone() for key, weight in merged.state(gate)})
        features.append(tower(images))
    return torch.stack(features)


def assert_close(features, expected, tolerance):
    assert features.shape == expected.shape
    assert float((features - expected).abs().max() / expected.abs().max()) <= tolerance


@torch.inference_mode()
@pytest.mark.parametrize("name", MODELS)
def test_a_saved_model_computes_what_it_did(name, stored, inputs, outputs):
    path, images = stored / "saved" / f"{name}.safetensors", inputs["images"]
    model, merged = load(path), open_merged(path)
    if MODELS[name]["called"] == "with w":
        called = torch.stack([model(images, w=merged.one_hot(task)) for task in range(3)])
    else:
        called = model(images)
    assert_close(called, outputs[f"called/{name}"], ROUNDING)
    assert_close(folded(merged, stored, images), outputs[f"folded/{name}"], ROUNDING)


@torch.inference_mode()
@pytest.mark.parametrize("name", MERGED_AGAIN)
def test_merging_again_gives_the_same_models(name, stored, inputs, outputs):
    with initialize_config_module("conf", version_base="1.3"):
        method = instantiate(compose("config", MODELS[name]["overrides"]).method, _convert_="all")
    experts = [below(inputs, f"expert{task}/") for task in range(3)]
    merged = merge(method, below(inputs, "base/"), experts, ("a", "b", "c"))
    assert_close(folded(merged, stored, inputs["images"]), outputs[f"folded/{name}"], DECOMPOSED)
