"""Every file of conf/ composes and builds, and says the same defaults as the code."""

from dataclasses import fields
from pathlib import Path

import pytest
from hydra import compose, initialize_config_module
from hydra.utils import get_class, instantiate
from omegaconf import OmegaConf

from launchers.track import NoTracker
from merging import methods
from merging.backbones.tower import Backbone
from tasks.grid import Fixed, Search
from tasks.mini.experts import FineTuned
from tasks.suite import Suite

CONF = Path(__file__).parents[2] / "conf"
CHOICES = sorted(
    (path.parent.name, path.stem) for path in CONF.glob("*/*.yaml") if path.parent.name not in ("local", "hydra")
)
KINDS = {"backbone": Backbone, "experts": FineTuned, "suite": Suite, "scale": (Fixed, Search)}
METHODS = [name for group, name in CHOICES if group == "method"]


def composed(*overrides):
    with initialize_config_module("conf", version_base="1.3"):
        return compose("config", list(overrides), return_hydra_config=True)


@pytest.mark.parametrize(("group", "name"), CHOICES)
def test_every_choice_composes_and_builds(group, name):
    config = composed(f"{group}={name}")
    for part in ("backbone", "experts", "suite", "method", "scale", "tracker"):
        made = instantiate(config[part], _convert_="all")
        assert isinstance(made, KINDS.get(part, object)), part
    assert group == "tracker" or isinstance(made, NoTracker)


@pytest.mark.parametrize("name", METHODS)
def test_a_method_file_names_every_knob_with_its_default(name):
    config = composed(f"method={name}").method
    cls = get_class(config["_target_"])

    assert set(config) - {"_target_"} == {knob.name for knob in fields(cls)}
    assert instantiate(config) == cls()


def test_every_method_has_its_file():
    targets = {composed(f"method={name}").method["_target_"] for name in METHODS}
    assert targets == {f"merging.methods.{name}" for name in methods.__all__ if name != "Method"}


def test_the_experts_file_names_the_recipe_with_its_defaults():
    config = composed("experts=mini8").experts
    assert instantiate(config) == FineTuned()
    for part, cls in ((config, FineTuned), (config.recipe, type(FineTuned().recipe))):
        assert set(part) - {"_target_"} == {knob.name for knob in fields(cls)}


def test_the_main_experiment_is_a_sweep_over_known_methods():
    config = composed("experiment=mini8_static").hydra
    swept = config.sweeper.params.method.split(",")

    assert config.mode.name == "MULTIRUN" and set(swept) <= set(METHODS) and len(set(swept)) == len(swept)
    assert {"base", "average", "task_arithmetic", "ties", "dare", "tsv_m", "iso_c", "expert"} <= set(swept)


def test_run_level_keys_are_few():
    config = OmegaConf.load(CONF / "config.yaml")
    assert set(config) - {"defaults", "hydra"} == {"seed", "redo", "output", "save", "cache_gb"}
