"""Experts are made once, the same way every time, and none is lost."""

import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import small
import torch
from processes import interruptible

from merging import Cache
from merging.errors import UserError
from tasks import finetune
from tasks.finetune import Job, Recipe, train_expert


@pytest.fixture
def trained(monkeypatch):
    """The names of the tasks that were really trained, in order."""
    names, honest = [], train_expert

    def noting(job, *rest):
        names.append(job.task.name)
        return honest(job, *rest)

    monkeypatch.setattr(finetune, "train_expert", noting)
    return names


def states(made):
    return [{key: expert.tensor(key) for key in expert.specs()} for expert in made]


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def stored(folder):
    return [path for path in Path(folder).glob("??/*") if not path.name.startswith(".")]


def test_the_rate_warms_up_then_falls_to_zero():
    recipe = Recipe(steps=100, lr=0.1, warmup=10)
    rates = [recipe.rate(step) for step in range(101)]

    assert rates[0] == pytest.approx(0.01) and rates[100] == 0
    assert rates[9] == max(rates) == pytest.approx(0.05 * (1 + math.cos(0.09 * math.pi)))
    assert rates[:10] == sorted(rates[:10]) and rates[9:] == sorted(rates[9:], reverse=True)
    assert Recipe(lr=0.1, warmup=0).rate(0) == 0.1


@pytest.mark.parametrize("wrong", [{"steps": 0}, {"batch": 0}, {"lr": 0.0}, {"lr": 2.0}, {"lr": math.nan}])
def test_a_recipe_out_of_range_is_refused(wrong):
    (name,) = wrong
    with pytest.raises(UserError, match=f"recipe: {name}=.* out of range"):
        Recipe(**wrong)


def test_training_repeats_bitwise_and_leaves_base_and_head_alone(one_thread):
    base, task, ticks = small.tower_state(), small.Colours("hues"), []
    job = Job(base, small.TOWER, task, small.RECIPE, 0, task.split("train"), "key")
    first = train_expert(job, lambda: ticks.append(1))
    torch.rand(7)  # the caller's random numbers do not matter
    second = train_expert(job)

    assert len(ticks) == small.RECIPE.steps and set(task.asked) == {"train"}
    assert same(first, second) and same(base, small.tower_state())
    assert first.keys() == base.keys()  # the head is no parameter
    assert all(value.dtype == torch.float32 and not value.requires_grad for value in first.values())
    assert not any(torch.equal(first[key], base[key]) for key in base)
    assert not same(first, train_expert(Job(base, small.TOWER, task, small.RECIPE, 1, task.split("train"), "key")))


def test_training_learns(one_thread):
    task = small.Colours("hues")
    recipe = Recipe(steps=60, batch=24, lr=0.01)
    state = train_expert(Job(small.tower_state(), small.TOWER, task, recipe, 0, task.split("train"), "key"))
    tower, split = small.TOWER.build(), task.split("val")
    tower.load_state_dict(state)
    with torch.inference_mode():
        right = (tower(small.TOWER.prepare(split.inputs)) @ task.head().weight.T).argmax(1) == split.labels
    assert right.float().mean() > 0.9


def test_experts_come_from_the_cache_the_second_time(cache, trained):
    first = small.experts(cache)
    assert trained == ["hues", "tints"]
    again = small.experts(Cache(cache.folder))

    assert trained == ["hues", "tints"]
    assert [expert.id for expert in again] == [expert.id for expert in first]
    assert "hues" in again[0].name and "tints" in again[1].name


def test_a_new_task_or_recipe_trains_only_what_is_new(cache, trained):
    small.experts(cache, ["hues"])
    small.experts(cache, ["tints", "hues"])
    assert trained == ["hues", "tints"]
    small.experts(cache, ["hues"], Recipe(steps=4, batch=8, warmup=1))
    assert trained == ["hues", "tints", "hues"]


def test_epochs_are_passes_over_the_samples_of_a_task(cache, monkeypatch):
    steps = []
    monkeypatch.setattr(finetune, "train_expert", lambda job, *rest: steps.append(job.recipe.steps) or job.base)
    small.experts(cache, ["hues"], Recipe(epochs=2.0, batch=8, warmup=1))
    assert steps == [6]  # of 24 samples


def test_a_damaged_expert_is_trained_again(cache, trained):
    first = states(small.experts(cache))
    path = max(stored(cache.folder))
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))

    assert all(same(*pair) for pair in zip(states(small.experts(cache)), first, strict=True))
    assert len(trained) == 3 and path.read_bytes() == content


def test_worker_processes_give_the_same_experts(tmp_path, one_thread):
    here = states(small.experts(Cache(tmp_path / "here"), workers=1))
    there = states(small.experts(Cache(tmp_path / "there"), workers=2))
    assert all(same(*pair) for pair in zip(here, there, strict=True))


def test_ctrl_c_keeps_what_is_finished(tmp_path, trained):
    command = [sys.executable, small.__file__, str(tmp_path)]
    with interruptible(command, stderr=subprocess.PIPE) as process:
        while not stored(tmp_path) and process.poll() is None:
            time.sleep(0.002)
        os.killpg(process.pid, signal.SIGINT)  # a terminal sends it to the whole group
        _, errors = process.communicate(timeout=60)
    kept = len(stored(tmp_path))

    assert process.returncode != 0 and b"KeyboardInterrupt" in errors  # 1 where torch counts compilations at exit
    assert 1 <= kept < len(small.FOUR)
    assert len(small.experts(Cache(tmp_path), small.FOUR, small.LONG)) == len(small.FOUR)
    assert len(trained) == len(small.FOUR) - kept
