"""Experts whose text tower was tuned too: it is told, never merged, and reads the class names where that is wanted."""

import pytest
import torch
from clips import BLOCKS, EMBED, TEXT_WIDTH, WIDTH, hugging_face, lora_repository, tuned, whole
from safetensors.torch import load, save_file
from served import assert_opens, suite, tower, visual

from merging.checkpoints import StateDict
from merging.errors import UserError
from tasks.heads import text_towers
from tasks.heads.text import zero_shot_head
from tasks.vision.data import Store
from tasks.vision.folder import Folder
from tasks.vision.suite import build

TASKS = ("pets", "fruit")
DIFFERS = "text tower in the file differs from the base's and is not used"
CLASSES = {"pets": ["cat", "red fox"], "fruit": ["apple", "pear"]}
BASE = whole(1, size=64)


def both_tuned(seed):
    """The image tower of `tuned`, and a text tower moved as well."""
    random = torch.Generator().manual_seed(seed)
    moved = tuned(BASE, seed)
    return {key: value if key.startswith("visual.") else value + 0.05 * torch.randn(value.shape, generator=random)
            for key, value in moved.items()}  # fmt: skip


def folder(path, states, base=BASE, **knobs):
    """Files of these experts beside their base."""
    save_file(base, path / "base.safetensors")
    for task, state in zip(TASKS, states, strict=True):
        save_file({key: value.contiguous() for key, value in state.items()}, path / f"{task}.safetensors")
    return Folder(f"{path}/base.safetensors", f"{path}/{{task}}.safetensors", **knobs)


def opened(source, cache):
    return source.open(suite(*TASKS), tower(), cache)


def images(path):
    """A suite whose class names are read by the base's text tower."""
    sources = {task: {"folder": str(path), "classes": CLASSES[task]} for task in TASKS}
    store = Store(str(path / "images"), str(path / "heads"))
    return build("mine", TASKS, store, str(path / "base.safetensors"), size=64, sources=sources)


@pytest.mark.parametrize("text", [False, True])
@pytest.mark.parametrize("layout", ["open_clip", "hugging_face"])
def test_a_tuned_text_tower_is_told_and_left_out(tmp_path, cache, layout, text):
    states = [both_tuned(seed) for seed in range(2)]
    written = states if layout == "open_clip" else list(map(hugging_face, states))
    experts = opened(folder(tmp_path, written, text=text), cache)
    (remark,) = experts.remarks
    assert remark.startswith(f"pets, fruit: the {DIFFERS}: suite.text reads the class names (experts.heads=expert")
    if not text:
        assert_opens(experts, visual(BASE), map(visual, states), TASKS)


def test_what_was_not_trained_is_not_told(tmp_path, cache, monkeypatch):
    """An untouched text tower, also in half precision; a logit scale alone is named for what it is."""
    scaled = {**tuned(BASE, 1), "logit_scale": torch.tensor(4.0)}
    source = folder(tmp_path, [{key: value.half() for key, value in tuned(BASE, 0).items()}, scaled])
    remarks = opened(source, cache).remarks
    assert len(remarks) == 1 and remarks[0].startswith("fruit: the logit scale in the file differs from the base's")

    monkeypatch.setattr(text_towers, "first_difference", lambda *_: pytest.fail("read again"))
    assert opened(source, cache).remarks == remarks
    assert opened(folder(tmp_path, [visual(tuned(BASE, seed)) for seed in (2, 3)]), cache).remarks == ()


def test_a_base_without_a_text_tower(tmp_path, cache):
    source = folder(tmp_path, [both_tuned(0), visual(tuned(BASE, 1))], base=visual(BASE))
    (remark,) = opened(source, cache).remarks
    assert remark.startswith("pets: the text tower in the file, which the base has none to compare with, is not used")


def test_heads_of_the_experts_own_text_towers(tmp_path, cache):
    states = [both_tuned(seed) for seed in range(2)]
    source = folder(tmp_path, states, heads="expert")
    before = images(tmp_path)
    headed = source.headed(before, tower(), cache)

    for task, plain, state in zip(headed.tasks, before.tasks, states, strict=True):
        want, other = (zero_shot_head(StateDict(each), CLASSES[task.name], task.heads.templates, True, cache)
                       for each in (state, BASE))  # fmt: skip
        assert torch.equal(task.head().weight, want) and torch.equal(plain.head().weight, other)
        assert not torch.equal(want, other)
    assert opened(source, cache).remarks == ("pets, fruit: its own text tower reads the class names",)
    assert folder(tmp_path, states).headed(before, tower(), cache) is before


def test_experts_and_suites_that_have_no_such_heads_are_refused(tmp_path, cache):
    source = folder(tmp_path, [both_tuned(0), visual(tuned(BASE, 1))], heads="expert")
    with pytest.raises(UserError, match=r"fruit.safetensors of fruit has none. Choose experts.heads=suite"):
        source.headed(images(tmp_path), tower(), cache)
    source = folder(tmp_path, [both_tuned(0), both_tuned(1)], heads="expert")
    with pytest.raises(UserError, match=r"the head of pets is given"):
        source.headed(suite(*TASKS), tower(), cache)


def adapter(path, seed):
    """A LoRA adapter on q and v of both towers; its factors by their names."""
    path.mkdir()
    for name, content in lora_repository(seed, text=True).items():
        (path / name).write_bytes(content)
    return load((path / "adapter_model.safetensors").read_bytes())


def changed(factors, model, block, width):
    """What the adapter adds to the fused projection [3 width, width] of a block, its scale being 8 / 4."""
    stacked = torch.zeros(3, width, width)
    for third, letter in ((0, "q"), (2, "v")):
        start = f"base_model.model.{model}.encoder.layers.{block}.self_attn.{letter}_proj.lora_"
        stacked[third] = 2 * factors[f"{start}B.weight"] @ factors[f"{start}A.weight"]
    return stacked.flatten(0, 1)


def test_an_adapter_of_both_towers(tmp_path, cache):
    save_file(BASE, tmp_path / "base.safetensors")
    factors = [adapter(tmp_path / task, seed) for seed, task in enumerate(TASKS)]
    source = Folder(f"{tmp_path}/base.safetensors", f"{tmp_path}/{{task}}")
    experts = opened(source, cache)
    assert experts.remarks[0].startswith(f"pets, fruit: the {DIFFERS}")
    headed = Folder(source.base, source.experts, heads="expert").headed(images(tmp_path), tower(), cache)
    for checkpoint, task, each in zip(experts.checkpoints, headed.tasks, factors, strict=True):
        assert checkpoint.specs().keys() == visual(BASE).keys()
        text = task.heads.text.open(cache)
        for block in range(BLOCKS):
            name = f"transformer.resblocks.{block}.attn.in_proj_weight"
            for whose, key, model, width in ((checkpoint, f"visual.{name}", "vision_model", WIDTH),
                                             (text, name, "text_model", TEXT_WIDTH)):  # fmt: skip
                want = BASE[key] + changed(each, model, block, width)
                torch.testing.assert_close(whose.tensor(key), want)
        assert torch.equal(text.tensor("ln_final.weight"), BASE["ln_final.weight"])
        assert task.head().weight.shape == (2, EMBED)


def test_an_adapter_of_the_image_tower_alone_tells_nothing(tmp_path, cache):
    save_file(BASE, tmp_path / "base.safetensors")
    for seed, task in enumerate(TASKS):
        (tmp_path / task).mkdir()
        for name, content in lora_repository(seed).items():
            (tmp_path / task / name).write_bytes(content)
    source = Folder(f"{tmp_path}/base.safetensors", f"{tmp_path}/{{task}}")
    assert opened(source, cache).remarks == ()
