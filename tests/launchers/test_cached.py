"""Every cached artefact is keyed by all that it was computed from: changing one ingredient changes its key."""

import ast
import importlib
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from artefacts import ARTEFACTS, BACKBONE, KEYS, OTHER, ROOT, Asked, Shaded, Shades, backbone, opened

from merging import Cache, Experts, statistics
from merging import cache as caching
from merging.cache import modules_of
from merging.context import Context
from merging.methods import Average, Dare
from merging.neurons import Neurons
from merging.similarity import cosines
from tasks import suite

CHANGES = [(name, *change) for name, (_, changes, _) in ARTEFACTS.items() for change in changes.items()]
SOURCES = [(name, module) for name, (_, _, modules) in ARTEFACTS.items() for module in modules]


@pytest.fixture
def keys(monkeypatch, tmp_path):
    """All keys that the maker of an artefact asks a cache for."""
    monkeypatch.folder = tmp_path

    def ask(name, **changes):
        cache = Asked()
        ARTEFACTS[name][0](cache, monkeypatch, **changes)
        assert cache.keys
        return set(cache.keys)

    yield ask
    caching.code.cache_clear()


@pytest.mark.parametrize(("name", "ingredient", "value"), CHANGES)
def test_another_ingredient_is_another_key(keys, name, ingredient, value):
    assert keys(name) == keys(name) or name == "sha256"  # a file written again has another time
    assert not keys(name) & keys(name, **{ingredient: value})


@pytest.mark.parametrize(("name", "module"), SOURCES)
def test_newer_code_is_another_key(keys, monkeypatch, tmp_path, name, module):
    before, source = keys(name), Path(str(importlib.import_module(module).__file__))
    edited = tmp_path / source.name
    edited.write_text(source.read_text("utf-8") + "\n# edited\n", "utf-8")
    monkeypatch.setattr(importlib.import_module(module).__spec__, "origin", str(edited))
    caching.code.cache_clear()
    assert not before & keys(name)


@pytest.mark.parametrize("name", [name for name, module in SOURCES if module != "merging.similarity"])
def test_a_newer_library_is_another_key(keys, monkeypatch, name):
    before = keys(name)
    monkeypatch.setattr(caching, "version", lambda library: "0.0")
    caching.code.cache_clear()
    assert not before & keys(name)


def test_no_artefact_is_left_out():
    """A new `key_of` needs a maker here."""
    files = [path for folder in ("merging", "tasks", "launchers") for path in (ROOT / folder).rglob("*.py")]
    nodes = [node for path in files for node in ast.walk(ast.parse(path.read_text("utf-8")))]
    calls = [node for node in nodes if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "key_of"]
    named = {call.args[0].value for call in calls if len(call.args) > 1}  # type: ignore[attr-defined]
    unfinished = {"made", "descent", "validation"}  # lie in a folder of one cell, which its code and content name
    assert named - unfinished == ARTEFACTS.keys() - {"class names", "decoded images", "sha256"}


def test_changes_without_a_name_are_not_looked_up():
    """Of a sparsifier no key can tell what it does."""
    cache = Asked()
    cosines(opened(cache, sparsifier=(lambda key, task, tau: tau * 2,)))
    assert not cache.keys


def test_the_code_of_a_users_own_method_counts():
    assert modules_of(Shaded()) == (Shaded.__module__,)
    assert modules_of(Dare(then=Average())) == ("merging.methods.average", "merging.methods.dare")
    assert modules_of(Dare(then=Shaded())) == (*sorted(("merging.methods.dare", Shaded.__module__)),)  # type: ignore[arg-type]


def test_masks_of_another_backbone_are_measured_anew(tmp_path):
    """The activation function and the scaling of the images change what a neuron does."""
    torch.manual_seed(0)
    tower = backbone(**BACKBONE).build().state_dict()
    experts, tasks = Experts.open(tower, [tower], ["a"], cache=Cache(tmp_path)), suite.Suite("one", (Shades("a"),))
    found = {}
    for name, changed in [("plain", {}), *((name, {name: value}) for name, value in OTHER.items())]:
        seen = suite.calibration(tasks, backbone(**{**BACKBONE, **changed}), "calibration")
        context = Context(SimpleNamespace(unlabelled=lambda _, seen=seen: seen))
        (found[name],) = Neurons().measured(experts, context).values()
        fresh = statistics.activations(seen, experts.checkpoints, (KEYS[1],))[KEYS[1]]
        assert torch.equal(found[name], fresh)
    assert all(not torch.equal(found["plain"], other) for name, other in found.items() if name != "plain")
