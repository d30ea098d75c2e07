"""Experts of two initialisations: which starts from which base, and what the second base shares with the first."""

import small
import torch
from hydra.utils import instantiate

from merging.checkpoints import StateDict
from tasks.finetune import Recipe
from tasks.mini import experts, pretrain
from tasks.mini.model import load_base
from tasks.vision.fitting import tower_shapes
from tests.launchers.test_conf import composed

SHORT = pretrain.Recipe(seed=1, steps=2, batch=8, round=20, task_style=0.5, text="shipped")


def mini_clip():
    return instantiate(composed().backbone, _convert_="all")


def test_every_second_expert_starts_from_the_other_base(cache, monkeypatch):
    bases = StateDict(small.tower_state(0), "the base"), StateDict(small.tower_state(1), "the other")
    source = experts.FromTwo(recipe=Recipe(steps=1, batch=4, lr=1e-9), workers=1)
    monkeypatch.setattr(experts.FromTwo, "base", lambda *_: bases[0])
    monkeypatch.setattr(experts.FromTwo, "other_base", lambda *_: bases[1])
    opened = source.open(small.suite("hues", "tints", "shades"), small.TOWER, cache)
    assert opened.origin.id == bases[0].id
    for place, expert in enumerate(opened.checkpoints):
        near = [
            max(float((expert.tensor(key) - base.tensor(key)).abs().max()) for key in base.specs()) for base in bases
        ]
        assert near[place % 2] < 1e-6 < near[1 - place % 2]


def test_the_second_base_has_the_text_tower_of_the_first_and_weights_of_its_own(cache, one_thread):
    model, shipped = pretrain.train(SHORT)[0].state_dict(), load_base().state_dict()
    same = {key for key in model if torch.equal(model[key], shipped[key])}
    assert same == {key for key in model if not key.startswith("visual.")}
    stored = experts.FromTwo(other=SHORT).other_base(cache)
    assert stored.specs().keys() == tower_shapes(mini_clip()).keys() == model.keys() - same
    assert all(torch.equal(stored.tensor(key), model[key].half()) for key in stored.specs())


def test_the_file_names_every_option_with_its_default():
    config = composed("experts=mini8_two").experts
    assert instantiate(config) == experts.FromTwo(family="mini8_two")
    assert set(config.other) - {"_target_"} == {"seed", "steps", "text"}, "the rest is the shipped base's"
