"""Recipes are those that were published, accumulation and resumption change nothing, precision little."""

import math
from dataclasses import fields, replace

import pytest
import small
import torch
from hydra import compose, initialize_config_module
from hydra.utils import instantiate
from torch.nn import functional

from merging.errors import UserError
from merging.ops import generator
from tasks.engine import Engine, ahead
from tasks.recipes import ClipRecipe, Recipe
from tasks.training import Job, Training, order

pytestmark = pytest.mark.usefixtures("one_thread")

FEW = ClipRecipe(steps=6, batch=8, lr=0.01, warmup=2)


def job(recipe, base=None):
    task = small.Colours("hues")
    return Job(small.tower_state() if base is None else base, small.TOWER, task, recipe, 0, task.split("train"), "")


def trained(recipe, engine=Engine("cpu")):  # noqa: B008
    training = Training(job(recipe), engine)
    training.run()
    return training


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def moments(training):
    """Adam's running means of the gradients, all in one vector."""
    return torch.cat([v.flatten() for key, v in sorted(training.snapshot().items()) if key.startswith("exp_avg/")])


def published(name):
    with initialize_config_module("conf", version_base="1.3"):
        return instantiate(compose("finetune", [f"recipe={name}"]).recipe, _convert_="all")


def test_the_default_recipe_is_that_of_task_vectors():
    recipe = published("task_vectors")
    assert recipe == ClipRecipe()
    assert (recipe.optimizer, recipe.lr, recipe.batch, recipe.weight_decay) == ("adamw", 1e-5, 128, 0.1)
    assert (recipe.warmup, recipe.clip, recipe.steps, recipe.frozen) == (500, 1.0, 2000, ())


def test_the_other_recipe_is_that_of_fusion_bench():
    recipe = published("fusion_bench")
    assert (recipe.optimizer, recipe.lr, recipe.batch, recipe.weight_decay) == ("adam", 1e-5, 32, 0.0)
    assert (recipe.clip, recipe.steps, recipe.frozen) == (None, 4000, ("visual.proj",))
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.Adam([parameter], lr=recipe.lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=recipe.steps)
    for step in range(300):
        assert recipe.rate(step) == pytest.approx(schedule.get_last_lr()[0], rel=1e-9)
        optimizer.step()
        schedule.step()


@pytest.mark.parametrize("name", ["task_vectors", "fusion_bench"])
def test_a_recipe_file_names_every_knob(name):
    with initialize_config_module("conf", version_base="1.3"):
        said = compose("finetune", [f"recipe={name}"]).recipe
    assert set(said) - {"_target_"} == {knob.name for knob in fields(ClipRecipe)}


def test_rates_of_the_schedules():
    recipe = ClipRecipe(steps=2000, warmup=500, lr=1.0)
    assert [recipe.rate(step) for step in (0, 249, 499, 500, 2000)] == pytest.approx([0.002, 0.5, 1, 1, 0])
    assert recipe.rate(1000) == pytest.approx(0.5 * (1 + math.cos(math.pi / 3)))
    constant = replace(recipe, schedule="constant")
    assert [constant.rate(step) for step in (0, 499, 500, 1999)] == pytest.approx([0.002, 1, 1, 1])
    assert replace(recipe, schedule="cosine").rate(700) == Recipe(steps=2000, warmup=500, lr=1.0).rate(700)
    assert ClipRecipe(steps=5, warmup=9, lr=0.9).rate(4) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"optimizer": "sgd"}, "optimizer=sgd is unknown"),
        ({"schedule": "step"}, "schedule=step is unknown"),
        ({"accumulate": 0}, "accumulate=0 is out of range"),
        ({"accumulate": 129}, "accumulate=129 is out of range"),
        ({"epochs": 0.0}, "epochs=0.0 is out of range"),
        ({"weight_decay": -1.0}, "weight_decay=-1.0 is out of range"),
        ({"warmup": -1}, "warmup=-1 is out of range"),
        ({"clip": 0.0}, "clip=0.0 is out of range"),
        ({"lr": 2.0}, "lr=2.0 is out of range"),
    ],
)
def test_a_recipe_out_of_range_is_refused(wrong, message):
    with pytest.raises(UserError, match=f"recipe: {message}"):
        ClipRecipe(**wrong)


def test_epochs_are_passes_over_the_images():
    recipe = ClipRecipe(batch=8, epochs=2.5)
    assert recipe.for_samples(24).steps == math.ceil(2.5 * 24 / 8) and recipe.for_samples(24).epochs is None
    assert recipe.for_samples(1).steps == 1
    assert ClipRecipe().for_samples(24) == ClipRecipe()


def test_training_is_the_plain_loop():
    """Written down once more: the experts of mini8 and their cached copies depend on every bit of it."""
    recipe = Recipe(steps=5, batch=16, warmup=2)
    task, tower = small.Colours("hues"), small.TOWER.build().train()
    tower.load_state_dict(small.tower_state())
    split, optimizer = task.split("train"), torch.optim.AdamW(tower.parameters(), weight_decay=0.01)
    random, waiting = generator("finetune", 0, "hues"), torch.empty(0, dtype=torch.int64)
    for step in range(5):
        while len(waiting) < 16:
            waiting = torch.cat([waiting, torch.randperm(24, generator=random)])
        batch, waiting = waiting[:16], waiting[16:]
        optimizer.param_groups[0]["lr"] = recipe.rate(step)
        features = functional.normalize(tower(small.TOWER.prepare(split.inputs[batch])), dim=-1)
        optimizer.zero_grad()
        functional.cross_entropy(features @ task.head().weight.T, split.labels[batch]).backward()
        torch.nn.utils.clip_grad_norm_(tower.parameters(), 1.0)
        optimizer.step()
    assert same(trained(recipe).weights(), dict(tower.state_dict()))


def test_every_image_comes_once_per_pass_and_from_anywhere():
    recipe = Recipe(steps=9, batch=8)
    batches = list(order((12,), recipe, generator("x")))
    assert len(batches) == 9 and all(len(batch) == 8 for batch in batches)
    passes = torch.cat(batches).split(12)
    assert all(sorted(each.tolist()) == list(range(12)) for each in passes) and not torch.equal(*passes[:2])
    later = list(order((12,), recipe, generator("x"), start=4))
    assert torch.equal(torch.cat(later), torch.cat(batches[4:]))


@pytest.mark.parametrize("count", [0, 1, 5])
def test_reading_ahead_keeps_the_order_and_is_one_ahead(count):
    asked = []

    def read(some):
        asked.append(int(some))
        return some, 2 * some

    for number, pair in enumerate(ahead(read, iter(torch.arange(count)))):
        assert [int(each) for each in pair] == [number, 2 * number]
        assert number in asked and len(asked) <= number + 2
    assert asked == list(range(count))


@pytest.mark.parametrize("accumulate", [2, 3, 8])
def test_accumulating_is_the_whole_batch_up_to_rounding(accumulate):
    """Pieces of 3, 3 and 2 images too: a mean of their means would be off by percents."""
    one = replace(FEW, steps=1, clip=None)
    whole, pieces = moments(trained(one)), moments(trained(replace(one, accumulate=accumulate)))
    assert 0 < (whole - pieces).norm() < 1e-5 * whole.norm()


def test_clipping_sees_the_whole_gradient():
    free, clipped = (moments(trained(replace(FEW, steps=1, clip=clip, accumulate=2))) for clip in (None, 1e-3))
    assert clipped.norm() == pytest.approx(0.1 * 1e-3, rel=1e-3)  # Adam's first mean is a tenth of the gradient
    assert functional.cosine_similarity(free, clipped, dim=0) == pytest.approx(1)


def test_frozen_parameters_stay_and_only_they():
    base = small.tower_state()
    after = trained(replace(FEW, frozen=["visual.proj"])).weights()
    assert [key for key in base if torch.equal(base[key], after[key])] == ["visual.proj"]


@pytest.mark.parametrize(("frozen", "message"), [(["proj"], "frozen names proj"), (None, "every parameter")])
def test_wrong_frozen_names_are_refused(frozen, message):
    with pytest.raises(UserError, match=message):
        Training(job(replace(FEW, frozen=list(small.tower_state()) if frozen is None else frozen)))


def test_adam_decays_by_the_gradient_and_adamw_does_not():
    adam, adamw = (trained(replace(FEW, steps=1, optimizer=name, clip=None)) for name in ("adam", "adamw"))
    base = {key: value for key, value in small.tower_state().items()}
    decay = torch.cat([base[key].flatten() for key in sorted(base)])
    torch.testing.assert_close(moments(adam), moments(adamw) + 0.1 * 0.1 * decay)


@pytest.mark.parametrize("recipe", [FEW, replace(FEW, optimizer="adam", frozen=["visual.proj"], accumulate=2)])
@pytest.mark.parametrize("at", [0, 1, 4, 6])
def test_going_on_from_a_snapshot_gives_the_same_bits(recipe, at):
    taken = {}
    first = Training(job(recipe))

    def note():
        if first.step == at:
            taken.update({key: value.clone() for key, value in first.snapshot().items()})

    note()
    first.run(note)
    second, steps = Training(job(recipe)), []
    second.resume(at, taken)
    second.run(lambda: steps.append(1))
    assert len(steps) == recipe.steps - at
    assert same(first.snapshot(), second.snapshot()) and same(first.weights(), second.weights())


def test_bf16_rounds_and_keeps_fp32_weights():
    one = replace(FEW, steps=1, clip=None)
    plain, rounded = trained(one), trained(one, Engine("cpu", "bf16"))
    assert all(value.dtype == torch.float32 for value in rounded.snapshot().values())
    gap = (moments(plain) - moments(rounded)).norm() / moments(plain).norm()
    assert 1e-4 < gap < 0.1


def test_a_diverged_training_is_told_by_parameter():
    base = small.tower_state() | {"visual.proj": torch.full((16, 8), torch.inf)}
    training = Training(job(FEW, base))
    training.run()
    with pytest.raises(UserError, match=r"hues diverged: visual\.\S+ is NaN or Inf after step 6.*recipe.lr"):
        training.weights()
