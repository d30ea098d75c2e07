"""Every file of conf/ composes and builds, and says the same defaults as the code."""

import re
from dataclasses import fields
from functools import cache
from pathlib import Path

import pytest
from hydra import compose, initialize_config_module
from hydra.utils import get_class, instantiate
from omegaconf import OmegaConf

from launchers.job import routes
from launchers.options import check_part
from launchers.tracking.tracker import Tracker
from merging import methods
from merging.backbones.hugging_face import HuggingFace
from merging.backbones.open_clip import OpenClip
from merging.fit.gates import Learned, Oracle
from tasks.mini.experts import FineTuned
from tasks.scales import Fixed, Search
from tasks.suite import Suite

CONF = Path(__file__).parents[2] / "conf"
CHOICES = sorted(
    (path.parent.name, path.stem)
    for path in CONF.glob("*/*.yaml")
    if path.parent.name not in ("local", "hydra", "recipe")
    and (path.parent.name, path.stem) not in (("suite", "none"), ("experts", "folders"))  # see test_merge_only.py
)
KINDS = {
    "backbone": (OpenClip, HuggingFace),
    "suite": Suite,
    "scale": (Fixed, Search),
    "router": (Learned, Oracle),
}
METHODS, ROUTERS = ([name for group, name in CHOICES if group == wanted] for wanted in ("method", "router"))


@cache
def composed(*overrides):
    with initialize_config_module("conf", version_base="1.3"):
        return compose("config", list(overrides), return_hydra_config=True)


@pytest.mark.parametrize(("group", "name"), CHOICES)
def test_every_choice_composes_and_builds(group, name):
    config = composed(f"{group}={name}")
    for part in ("backbone", "experts", "suite", "method", "scale", "router", "tracker"):
        check_part(part, OmegaConf.to_container(config[part], resolve=True))  # type: ignore[arg-type]
        made = instantiate(config[part], _convert_="all")
        assert isinstance(made, KINDS.get(part, object)), part
        assert part != "experts" or (callable(made.open) and made.family)
    assert group == "tracker" or type(made) is Tracker


def plain(group, name):
    """The values of one choice, interpolations resolved."""
    values = OmegaConf.to_container(composed(f"{group}={name}")[group], resolve=True)
    assert isinstance(values, dict)
    return values


def assert_names_every_knob(config):
    """Of what a file builds, and of every part inside it."""
    assert set(config) - {"_target_"} == {knob.name for knob in fields(get_class(config["_target_"]))}
    for value in config.values():
        if isinstance(value, dict) and "_target_" in value:
            assert_names_every_knob(value)


def own_file(target):
    """merging.methods.IsoCts -> iso_cts"""
    return re.sub(r"(?<!^)(?=[A-Z])", "_", target.rpartition(".")[2]).lower()


@pytest.mark.parametrize(("group", "name"), [("method", name) for name in METHODS] + [("router", r) for r in ROUTERS])
def test_a_file_names_every_knob(group, name):
    assert_names_every_knob(plain(group, name))


@pytest.mark.parametrize("name", METHODS)
def test_a_method_has_its_defaults_and_a_preset_has_not(name):
    config = plain("method", name)
    default = get_class(config["_target_"])()
    assert (instantiate(config) == default) == (own_file(config["_target_"]) == name)


def test_every_method_has_its_file():
    classes = methods.discovered()
    assert {own_file(f"merging.methods.{name}") for name in classes} <= set(METHODS)
    assert {get_class(plain("method", name)["_target_"]) for name in METHODS} == set(classes.values())


def test_a_router_counts_where_a_class_an_option_or_an_inner_method_asks_for_one():
    asks = {name for name in METHODS if routes(plain("method", name))}
    assert {"twin", "auto_switch", "emr_routed", "tall_mask_routed"} < asks
    assert not asks & {"ties", "smile", "expert", "t_switch", "emr", "tall_mask", "dare", "pwe_moe"}
    inside = plain("method", "dare") | {"then": plain("method", "emr_routed")}
    assert routes(inside) and not routes({**inside, "then": {**inside["then"], "routed": False}})


def test_the_default_router_has_the_defaults_of_the_code():
    assert instantiate(composed("router=task_id").router) == Learned()


def test_the_experts_file_names_the_recipe_with_its_defaults():
    config = composed("experts=mini8").experts
    assert instantiate(config) == FineTuned()
    assert set(config) - {"_target_"} == {option.name for option in fields(FineTuned)}
    assert set(config.recipe) - {"_target_"} <= {option.name for option in fields(FineTuned().recipe)}


def test_the_main_experiment_is_a_sweep_over_known_methods():
    config = composed("experiment=mini8_static").hydra
    swept = config.sweeper.params.method.split(",")

    assert config.mode.name == "MULTIRUN" and set(swept) <= set(METHODS) and len(set(swept)) == len(swept)
    assert {"base", "average", "task_arithmetic", "ties", "dare", "tsv_m", "iso_c", "expert"} <= set(swept)


def test_run_level_keys_are_few():
    config = OmegaConf.load(CONF / "config.yaml")
    known = {
        "seed",
        "split",
        "probe",
        "redo",
        "output",
        "save",
        "save_adapter",
        "save_dtype",
        "shard_gb",
        "push",
        "cache_gb",
        "plot",
        "engine",
    }
    assert set(config) - {"defaults", "hydra"} == known
