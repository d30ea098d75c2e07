"""Every published family, fabricated under its real names and layouts, opens to the same tower."""

import json
from dataclasses import replace

import pytest
import torch
from clips import (
    BLOCKS,
    MIDDLES,
    SUFFIXES,
    TEXT_WIDTH,
    WIDTH,
    encoder_state,
    lora_repository,
    tuned,
    vision_repository,
    write_encoder,
)
from safetensors.torch import load
from served import FOLDERS, TASKS, assert_fits, assert_is, assert_opens, clip, suite, tower, visual

from merging.errors import UserError
from merging.methods import TaskArithmetic
from tasks.hub import plan
from tasks.vision import families
from tasks.vision.families import EncoderFamily, HubFamily, open_base


@pytest.mark.parametrize("name", sorted(MIDDLES))
def test_family_a(hub, cache, name):
    state = clip(name)
    states = [tuned(state, seed, proj=False) for seed in range(len(SUFFIXES))]
    for suffix, each in zip(SUFFIXES.values(), states, strict=True):
        hub.add(f"tanganke/clip-vit-{MIDDLES[name]}_{suffix}", vision_repository(each))

    source = HubFamily("hub_a")
    experts = source.open(suite(*SUFFIXES), tower(name), cache)

    assert experts.tasks == tuple(SUFFIXES) and experts.separate_qkv
    assert_is(experts.origin, visual(state))
    for checkpoint, each in zip(experts.checkpoints, states, strict=True):
        assert_is(checkpoint, visual(each))
    assert_fits(experts, name)
    assert len([key for key in experts.specs() if "_proj_weight" in key]) == 3 * BLOCKS
    assert not experts.tau("visual.proj").any()  # frozen in this family
    assert source.family == "hub_a" and source.remarks == ()


def test_family_a_reads_no_weight_to_open(hub, cache):
    for seed, task in enumerate(TASKS):
        hub.add(
            f"tanganke/clip-vit-base-patch16_{SUFFIXES[task]}", vision_repository(tuned(clip("clip_vit_b16"), seed))
        )
    source = HubFamily("hub_a", qkv="fused")
    told = plan(source.downloads(suite(), tower("clip_vit_b16")))

    assert [each.name.split("/")[1] for each in told][:2] == ["clip-vit-base-patch16", "clip-vit-base-patch16_mnist"]
    assert not any(each.cached for each in told) and all(each.bytes for each in told)
    assert not hub.asked("GET")
    assert not source.open(suite(), tower("clip_vit_b16"), cache).separate_qkv
    assert all(each.cached for each in plan(source.downloads(suite(), tower("clip_vit_b16"))))


def test_lora_adapters_are_added_to_the_base(hub, cache):
    state = clip("clip_vit_b16")
    for seed, task in enumerate(TASKS):
        hub.add(f"tanganke/clip-vit-base-patch16_{SUFFIXES[task]}_lora-16", lora_repository(seed, rank=4, alpha=8))

    experts = HubFamily("lora_a").open(suite(), tower("clip_vit_b16"), cache)

    assert_fits(experts, "clip_vit_b16")
    for seed, checkpoint in enumerate(experts.checkpoints):
        factors = load(lora_repository(seed, rank=4, alpha=8)["adapter_model.safetensors"])
        for block in range(BLOCKS):
            start = f"base_model.model.vision_model.encoder.layers.{block}.self_attn."
            key = f"visual.transformer.resblocks.{block}.attn.in_proj_weight"
            want = torch.zeros(3, WIDTH, WIDTH)
            for third, letter in ((0, "q"), (2, "v")):
                up, down = (
                    factors[f"{start}{letter}_proj.lora_B.weight"],
                    factors[f"{start}{letter}_proj.lora_A.weight"],
                )
                want[third] = 8 / 4 * up @ down
            got = (checkpoint.tensor(key) - state[key]).view(3, WIDTH, WIDTH)
            assert torch.allclose(got, want, atol=1e-5) and not got[1].any()
        rest = [key for key in visual(state) if "in_proj_weight" not in key]
        assert all(torch.equal(checkpoint.tensor(key), state[key]) for key in rest)


@pytest.mark.filterwarnings("ignore:Couldn't retrieve source code")
@pytest.mark.parametrize("form", ["zip", "legacy", "plain"])
@pytest.mark.parametrize("text", [False, True])
def test_family_b_from_a_local_root(tmp_path, cache, form, text):
    state, root = clip(), tmp_path / "drive"
    states = [tuned(state, seed) for seed in range(len(TASKS))]
    write_encoder(root / "ViT-B-32" / "zeroshot.pt", state, form)
    for task, each in zip(TASKS, states, strict=True):
        write_encoder(root / "ViT-B-32" / task / "finetuned.pt", each, form)

    source = EncoderFamily("task_vectors", str(root), text=text)
    assert source.downloads(suite(), tower()) == []
    experts = source.open(suite(), tower(), cache)

    seen = {key.removeprefix("model."): value for key, value in encoder_state(state).items()} if text else visual(state)
    held = lambda each: {key: each[key] for key in seen}  # noqa: E731
    assert_opens(experts, seen, map(held, states))
    left = [key for key in experts.specs() if not key.startswith("visual.")]
    assert len(left) == (6 if text else 0) and not any(experts.tau(key).any() for key in left)
    assert experts.tau("visual.proj").any()  # trained in this family
    assert not experts.separate_qkv


@pytest.mark.parametrize("copy_of_base", [True, False])
def test_family_c_announces_its_leak(hub, tmp_path, cache, copy_of_base):
    state, root = clip(), tmp_path / "drive"
    states = [tuned(state, seed) for seed in range(len(TASKS))]
    if copy_of_base:
        write_encoder(root / "ViT-B-32" / "DTDVal" / "nonlinear_zeroshot.pt", state, module=False)
    for task, each in zip(TASKS, states, strict=True):
        write_encoder(root / "ViT-B-32" / f"{task}Val" / "nonlinear_finetuned.pt", each, module=False)

    source = EncoderFamily("tall_masks_v1", str(root), text=True)
    assert len(source.downloads(suite(), tower())) == (0 if copy_of_base else 1)
    experts = source.open(suite(), tower(), cache)

    seen = {key.removeprefix("model."): value for key, value in encoder_state(state).items()}
    assert_opens(experts, seen, [{key: each[key] for key in seen} for each in states])
    assert len(source.remarks) == 1 and "DTD" in source.remarks[0] and "test images" in source.remarks[0]
    assert EncoderFamily("tall_masks_v2").remarks == ()


@pytest.mark.parametrize(("name", "folder"), [("clip_vit_b32", "ViT-B-32"), ("clip_vit_b16", "VIT-B-16")])
def test_family_d_from_the_hub_as_it_is_spelt_there(hub, tmp_path, cache, name, folder):
    state = clip(name)
    states = [tuned(state, seed) for seed in range(len(TASKS))]
    name_of = "single_task/{}/{}Val/nonlinear_finetuned.pt".format
    files = {name_of(folder, task): write_encoder(tmp_path / task, each, module=False)
             for task, each in zip(TASKS, states, strict=True)}  # fmt: skip
    hub.add("nik-dim/tall_masks", files)

    experts = EncoderFamily("tall_masks_v2").open(suite(), tower(name), cache)
    assert_is(experts.origin, visual(state))
    for checkpoint, each in zip(experts.checkpoints, states, strict=True):
        assert_is(checkpoint, visual(each))


@pytest.mark.filterwarnings("ignore:Couldn't retrieve source code")
def test_family_e_from_the_hub(hub, tmp_path, cache):
    state = clip("clip_vit_l14")
    states = [tuned(state, seed) for seed in range(len(TASKS))]
    files = {"checkpoints/ViT-L-14/DTDVal/zeroshot.pt": write_encoder(tmp_path / "base", state)}
    files |= {f"checkpoints/ViT-L-14/{task}Val/finetuned.pt": write_encoder(tmp_path / task, each)
              for task, each in zip(TASKS, states, strict=True)}  # fmt: skip
    hub.add("fredzzhang/atlas", files)

    experts = EncoderFamily("atlas").open(suite(), tower("clip_vit_l14"), cache)
    assert_is(experts.origin, visual(state))
    for checkpoint, each in zip(experts.checkpoints, states, strict=True):
        assert_is(checkpoint, visual(each))


@pytest.mark.parametrize("qkv", ["separate", "fused"])
def test_a_merge_of_a_family_is_the_arithmetic_of_its_files(hub, cache, qkv):
    states = [tuned(clip("clip_vit_b16"), seed, proj=False) for seed in range(len(TASKS))]
    for task, each in zip(TASKS, states, strict=True):
        hub.add(f"tanganke/clip-vit-base-patch16_{SUFFIXES[task]}", vision_repository(each))
    merged = TaskArithmetic(scale=0.25)(HubFamily("hub_a", qkv=qkv).open(suite(), tower("clip_vit_b16"), cache))
    base = visual(clip("clip_vit_b16"))
    got = dict(merged.state())
    assert got.keys() == base.keys()
    for key, weight in base.items():
        want = weight + 0.25 * sum(each[key] - weight for each in states)
        assert torch.allclose(got[key], want, atol=1e-6), key


def test_the_base_keeps_its_text_tower_for_the_heads(hub, cache):
    assert_is(open_base(tower(), cache), clip())
    assert open_base(tower(), cache).specs()["text_projection"].shape == (TEXT_WIDTH, tower().embed_dim)


@pytest.mark.parametrize(
    ("source", "tasks", "name", "message"),
    [
        (HubFamily("hub_z"), TASKS, "clip_vit_b32", "experts.family=hub_z is no published family.*hub_a.*atlas"),
        (HubFamily("hub_a"), ("MNIST", "birds"), "clip_vit_b32", "hub_a has no expert for birds. It has: SUN397, Cars"),
        (HubFamily("lora_a"), TASKS, "clip_vit_b32", "lora_a has no experts for backbone=clip_vit_b32.*clip_vit_b16"),
        (HubFamily("lora_a"), ("KMNIST",), "clip_vit_b16", "lora_a has no expert for KMNIST"),
        (EncoderFamily("task_vectors"), TASKS, "clip_vit_b32", "not on the Hub.*Google Drive.*ViT-B-32.*experts.root"),
        (EncoderFamily("task_vectors"), ("PCAM",), "clip_vit_b32", "task_vectors has no expert for PCAM"),
        (HubFamily("hub_a"), TASKS, "clip_vit_b32", "no model tanganke/clip-vit-base-patch32_mnist"),
        (EncoderFamily("atlas"), TASKS, "clip_vit_b32", "no model fredzzhang/atlas"),
    ],
)
def test_what_a_family_lacks_is_refused_with_what_it_has(hub, cache, source, tasks, name, message):
    for ask in (lambda: plan(source.downloads(suite(*tasks), tower(name))),
                lambda: source.open(suite(*tasks), tower(name), cache)):  # fmt: skip
        with pytest.raises(UserError, match=message):
            ask()


def test_a_local_root_without_the_files_tells_what_is_there(tmp_path, cache):
    (tmp_path / "drive" / "ViT-L-14").mkdir(parents=True)
    source = EncoderFamily("task_vectors", str(tmp_path / "drive"))
    with pytest.raises(UserError, match=r"lacks the base, the expert for MNIST.*ViT-B-32/zeroshot.pt.*holds ViT-L-14"):
        source.open(suite(), tower(), cache)
    with pytest.raises(UserError, match="no such folder"):
        replace(source, root=str(tmp_path / "none")).open(suite(), tower(), cache)


def test_a_custom_backbone_has_no_published_experts(cache):
    with pytest.raises(UserError, match="no experts for backbone=mini"):
        HubFamily("hub_a").open(suite(), replace(tower(), name="mini"), cache)


def test_facts_cover_the_published_names():
    known = families.facts()
    assert known["tasks"] == SUFFIXES
    assert set(known["families"]) == {"hub_a", "lora_a", "task_vectors", "tall_masks_v1", "tall_masks_v2", "atlas"}
    for name in known["families"]:
        one = families.family(name)
        assert set(one.tasks) <= set(SUFFIXES) and len(one.tasks) in (8, 20)
        assert set(one.backbones) <= set(FOLDERS)
        assert json.dumps(one.about).isascii()
