"""Experts on disk: made once, with their provenance, shared, and the same bits after a kill.

As a script it makes one expert slowly, to be killed: `python test_expert_files.py <folder>`.
"""

import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import small
import torch

from merging.checkpoints import SafetensorsFile, StateDict
from merging.errors import UserError
from tasks.engine import Engine
from tasks.expert_files import Bench
from tasks.recipes import ClipRecipe
from tasks.split import Split
from tasks.training import Training
from tasks.vision.folder import Folder

pytestmark = pytest.mark.usefixtures("one_thread")

FEW = ClipRecipe(steps=30, batch=8, lr=0.01, warmup=2)
LONG = replace(FEW, steps=400)


def bench(folder, recipe=FEW, **knobs):
    return Bench(StateDict(small.tower_state()), small.TOWER, recipe, 0, Path(folder), Engine("cpu"), **knobs)


def stored(path):
    file = SafetensorsFile(path)
    return {key: file.tensor(key).clone() for key in file.specs()}


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


@pytest.fixture
def steps(monkeypatch):
    """The steps that were really trained, one entry each."""
    taken, honest = [], Training._learn

    def noting(self, *batch):
        taken.append(self.step)
        return honest(self, *batch)

    monkeypatch.setattr(Training, "_learn", noting)
    return taken


def right(state, task):
    tower, val = small.TOWER.build(), task.split("val")
    tower.load_state_dict(state)
    with torch.inference_mode():
        found = (tower(small.TOWER.prepare(val.inputs)) @ task.head().weight.T).argmax(1)
    return (found == val.labels).float().mean().item()


def test_an_expert_is_written_as_experts_folder_reads_it(tmp_path, cache, steps):
    tasks = small.suite("hues", "tints")
    made = [bench(tmp_path / "own").make(task) for task in tasks.tasks]
    source = Folder(str(tmp_path / "own" / "hues.safetensors"), str(tmp_path / "own" / "{task}.safetensors"))
    opened = source.open(tasks, small.TOWER, cache)

    assert len(steps) == 2 * FEW.steps and sorted(path.name for path in (tmp_path / "own").glob("*.*")) == [
        ".training", "hues.safetensors", "tints.safetensors"]  # fmt: skip
    assert not list((tmp_path / "own" / ".training").iterdir())
    for task, each, checkpoint in zip(tasks.tasks, made, opened.checkpoints, strict=True):
        state = {key: checkpoint.tensor(key) for key in checkpoint.specs()}
        assert each.fresh and each.after == pytest.approx(right(state, task)) and each.after > each.before
        assert each.before == pytest.approx(right(small.tower_state(), task))


def test_the_header_says_how_it_was_made(tmp_path):
    task = small.Colours("hues")
    path = bench(tmp_path, family="mine").make(task).path
    metadata = SafetensorsFile(path).metadata
    made = json.loads(metadata["made"])
    assert metadata["family"] == "mine" and made["task"] == "hues" and made["seed"] == 0
    assert made["base"] == StateDict(small.tower_state()).id and made["train"] == task.split("train").id
    assert (made["recipe.lr"], made["recipe.optimizer"], made["recipe.steps"]) == (0.01, "adamw", 30)


def test_a_finished_expert_is_left_alone(tmp_path, steps):
    task = small.Colours("hues")
    first = bench(tmp_path).make(task)
    before = first.path.stat()
    (tmp_path / ".training" / "hues.safetensors").write_bytes(b"left by a kill")
    again = bench(tmp_path, replace(FEW, accumulate=2)).make(task)
    assert again == replace(first, fresh=False) and len(steps) == FEW.steps
    assert first.path.stat() == before and not (tmp_path / ".training" / "hues.safetensors").exists()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"recipe": replace(FEW, lr=0.02)}, "recipe.lr=0.01, now 0.02"),
        ({"recipe": replace(FEW, frozen=["visual.proj"])}, r"recipe.frozen=\[\], now"),
        ({"seed": 1}, "seed=0, now 1"),
        ({"base": StateDict(small.tower_state(1))}, "another base"),
        ({"backbone": replace(small.TOWER, mean=(0.4, 0.5, 0.5))}, r"backbone.mean=\[0.5, 0.5, 0.5\], now \[0.4, 0.5"),
        ({"backbone": replace(small.TOWER, quick_gelu=True)}, "backbone.quick_gelu=False, now True"),
    ],
)
def test_an_expert_made_otherwise_is_refused_from_its_header(tmp_path, steps, changed, message):
    task = small.Colours("hues")
    bench(tmp_path).make(task)
    other = replace(bench(tmp_path), **changed)
    for refuse in (lambda: other.check("hues"), lambda: other.make(task)):
        with pytest.raises(UserError, match=rf"hues.safetensors is there already, made with {message}.*redo=true"):
            refuse()
    assert len(steps) == FEW.steps
    redone = replace(other, redo=True).make(task)
    assert redone.fresh and len(steps) == 2 * FEW.steps
    other.check("hues")


def test_other_images_are_noticed_when_they_are_read(tmp_path):
    task = small.Colours("hues")
    bench(tmp_path).make(task)
    split = task.split("train")
    flipped = Split("train", split.inputs.flip(3), split.labels)
    object.__setattr__(task, "split", lambda name: flipped if name == "train" else split)
    bench(tmp_path).check("hues")
    with pytest.raises(UserError, match="other training samples"):
        bench(tmp_path).make(task)


def test_epochs_are_compared_as_steps(tmp_path):
    task, recipe = small.Colours("hues"), replace(FEW, epochs=2.0)
    bench(tmp_path, recipe).make(task)
    bench(tmp_path, recipe).check("hues")
    assert not bench(tmp_path, recipe).make(task).fresh
    with pytest.raises(UserError, match=r"recipe.steps=6, now 9"):
        bench(tmp_path, replace(FEW, epochs=3.0)).make(task)


def test_a_file_of_unknown_origin_is_refused(tmp_path):
    from safetensors.torch import save_file

    save_file(small.tower_state(), tmp_path / "hues.safetensors")
    with pytest.raises(UserError, match="was not made by duet-finetune"):
        bench(tmp_path).check("hues")


def test_a_task_without_training_images_is_refused(tmp_path):
    task = small.Colours("hues")
    split = task.split("train")
    object.__setattr__(task, "split", lambda name: Split(name, split.inputs[:0], split.labels[:0]))
    with pytest.raises(UserError, match="hues has no training samples"):
        bench(tmp_path).make(task)


def test_a_full_disk_is_told_before(tmp_path, monkeypatch):
    each = sum(value.numel() * 4 for value in small.tower_state().values())
    for free, fits in ((8 * each, True), (8 * each - 1, False)):
        monkeypatch.setattr("shutil.disk_usage", lambda path, free=free: SimpleNamespace(free=free))
        if fits:
            bench(tmp_path).check_space(["hues", "tints"])
        else:
            with pytest.raises(UserError, match="2 experts and a snapshot of the training need"):
                bench(tmp_path).check_space(["hues", "tints"])
    (tmp_path / "hues.safetensors").touch()
    bench(tmp_path).check_space(["hues", "tints"])


class Stop(Exception):
    """Raised in the middle of a training."""


def interrupted(folder, at, monkeypatch, recipe=FEW):
    """A training that stores every step and dies at one."""
    honest = Training._learn

    def dying(self, *batch):
        if self.step == at:
            raise Stop
        return honest(self, *batch)

    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(Training, "_learn", dying)
        bench(folder, recipe, every=0.0).make(small.Colours("hues"))


def test_an_interrupted_training_goes_on_where_it_was(tmp_path, monkeypatch, steps):
    whole = bench(tmp_path / "whole").make(small.Colours("hues"))
    del steps[:]
    interrupted(tmp_path / "cut", 11, monkeypatch)
    assert steps == list(range(11))
    made = bench(tmp_path / "cut").make(small.Colours("hues"))
    assert steps == list(range(FEW.steps))
    assert same(stored(made.path), stored(whole.path)) and (made.before, made.after) == (whole.before, whole.after)
    assert SafetensorsFile(made.path).metadata == SafetensorsFile(whole.path).metadata


def test_an_unfinished_training_of_another_recipe_is_refused(tmp_path, monkeypatch, steps):
    interrupted(tmp_path, 5, monkeypatch)
    del steps[:]
    other = bench(tmp_path, replace(FEW, batch=4))
    with pytest.raises(UserError, match=r"\.training/hues.safetensors.*recipe.batch=8, now 4.*redo=true"):
        other.make(small.Colours("hues"))
    assert not steps
    replace(other, redo=True).make(small.Colours("hues"))
    assert steps == list(range(FEW.steps))


def test_a_killed_process_costs_no_bit(tmp_path):
    """SIGKILL in the middle of the training, and in the middle of writing a snapshot as it happens."""
    from processes import interruptible  # not found where this file is the script

    snapshot = tmp_path / "cut" / ".training" / "hues.safetensors"
    with interruptible([sys.executable, __file__, str(tmp_path / "cut")], stderr=subprocess.PIPE) as process:
        while not snapshot.exists() and process.poll() is None:
            time.sleep(0.001)
        process.kill()
    at = int(SafetensorsFile(snapshot).metadata["step"])
    assert 0 < at < LONG.steps and not (tmp_path / "cut" / "hues.safetensors").exists()
    cut, whole = (bench(tmp_path / name, LONG).make(small.Colours("hues")).path for name in ("cut", "whole"))
    assert same(stored(cut), stored(whole))


if __name__ == "__main__":
    torch.set_num_threads(1)
    bench(sys.argv[1], LONG, every=0.0).make(small.Colours("hues"))
