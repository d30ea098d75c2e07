"""A user's own experts, in every layout; what is missing, mixed or misfit is told."""

import json

import pytest
import torch
from clips import BLOCKS, WIDTH, hugging_face, lora_repository, tuned, vision_repository, write_encoder
from safetensors.torch import save_file
from served import TASKS, assert_opens, clip, suite, tower, visual

from merging.errors import UserError
from tasks.vision.folder import Folder


def local(cache, folder, **knobs):
    """Experts from files in `folder`."""
    return Folder(**{"base": f"{folder}/base.safetensors", "experts": f"{folder}/{{task}}.safetensors", **knobs}).open(
        suite(), tower(), cache
    )


@pytest.fixture
def files(tmp_path):
    """A base and an expert per task in open_clip's names."""
    folder, state = tmp_path / "own", clip()
    folder.mkdir()
    save_file(state, folder / "base.safetensors")
    for seed, task in enumerate(TASKS):
        save_file(visual(tuned(state, seed)), folder / f"{task}.safetensors")
    return folder


def test_own_experts_by_a_template(files, cache):
    experts = local(cache, files)
    assert_opens(experts, visual(clip()), [visual(tuned(clip(), seed)) for seed in range(len(TASKS))])


def test_own_experts_one_by_one_and_the_published_base(hub, files, cache):
    source = Folder("openai", paths={task: str(files / f"{task}.safetensors") for task in TASKS}, qkv="separate")
    assert [each.repo for each in source.downloads(suite(), tower())] == ["openai/clip-vit-base-patch32"]
    experts = source.open(suite(), tower(), cache)
    assert_opens(experts, visual(clip()), [visual(tuned(clip(), seed)) for seed in range(len(TASKS))])
    assert experts.separate_qkv


@pytest.mark.filterwarnings("ignore:Couldn't retrieve source code")
@pytest.mark.parametrize("layout", ["hugging_face", "pickle", "lora"])
def test_own_experts_in_other_layouts(files, cache, layout):
    state, want = clip(), []
    for seed, task in enumerate(TASKS):
        folder = files / task
        folder.mkdir()
        want.append(visual(tuned(state, seed, proj=layout == "pickle")))
        if layout == "pickle":
            write_encoder(folder / "model.pt", tuned(state, seed))
            continue
        made = vision_repository(tuned(state, seed, proj=False)) if layout == "hugging_face" else lora_repository(seed)
        for name, content in made.items():
            (folder / name).write_bytes(content)
    template = f"{files}/{{task}}/model.pt" if layout == "pickle" else f"{files}/{{task}}"
    experts = local(cache, files, experts=template)
    if layout == "lora":
        changed = {key for key in experts.specs() if experts.tau(key).any()}
        assert changed == {f"visual.transformer.resblocks.{block}.attn.in_proj_weight" for block in range(BLOCKS)}
    else:
        assert_opens(experts, visual(state), want)


WRAPPED = {  # file name, how it is made of an expert's state dict, and what is told
    "epoch_10.pt": (
        lambda state: {"epoch": 10, "state_dict": behind("module.", state), "optimizer": {"state": {}}},
        ("read from its level state_dict, without epoch, optimizer beside it", "names without module."),
    ),
    "last.ckpt": (
        lambda state: {"state_dict": behind("model._orig_mod.", state), "hyper_parameters": {"prior": torch.ones(2)}},
        ("read from its level state_dict, without hyper_parameters beside it", "names without _orig_mod.",
         "names without model."),
    ),
    "openai.pt": (
        lambda state: state | {"input_resolution": torch.tensor(224), "context_length": torch.tensor(77),
                               "vocab_size": torch.tensor(49408)},
        ("without input_resolution, context_length, vocab_size, as in OpenAI's own files",),
    ),
    "expert": (lambda state: behind("module.clip.", hugging_face(state)),
               ("names without module.", "names without clip.")),
    "expert.pth.tar": (lambda state: {"ema": behind("base_model.model.", state)},
                       ("read from its level ema", "names without base_model.model.")),
}  # fmt: skip


def behind(prefix, state):
    return {prefix + key: value for key, value in state.items()}


@pytest.mark.parametrize("name", WRAPPED)
def test_wrapped_files_are_read_and_told(files, cache, name):
    make, told = WRAPPED[name]
    states = [tuned(clip(), seed) for seed in range(len(TASKS))]
    for task, state in zip(TASKS, states, strict=True):
        (files / task).mkdir()
        torch.save(make(state), files / task / name)
    experts = local(cache, files, experts=f"{files}/{{task}}/{name}")
    assert_opens(experts, visual(clip()), map(visual, states))
    assert experts.remarks == tuple(f"{', '.join(TASKS)}: {each}" for each in told)


def test_wrapped_safetensors_and_a_wrapped_base(files, cache):
    state = tuned(clip(), 7)
    save_file(behind("module.", clip()), files / "base.safetensors")
    save_file(behind("module.", state), files / "Cars.safetensors")
    experts = local(cache, files)
    assert_opens(experts, visual(clip()), [visual(tuned(clip(), 0)), visual(tuned(clip(), 1)), visual(state)])
    assert experts.remarks == ("the base, Cars: names without module.",)


def test_what_is_beside_a_clip_is_refused(files, cache):
    state = visual(tuned(clip(), 7))
    for more, message in (
        ({"student.head.weight": torch.ones(2)}, r"head.weight, which is no parameter of open_clip's CLIP"),
        ({"criterion.weight": torch.ones(2)}, r"a CLIP behind student., and beside it criterion.weight"),
        (behind("teacher.", visual(clip())), r"holds 2 CLIPs, behind student., teacher..*not guessed"),
        (visual(clip()), r"holds 2 CLIPs, behind no prefix, student."),
    ):
        save_file(behind("student.", state) | more, files / "DTD.safetensors")
        with pytest.raises(UserError, match=f"DTD.safetensors.*{message}"):
            local(cache, files)


def test_an_adapter_that_is_not_merged_is_refused(files, cache):
    """Its file instead of its folder, and the state dict of a model that peft still wraps."""
    (files / "DTD.safetensors").write_bytes(lora_repository(0)["adapter_model.safetensors"])
    with pytest.raises(UserError, match=r"DTD.safetensors holds an adapter that is not merged.*Name the folder"):
        local(cache, files)
    whole = behind("base_model.model.", visual(clip()))
    save_file(whole | {"base_model.model.visual.proj.lora_A.weight": torch.ones(2)}, files / "DTD.safetensors")
    with pytest.raises(UserError, match=r"holds an adapter.*merge_and_unload"):
        local(cache, files)


def test_a_folder_with_a_sharded_checkpoint(files, cache):
    state = hugging_face(tuned(clip(), 7))
    folder, names = files / "DTD", sorted(state)
    folder.mkdir()
    for number, some in enumerate((names[::2], names[1::2])):
        save_file({key: state[key].contiguous() for key in some}, folder / f"{number}.safetensors")
    index = {key: f"{number % 2}.safetensors" for number, key in enumerate(names)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    experts = Folder(f"{files}/base.safetensors", f"{files}/{{task}}").open(suite("DTD"), tower(), cache)
    assert_opens(experts, visual(clip()), [visual(tuned(clip(), 7))], ["DTD"])


def test_two_families_are_not_mixed(files, cache):
    save_file(hugging_face(tuned(clip(), 5, proj=False), text=False), files / "DTD.safetensors")
    with pytest.raises(UserError, match=r"different families.*DTD hugging_face"):
        local(cache, files)
    save_file(visual(tuned(clip(), 5)), files / "DTD.safetensors", {"family": "hub_a"})
    with pytest.raises(UserError, match=r"DTD.safetensors is of the family hub_a.*of folder.*not mixed"):
        local(cache, files)


def test_files_that_are_not_there_are_all_named(files, cache):
    (files / "DTD.safetensors").unlink()
    (files / "Cars.safetensors").unlink()
    with pytest.raises(
        UserError, match=r"DTD.safetensors \(DTD\).*Cars.safetensors \(Cars\).*It holds MNIST.safetensors"
    ):
        local(cache, files)
    with pytest.raises(UserError, match=r"Write \{task\}"):
        local(cache, files, experts=f"{files}/expert.safetensors")


def test_experts_that_do_not_fit_are_refused(files, cache):
    state = visual(tuned(clip(), 1))
    for change, message in (
        (lambda: state.pop("visual.proj"), "lacks visual.proj"),
        (lambda: state.update({"visual.proj": torch.ones(3, 4)}), r"visual.proj is \(3, 4\), there \(64, 16\)"),
        (
            lambda: state.update({"visual.proj": torch.ones(WIDTH, 16).long()}),
            "of type torch.int64, which is not merged",
        ),
        (lambda: state.update({"visual.proj": torch.ones(WIDTH, 16), "visual.more": torch.ones(1)}), "visual.more"),
    ):
        change()
        save_file(state, files / "DTD.safetensors")
        with pytest.raises(UserError, match=f"DTD.safetensors.*{message}"):
            local(cache, files)
    save_file({"weight": torch.ones(1)}, files / "DTD.safetensors")
    with pytest.raises(UserError, match="no CLIP image tower: it has weight"):
        local(cache, files)


def test_unknown_cut_of_attention_is_refused(files, cache):
    with pytest.raises(UserError, match=r"experts\.qkv=both"):
        local(cache, files, qkv="both")


@pytest.mark.parametrize(("name", "task"), [(TASKS[0].lower(), TASKS[0]), (TASKS[1] + "s", TASKS[1])])
def test_a_misspelt_task_in_paths_is_told(files, cache, name, task):
    with pytest.raises(
        UserError, match=rf"experts\.paths\.{name} is read by no task: there is {task}, and no {name}\."
    ):
        local(cache, files, paths={name: str(files / "other.safetensors")})


def test_paths_may_name_more_than_the_suite_has(files, cache, caplog):
    caplog.set_level("INFO")
    local(cache, files, paths={"quite_another": "nowhere.safetensors"})
    assert "experts.paths: no task reads quite_another" in caplog.text
