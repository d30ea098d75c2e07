"""Published names with small towers, and what opened experts must be."""

from dataclasses import dataclass

import torch
from clips import MIDDLES, backbone, base_repository, whole

from tasks.suite import Suite

TASKS = ("MNIST", "DTD", "Cars")
PATCHES = {"clip_vit_b32": 32, "clip_vit_b16": 16, "clip_vit_l14": 14}
FOLDERS = {"clip_vit_b32": "ViT-B-32", "clip_vit_b16": "ViT-B-16", "clip_vit_l14": "ViT-L-14"}


@dataclass(frozen=True)
class Named:
    """A task that is only a name."""

    name: str


def suite(*names):
    return Suite("some", tuple(map(Named, names or TASKS)))  # type: ignore[arg-type]


def tower(name="clip_vit_b32"):
    """A published backbone for images of two patches a side."""
    return backbone(name, PATCHES[name], 2 * PATCHES[name])


def clip(name="clip_vit_b32"):
    return whole(1, PATCHES[name], 2 * PATCHES[name], words=60)


def visual(state):
    return {key: value for key, value in state.items() if key.startswith("visual.")}


def assert_is(checkpoint, want):
    assert checkpoint.specs().keys() == want.keys()
    for key, value in want.items():
        assert torch.equal(checkpoint.tensor(key), value), key


def assert_opens(experts, base, tuned_states, tasks=TASKS):
    assert experts.tasks == tuple(tasks)
    assert_is(experts.origin, base)
    for checkpoint, state in zip(experts.checkpoints, tuned_states, strict=True):
        assert_is(checkpoint, state)
    assert_fits(experts)


def assert_fits(experts, name="clip_vit_b32"):
    """The tower takes the base as it is."""
    built = tower(name).build()
    built.load_state_dict({key: experts.origin.tensor(key) for key in built.state_dict()})


def publish_bases(hub):
    """openai's repositories, that of base-patch32 without safetensors."""
    for name, middle in MIDDLES.items():
        hub.add(f"openai/clip-vit-{middle}", base_repository(clip(name), safetensors=name != "clip_vit_b32"))
