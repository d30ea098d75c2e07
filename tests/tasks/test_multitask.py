"""One model for all tasks: the same loss as its experts, images of every task in turn, and a file that says so."""

import json
from dataclasses import dataclass

import pytest
import small
import torch
from torch.nn import functional

from merging.checkpoints import SafetensorsFile, StateDict
from merging.context import Context
from merging.errors import UserError
from merging.experts import Experts
from merging.methods import Multitask
from merging.ops import generator
from tasks.data import SuiteData
from tasks.engine import Engine
from tasks.expert_files import Bench
from tasks.finetune import make_experts, make_multitask
from tasks.multitask import Together
from tasks.recipes import ClipRecipe, Recipe
from tasks.split import Split
from tasks.suite import Suite
from tasks.training import Job, Training, order

pytestmark = pytest.mark.usefixtures("one_thread")

RECIPE = Recipe(steps=4, batch=10, lr=0.01, warmup=2)


@dataclass(frozen=True)
class Few(small.Coloured):
    """Two classes and ten images, where the other tasks have three and 24."""

    classes: tuple[str, ...] = ("red", "green")

    def split(self, name):
        split = super().split(name)
        return Split(name, split.inputs[:10], split.labels[:10] % 2)


def tasks():
    return (
        small.Colours("hues"),
        small.Colours("tints", Few("tints"), small.matrix("tints")[:2]),
        small.Colours("shades"),
    )


def suite():
    return Suite("small", tasks())


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def test_the_loss_of_an_image_is_that_of_its_own_task():
    """Transcribed: an image of each task in turn, everyone's logits from the head of its own task."""
    images, random, made = [], generator("finetune", 0, "multitask"), tasks()
    streams = [[] for _ in made]
    while len(images) < 40:  # 4 steps of 10
        for task, stream in zip(made, streams, strict=True):
            stream += [] if stream else torch.randperm(len(task.split("train")), generator=random).tolist()
            images.append((task, stream.pop(0)))
    tower = small.TOWER.build().train()
    tower.load_state_dict(small.tower_state())
    optimizer = torch.optim.AdamW(tower.parameters(), weight_decay=RECIPE.weight_decay)
    for step in range(4):
        losses = []
        for task, index in images[10 * step : 10 * step + 10]:
            split = task.split("train")
            features = functional.normalize(tower(small.TOWER.prepare(split.inputs[index : index + 1])), dim=-1)
            losses.append(functional.cross_entropy(features @ task.head().weight.T, split.labels[index : index + 1]))
        optimizer.param_groups[0]["lr"] = RECIPE.rate(step)
        optimizer.zero_grad()
        torch.stack(losses).mean().backward()
        torch.nn.utils.clip_grad_norm_(tower.parameters(), 1.0)
        optimizer.step()

    task = Together(made)
    training = Training(Job(small.tower_state(), small.TOWER, task, RECIPE, 0, task.split("train"), ""))
    training.run()
    found, expected = training.weights(), tower.state_dict()
    moved = [key for key in found if not key.endswith("in_proj_bias")]  # a key's has no gradient but rounding
    assert all(torch.allclose(found[key], expected[key], rtol=0, atol=1e-4) for key in moved)


def test_every_task_gives_as_many_images_whatever_its_size():
    batches = list(order((24, 10, 24), RECIPE, generator("x")))
    owners = torch.bucketize(torch.cat(batches), torch.tensor([24, 34, 58]), right=True)
    assert owners.tolist() == [0, 1, 2] * 13 + [0]
    few = [index for index in torch.cat(batches).tolist() if 24 <= index < 34]
    assert sorted(few[:10]) == list(range(24, 34)) and len(few) == 13
    assert torch.equal(torch.cat(list(order((24, 10, 24), RECIPE, generator("x"), 2))), torch.cat(batches[2:]))


def test_images_and_labels_are_counted_through():
    made = tasks()
    split = Together(made).split("val")
    images, labels = split.take(torch.tensor([57, 24, 33, 0]))
    parts = [task.split("val") for task in made]
    for image, (part, index) in zip(images, [(2, 23), (1, 0), (1, 9), (0, 0)], strict=True):
        assert torch.equal(image, parts[part].inputs[index])
    assert labels.tolist() == [5 + parts[2].labels[23], 3 + parts[1].labels[0], 3 + parts[1].labels[9], 0]
    assert len(split) == 58 and split.id != Together(made[::-1]).split("val").id
    assert Together(made).owners().tolist() == [0, 0, 0, 1, 1, 2, 2, 2] and len(Together(made).head().weight) == 8


@pytest.mark.parametrize("recipe", [RECIPE, ClipRecipe(steps=4, batch=10, warmup=2), ClipRecipe(epochs=2.0, batch=10)])
def test_the_recipe_has_as_many_steps_as_the_experts_together(recipe):
    found = recipe.for_tasks(3).for_samples(60)
    assert found.steps == 12 and found.warmup == 3 * recipe.warmup and found.batch == 10 and found.lr == recipe.lr


def test_it_is_trained_once_and_is_no_expert(cache):
    base = StateDict(small.tower_state())
    make = lambda suite: make_multitask(base, small.TOWER, suite, RECIPE, 0, cache)  # noqa: E731
    first, again, fewer = make(suite()), make(suite()), make(Suite("small", tasks()[:2]))
    (expert,) = make_experts(base, small.TOWER, Suite("small", tasks()[:1]), RECIPE, 0, cache, 1)
    assert first.id == again.id and len({first.id, fewer.id, expert.id, base.id}) == 4
    task = Together(tasks())
    training = Training(Job(small.tower_state(), small.TOWER, task, RECIPE.for_tasks(3), 0, task.split("train"), ""))
    training.run()
    assert training.step == 12 and same(training.weights(), {key: first.tensor(key) for key in first.specs()})


def test_the_method_gives_its_weights_and_nothing_without_it():
    base, trained, experts = small.tower_state(), small.tower_state(1), [small.tower_state(2), small.tower_state(3)]
    opened = Experts.open(base, experts)
    data = SuiteData(small.suite("hues"), small.TOWER, trained=lambda: StateDict(trained))
    merged = Multitask()(opened, Context(data))
    for key, weight in merged.state():
        assert torch.allclose(weight, trained[key], rtol=0, atol=1e-6), key
    assert not merged.deltas and merged.stored_bytes == sum(tensor.nbytes for tensor in base.values())
    with pytest.raises(UserError, match="a model trained on the data of all tasks"):
        Multitask()(opened)


def bench(folder, recipe=RECIPE):
    return Bench(StateDict(small.tower_state()), small.TOWER, recipe, 0, folder, Engine("cpu"), every=0).for_tasks(3)


def test_its_file_says_on_what_it_was_trained(tmp_path):
    made = bench(tmp_path).make(Together(tasks()))
    file = SafetensorsFile(made.path)
    facts = json.loads(file.metadata["made"])
    assert made.path.name == "multitask.safetensors" and facts["tasks"] == ["hues", "tints", "shades"]
    assert facts["recipe.steps"] == 12 and not bench(tmp_path).make(Together(tasks())).fresh

    tower = small.TOWER.build().eval()
    tower.load_state_dict({key: file.tensor(key) for key in file.specs()})
    with torch.no_grad():
        right = [(functional.normalize(tower(small.TOWER.prepare(val.inputs)), dim=-1) @ task.head().weight.T).argmax(1)
                 .eq(val.labels).double().mean() for task in tasks() for val in [task.split("val")]]  # fmt: skip
    assert made.after == pytest.approx(float(torch.stack(right).mean()))
    with pytest.raises(UserError, match="tasks="):
        bench(tmp_path).make(Together(tasks()[:2]))


def test_a_killed_training_goes_on(tmp_path, monkeypatch):
    whole = bench(tmp_path / "whole").make(Together(tasks()))
    taken, honest = [], Training._learn

    def dying(self, *batch):
        taken.append(self.step)
        if len(taken) == 8:
            raise KeyboardInterrupt
        honest(self, *batch)

    monkeypatch.setattr(Training, "_learn", dying)
    with pytest.raises(KeyboardInterrupt):
        bench(tmp_path / "killed").make(Together(tasks()))
    made = bench(tmp_path / "killed").make(Together(tasks()))
    files = [SafetensorsFile(each.path) for each in (whole, made)]
    assert taken == [*range(8), *range(7, 12)]
    assert same(*({key: file.tensor(key) for key in file.specs()} for file in files))
