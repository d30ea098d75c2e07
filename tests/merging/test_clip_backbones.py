"""The CLIP backbones of conf/ against open_clip's own configurations and the facts of OpenAI's models."""

from pathlib import Path

import open_clip
import pytest
import torch
from hydra import compose, initialize_config_module
from hydra.utils import instantiate
from open_clip.transformer import QuickGELU
from torch import nn

from merging import UserError
from merging.backbones.open_clip import PREFIX, ImageTower, OpenClip

NAMES = {"clip_vit_b32": "ViT-B-32", "clip_vit_b16": "ViT-B-16", "clip_vit_l14": "ViT-L-14"}
every = pytest.mark.parametrize("name", NAMES)
SMALL = {"image_size": 16, "patch_size": 8, "width": 16, "head_width": 8, "layers": 2}


def built(name) -> OpenClip:
    """As the launcher makes it."""
    with initialize_config_module("conf", version_base="1.3"):
        return instantiate(compose("config", [f"backbone={name}"]).backbone, _convert_="all")


def config(name):
    found = open_clip.get_model_config(f"{NAMES[name]}-quickgelu")
    assert found is not None
    return found


@every
def test_facts_are_those_of_open_clip(name):
    """Written out or left at open_clip's default."""
    backbone, theirs = built(name), config(name)
    assert backbone.name == name and backbone.quick_gelu is True is theirs["quick_gelu"]
    assert backbone.embed_dim == theirs["embed_dim"]
    assert open_clip.CLIPVisionCfg(**backbone.vision_cfg) == open_clip.CLIPVisionCfg(**theirs["vision_cfg"])
    assert type(backbone.vision_cfg) is dict and set(theirs["vision_cfg"]) <= set(backbone.vision_cfg)


@every
def test_images_are_normalised_as_openai_s(name):
    backbone = built(name)
    assert tuple(backbone.mean) == open_clip.OPENAI_DATASET_MEAN and tuple(backbone.std) == open_clip.OPENAI_DATASET_STD
    images = torch.randint(0, 256, (2, 3, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    mean, std = (
        torch.tensor(each)[:, None, None] for each in (open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD)
    )
    torch.testing.assert_close(backbone.prepare(images), (images / 255 - mean) / std, atol=1e-5, rtol=0)


@every
def test_parameters_are_those_of_open_clip_s_model(name):
    with torch.device("meta"):
        ours, theirs = built(name).build(), open_clip.CLIP(**config(name))
        whole = open_clip.CLIP(**{**config(name), "quick_gelu": False})
    expected = {f"{PREFIX}{key}": each.shape for key, each in theirs.visual.state_dict().items()}
    assert {key: each.shape for key, each in ours.state_dict().items()} == expected
    assert expected.keys() == {key for key in whole.state_dict() if key.startswith(PREFIX)}  # weights do not tell


@pytest.mark.parametrize(
    ("name", "tensors", "numbers", "depth", "tokens", "giga_macs"),
    [
        ("clip_vit_b32", 152, 87_849_216, 12, 50, 4.41),
        ("clip_vit_b16", 152, 86_192_640, 12, 197, 17.56),
        ("clip_vit_l14", 296, 303_966_208, 24, 257, 81.01),
    ],
)
def test_sizes(name, tensors, numbers, depth, tokens, giga_macs):
    """Tensors and parameters as published; multiply-accumulates against a count by hand."""
    backbone = built(name)
    with torch.device("meta"):
        state = backbone.build().state_dict()
    assert len(state) == tensors and sum(each.numel() for each in state.values()) == numbers
    assert {backbone.param(key).depth for key in state} == {None, *range(depth)} and backbone.tokens == tokens
    width, patch = (int(backbone.vision_cfg[key]) for key in ("width", "patch_size"))
    block = tokens * 12 * width**2 + 2 * tokens**2 * width
    by_hand = depth * block + (tokens - 1) * 3 * patch**2 * width + width * backbone.embed_dim
    assert backbone.macs == by_hand and round(by_hand / 1e9, 2) == giga_macs


class TestActivations:
    @pytest.mark.parametrize(("quick_gelu", "kind"), [(True, QuickGELU), (False, nn.GELU)])
    def test_follow_the_setting(self, quick_gelu, kind):
        tower = OpenClip("small", 8, SMALL, quick_gelu).build()
        assert [type(block.mlp.gelu) for block in tower.visual.transformer.resblocks] == [kind] * 2

    @pytest.mark.parametrize("quick_gelu", [True, False])
    def test_another_one_than_asked_for_is_refused(self, quick_gelu, monkeypatch):
        """As a version of open_clip that decides by itself would build it."""
        build = open_clip.model._build_vision_tower
        monkeypatch.setattr("open_clip.model._build_vision_tower", lambda dim, cfg, quick: build(dim, cfg, not quick))
        found = "GELU" if quick_gelu else "QuickGELU"
        with pytest.raises(UserError, match=rf"quick_gelu={quick_gelu}.*resblocks\.0\.mlp\.gelu is {found}\."):
            ImageTower(8, SMALL, quick_gelu)

    def test_towers_that_have_none_cannot_be_quick(self):
        resnet = {"layers": [1, 1, 1, 1], "width": 8, "head_width": 8, "image_size": 32}
        assert isinstance(ImageTower(8, resnet), ImageTower)
        with pytest.raises(UserError, match="ModifiedResNet has none"):
            ImageTower(8, resnet, quick_gelu=True)


def test_every_file_is_tested():
    files = Path(__file__).parents[2].glob("conf/backbone/clip_vit_*.yaml")
    assert {path.stem for path in files} == set(NAMES)


def test_facts_that_no_tower_reads_are_refused():
    with pytest.raises(UserError, match=r"backbone\.vision_cfg has layer, which no tower of open_clip reads\. Known"):
        OpenClip("mine", 16, {"layers": 1, "width": 32, "patch_size": 16, "image_size": 32, "layer": 3}).build()
