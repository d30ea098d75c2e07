"""Shares of one task's training samples: what is cut, what stays whole, and an expert for each."""

import pickle

import pytest
import small
import torch

from merging.checkpoints import StateDict
from merging.errors import UserError
from tasks import finetune
from tasks.finetune import Recipe, make_experts
from tasks.generation import smol4
from tasks.heads.head import Given, ZeroShot
from tasks.mini import suite as mini
from tasks.shares import build
from tasks.split import SPLITS
from tasks.suite import Suite, content
from tasks.task import LabelledTask
from tasks.text import suite as text

SIZES = {"train": 40, "val": 12, "calibration": 8, "test": 12}
WHOLE = {"mini8": mini.build("mini8", ["cars", "signs"], SIZES), "gloss8": text.build("gloss8", ["pos", "sim"], SIZES),
         "smol4": smol4.build("smol4", ["word", "topic"], SIZES)}  # fmt: skip
TASKS = [("mini8", "signs"), ("gloss8", "sim"), ("smol4", "word")]


def items(split):
    inputs = split.inputs if isinstance(split.inputs, torch.Tensor) else split.inputs.items
    labels = split.labels.tolist()
    return [(one.numpy().tobytes() if isinstance(one, torch.Tensor) else one, label)
            for one, label in zip(inputs, labels, strict=True)]  # fmt: skip


@pytest.mark.parametrize(("suite", "task"), TASKS)
def test_of_train_a_share_is_drawn_and_all_else_is_the_whole(suite, task):
    whole = next(one for one in WHOLE[suite].tasks if one.name == task)
    shares = build("shares", WHOLE[suite], task, [20, 60, 100])
    assert shares.names == (f"{task}_20", f"{task}_60", f"{task}_100")
    everything = items(whole.split("train"))
    for one, count in zip(shares.tasks, (8, 24, 40), strict=True):
        drawn = items(one.split("train"))
        places = [everything.index(item) for item in drawn]
        assert len(drawn) == count and places == sorted(places) and len({*places}) == count
        assert one.classes == whole.classes and type(one) is type(whole)
        assert [content(one, name) for name in SPLITS[1:]] == [content(whole, name) for name in SPLITS[1:]]
        assert [one.split(name).id for name in SPLITS[1:]] == [whole.split(name).id for name in SPLITS[1:]]
        assert content(one, "head") == content(whole, "head")
        assert pickle.loads(pickle.dumps(one)).split("train").id == one.split("train").id
    assert shares.tasks[2].split("train").id == whole.split("train").id


def test_shares_and_seeds_are_drawn_apart():
    ids = [content(one, "train") for seed in (0, 1) for one in build("s", WHOLE["mini8"], "cars", [20, 60], seed).tasks]
    assert len({*ids}) == 4
    few, more = (items(one.split("train")) for one in build("s", WHOLE["mini8"], "cars", [20, 60]).tasks)
    assert not {*few} <= {*more}, "no share is the beginning of another"


def test_every_share_has_an_expert_of_as_many_passes(cache, monkeypatch):
    steps, honest = {}, finetune.train_expert

    def noting(job, *rest):
        steps[job.task.name] = job.recipe.steps
        return honest(job, *rest)

    monkeypatch.setattr(finetune, "train_expert", noting)
    task = LabelledTask("hues", small.Coloured("hues"), Given(ZeroShot(small.matrix("hues"))))
    suite = build("shares", Suite("small", (task,)), "hues", [50, 100])
    recipe = Recipe(epochs=2, batch=4, warmup=1)
    made = [make_experts(StateDict(small.tower_state()), small.TOWER, suite, recipe, 0, cache, 1) for _ in range(2)]
    assert steps == {"hues_50": 6, "hues_100": 12}
    assert [one.id for one in made[0]] == [one.id for one in made[1]] and made[0][0].id != made[0][1].id


@pytest.mark.parametrize(("options", "message"), [
    (("digits", [20]), r"There is no task 'digits' in the suite mini8. It has: cars, signs"),
    (("cars", [0, 20]), r"suite: shares=0 is out of range"), (("cars", [101]), r"suite: shares=101 is out of range"),
    (("cars", [20, 20]), r"lists one twice"), (("cars", []), r"(?i)task"),
])  # fmt: skip
def test_bad_input(options, message):
    with pytest.raises(UserError, match=message):
        build("shares", WHOLE["mini8"], *options)
