"""The examples of docs/adding-a-method.md as written: two new files each, no edited one, and their commands."""

import re
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from console import by_method
from hydra import compose, initialize_config_module
from hydra.utils import get_class, instantiate
from omegaconf import OmegaConf

from merging import merge, methods

GUIDE = (Path(__file__).parents[2] / "docs" / "adding-a-method.md").read_text("utf-8")
METHODS, _, REST = GUIDE.partition("# Adding a router")
ROUTER, _, REST = REST.partition("# Adding an objective")
OBJECTIVE = REST.partition("# Adding an architecture")[
    0
]  # tests/merging/test_architectures.py and test_task_examples.py run the rest
PYTHON, YAML, BASH = (re.findall(rf"```{language}\n(.*?)```", METHODS, re.S) for language in ("python", "yaml", "bash"))


@pytest.fixture
def added(tmp_path, monkeypatch):
    """The files of both examples in folders of their own, which lie beside those of the library."""
    for name, code, config in zip(("median", "own_biases"), PYTHON, YAML, strict=True):
        for path, text in ((f"methods/{name}.py", code), (f"conf/method/{name}.yaml", config)):
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / path).write_text(text, "utf-8")
        monkeypatch.delitem(sys.modules, f"merging.methods.{name}", raising=False)
    monkeypatch.setattr(methods, "__path__", [*methods.__path__, str(tmp_path / "methods")])
    yield tmp_path
    for name in ("median", "own_biases"):
        sys.modules.pop(f"merging.methods.{name}", None)
        vars(methods).pop(name, None)


def from_file(folder, name):
    """What a method's YAML builds."""
    return instantiate(OmegaConf.load(folder / "conf" / "method" / f"{name}.yaml"))


def test_both_are_discovered_by_their_names(added):
    found = methods.discovered()
    for name, file in (("Median", "median"), ("OwnBiases", "own_biases")):
        assert found[name] is getattr(methods, name) is get_class(f"merging.methods.{name}")
        assert from_file(added, file) == found[name]()
    assert {"Median", "OwnBiases", "Ties", "Method"} <= set(methods.__all__)
    with pytest.raises(ImportError, match="Mean"):
        exec("from merging.methods import Mean")


def test_the_median_is_one(added):
    experts = [{"weight": torch.full((2, 3), value)} for value in (1.0, 2.0, 9.0)]
    merged = merge(from_file(added, "median"), {"weight": torch.zeros(2, 3)}, experts)
    assert torch.equal(merged.weight("weight"), torch.full((2, 3), 2.0))


def test_own_biases_are_each_experts_own(added):
    key, weight = "visual.transformer.resblocks.0.ln_1.bias", "visual.transformer.resblocks.0.attn.out_proj.weight"
    experts = [{key: torch.full((3,), value), weight: torch.full((3, 3), value)} for value in (1.0, 5.0)]
    merged = merge(from_file(added, "own_biases"), {key: torch.zeros(3), weight: torch.zeros(3, 3)}, experts)
    for task in range(2):
        state = dict(merged.state(merged.one_hot(task)))
        assert torch.equal(state[key], experts[task][key]) and torch.equal(state[weight], torch.full((3, 3), 3.0))


@pytest.mark.parametrize("line", [line for block in BASH for line in block.splitlines()])
def test_the_commands_run(added, output, duet_here, line):
    arguments, search = shlex.split(line)[1:], f"hydra.searchpath=[file://{added}/conf]"
    status, _, errors = duet_here(output, *arguments, search)
    assert status == 0, errors
    rows = by_method(output)
    assert all(rows[name].status == "ok" for name in re.split("[=,]", arguments[-1 if "-m" in arguments else 0])[1:])


def only(text, language):
    (block,) = re.findall(rf"```{language}\n(.*?)```", text, re.S)
    return block


def test_the_router_is_a_file(tmp_path):
    path = tmp_path / "conf" / "router" / "shared_early.yaml"
    path.parent.mkdir(parents=True)
    path.write_text(only(ROUTER, "yaml"), "utf-8")
    router = built(shlex.split(only(ROUTER, "bash"))[1:], f"file://{tmp_path}/conf").router
    assert router.name == "shared_early" and router.gate.sees == "early" and router.gate.top_k == 2
    assert {objective.name: objective.weight for objective in router.train.terms} == {
        "entropy": 0.1,
        "distillation": 1.0,
    }


def test_the_objective_is_a_file(tmp_path, monkeypatch):
    import merging.fit

    (tmp_path / "confidence.py").write_text(only(OBJECTIVE, "python"), "utf-8")
    monkeypatch.setattr(merging.fit, "__path__", [*merging.fit.__path__, str(tmp_path)])
    method = built(shlex.split(only(OBJECTIVE, "bash"))[1:]).method
    sys.modules.pop("merging.fit.confidence")
    assert [objective.name for objective in method.train.terms] == ["entropy", "confidence"]
    logits = torch.tensor([[0.0, 0.0], [2.0, -torch.inf]])
    assert float(method.train.terms[1](SimpleNamespace(logits=logits))) == -0.75


def built(overrides, search="pkg://conf"):
    """The method and the router of a command, as `duet` makes them."""
    with initialize_config_module("conf", version_base="1.3"):
        config = compose("config", [*overrides, f"hydra.searchpath=[{search}]"])
    return SimpleNamespace(
        method=instantiate(config.method, _convert_="all"), router=instantiate(config.router, _convert_="all")
    )
