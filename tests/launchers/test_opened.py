"""A row names the splits that were really opened, and who opened them, whatever a method says or a cache holds."""

from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from cells import routed_row
from hydra import compose, initialize_config_module
from torch.nn import functional

import merging
from launchers import job, rows
from launchers.cells import Cell, Setup, splits_read
from launchers.results.frame import summarise
from launchers.results.notes import notes
from launchers.saves import Save
from merging import Cache
from merging.backbones.open_clip import OpenClip
from merging.context import Context
from merging.errors import UserError
from merging.experts import Experts
from merging.fit.black_box import Evolution
from merging.fit.gates import Learned, Oracle, TaskId
from merging.methods import Duet, Map, NeuronMask, Recombination, TaskArithmetic, Twin
from merging.routing.gates import GateShape
from tasks.data import SuiteData
from tasks.evaluate import Grid
from tasks.heads.head import Given, ZeroShot
from tasks.scales import Fixed, Search
from tasks.split import Split
from tasks.suite import Suite
from tasks.task import LabelledTask

TOWER = OpenClip("small", 8, {"layers": 1, "width": 16, "head_width": 8, "patch_size": 8, "image_size": 16})
EARLY = GateShape(sees="early", features="mean")
CONFIG = {"seed": 0, "method": {}, "scale": {}, "router": {}, "backbone": {}, "suite": {}, "engine": {}, "experts": {}}


@dataclass(frozen=True)
class Noises:
    """A dozen random images per split."""

    name: str
    classes: tuple[str, ...] = ("a", "b")

    def split(self, name):
        rng = torch.Generator().manual_seed(len(self.name) + len(name))
        return Split(
            name, torch.randint(0, 255, (12, 3, 16, 16), generator=rng, dtype=torch.uint8), torch.arange(12) % 2
        )


def Noise(name, classes=("a", "b")):
    head = functional.normalize(
        torch.randn(len(classes), 8, generator=torch.Generator().manual_seed(len(name))), dim=-1
    )
    return LabelledTask(name, Noises(name, classes), Given(ZeroShot(head)))


@dataclass(frozen=True)
class Peeking:
    """Merges statically after a look at the images of a split."""

    split: str = "test"
    needs: ClassVar[str] = "inputs"

    @property
    def splits(self):
        return (self.split,)

    def __call__(self, experts, context):
        context.unlabelled(self.split)
        return TaskArithmetic()(experts)


@dataclass(frozen=True)
class Undeclared(Peeking):
    needs: ClassVar[str] = "nothing"
    splits: ClassVar[tuple[str, ...]] = ()


@dataclass(frozen=True)
class Elsewhere(Peeking):
    """Says no more than that it looks at inputs."""

    splits: ClassVar[tuple[str, ...]] = ("calibration",)


@pytest.fixture
def setup(tmp_path):
    suite = Suite("noise", (Noise("one"), Noise("three")))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        states = [TOWER.build().state_dict() for _ in range(3)]
    store = Cache(tmp_path / "cache")
    experts = Experts.open(states[0], states[1:], suite.names, store)
    context = Context(SuiteData(suite, TOWER))
    return Setup(
        experts, Grid(suite, TOWER), SimpleNamespace(family="noise"), context, store.folder / "unfinished", gates=store
    )


def computed(setup, method, router=None, scale=None, split="test"):
    router, config = router or Oracle(), CONFIG | {"split": split, "router": repr(router), "method": repr(method)}
    return Cell("mine", method, scale or Fixed(), router, config, setup).compute(lambda task, score: None)


def learned(split="calibration"):
    return Learned(gate=EARLY, train=TaskId(steps=2), split=split)


def test_a_method_that_looks_at_test_images_is_transductive(setup):
    row = computed(setup, Peeking())
    assert row.opened == {"test": ["method=mine"]} and row.adaptation == "test" and row.needs == "inputs"
    (summary,) = summarise([row])
    assert summary.lines["transductive"][1]
    assert "Saw the unlabelled test samples (transductive; no fair rival, never bold): mine." in notes(summary)


def test_of_several_splits_the_test_split_counts(setup):
    row = computed(setup, NeuronMask(then=Peeking()))
    assert row.opened == {"calibration": ["method=mine"], "test": ["method=mine"]} and row.adaptation == "test"
    row = computed(setup, Duet(rest=TaskArithmetic()), learned("test"))
    assert row.opened == {"calibration": ["method=mine"], "test": ["router=task_id"]} and row.adaptation == "test"


def test_the_front_of_a_search_is_in_the_row(setup, tmp_path):
    for method in (Map(front=3), Recombination(group=8, search=Evolution(6, 4))):
        row = computed(setup, method)
        (again,) = rows.read(rows.write(row, tmp_path))
        assert row.front == again.front and all({*point["scores"]} == {"one", "three"} for point in row.front)
        assert all(("storage" in point) == isinstance(method, Recombination) for point in row.front) and row.front
        assert row.opened["val"] == ["method=mine with labels"]
    assert computed(setup, TaskArithmetic()).front == []


def test_an_opening_that_is_not_declared_is_refused(setup):
    with pytest.raises(
        UserError, match=r"method=mine opens the unlabelled test inputs, but says that it needs nothing"
    ):
        computed(setup, Undeclared())
    with pytest.raises(UserError, match=r"opens the unlabelled test inputs, but says only of calibration\. .*splits"):
        computed(setup, Elsewhere())


def test_images_that_a_method_looks_at_are_part_of_its_row_s_name(setup):
    def contents(method):
        return Cell("mine", method, Fixed(), Oracle(), CONFIG, setup).contents["one"].keys()

    assert contents(TaskArithmetic()) == {"head", "test"} == contents(Peeking())
    assert contents(Peeking("val")) == contents(NeuronMask(then=Peeking("val"))) - {"calibration"}
    assert contents(Peeking("val")) == {"head", "test", "val"}


def test_a_saved_model_says_it_too(setup, tmp_path):
    config = CONFIG | {"method": "peeking"}
    path = tmp_path / "merged.safetensors"
    Cell("mine", NeuronMask(then=Peeking()), Fixed(), Oracle(), config, setup).compute(
        lambda task, score: None, Save(str(path))
    )
    opened = {"calibration": ["method=mine"], "test": ["method=mine"]}
    assert merging.open_merged(path).provenance["opened"] == opened


def test_who_declares_and_does_not_look_saw_nothing(setup):
    row = computed(setup, Duet(static=False))
    assert row.opened == {} and row.adaptation == "none" and row.needs == "nothing"


def test_cached_activations_and_gates_are_recorded_without_reading_an_image(setup, monkeypatch):
    first = computed(setup, Duet(), learned("test"))

    def unread(*_):
        raise AssertionError("trained or measured again")

    monkeypatch.setattr("merging.neurons.activations", unread)
    monkeypatch.setattr(Learned, "fit", unread)
    again = computed(setup, Duet(), learned("test"))
    assert again.opened == first.opened == {"calibration": ["method=mine"], "test": ["router=task_id"]}
    unkept = replace(setup, gates=None)  # as redo=true: the gates of a killed run lie in its journal
    cell = Cell("mine", Twin(), Fixed(), learned("test"), CONFIG, unkept)
    monkeypatch.undo()
    fresh = cell.compute(lambda task, score: None)
    monkeypatch.setattr(Learned, "fit", unread)
    assert cell.compute(lambda task, score: None).opened == fresh.opened == {"test": ["router=task_id"]}


def test_a_search_opens_validation_and_adapts_to_nothing(setup):
    row = computed(setup, TaskArithmetic(), scale=Search([0.1, 0.3]))
    assert row.opened == {"val": ["scale"]} and row.adaptation == "none" and row.needs == "nothing"
    assert computed(setup, TaskArithmetic()).opened == {}


def test_the_split_that_is_scored_need_not_be_test(setup):
    row = computed(setup, Twin(), learned("val"), split="val")
    (summary,) = summarise([row])
    assert row.adaptation == "val" and summary.lines["transductive"][1]
    assert "Saw the unlabelled val samples (transductive; no fair rival, never bold): mine." in notes(summary)


@pytest.mark.parametrize(("overrides", "read"), [
    (["method=wemoe", "router=entropy_transductive", "split=val"], ["val", "test"]),
    (["method=wemoe"], ["test", "calibration"]),
    (["method=wemoe", "router=oracle"], ["test"]),
    (["method=duet", "router=oracle", "scale=search"], ["test", "val", "calibration"]),
    (["method=ties", "scale=fixed", "router=entropy_transductive"], ["test"]),
])  # fmt: skip
def test_what_is_foreseen_is_what_will_be_opened(overrides, read):
    with initialize_config_module("conf", version_base="1.3"):
        config = compose("config", ["scale=fixed", *overrides] if "scale=search" not in overrides else overrides)
    assert [config.split, *splits_read(*job.built(config))] == read


def test_openings_survive_the_disk_and_older_rows_have_none(tmp_path):
    row = routed_row(opened={"calibration": ["method=duet", "router=task_id"], "val": ["scale"]})
    path = rows.write(row, tmp_path)
    assert rows.read(tmp_path) == [row]
    path.write_text(path.read_text().replace('"val": [', '"val": [7, '))
    assert rows.read(tmp_path) == []
    assert routed_row().opened == {}


def test_a_class_without_an_image_is_noted_for_the_split_of_the_search_too(setup):
    tasks = (Noise("one", ("a", "b", "c")), Noise("three"))
    setup = replace(setup, grid=Grid(Suite("noise", tasks), TOWER))
    note = "one: {} has no sample of 1 of 3 classes (c)."
    assert computed(setup, TaskArithmetic()).remarks == [note.format("test")]
    searched = computed(setup, TaskArithmetic(), scale=Search([0.1, 0.3], criterion="mean"))
    assert searched.remarks == [note.format("test"), note.format("val")]


def test_a_probe_is_a_diagnosis_beside_the_score(setup):
    plain, asked = (
        Cell("mine", TaskArithmetic(), Fixed(), Oracle(), CONFIG | config, setup).compute(lambda task, score: None)
        for config in ({}, {"probe": True})
    )
    assert plain.probe == {} and asked.scores == plain.scores and set(asked.probe) == {"one", "three"}
    assert asked.run_id != plain.run_id
    assert (asked.opened, asked.adaptation, asked.needs) == ({"train": ["probe"]}, "none", "nothing")
    routed = Cell("mine", Twin(), Fixed(), Oracle(), CONFIG | {"probe": True}, setup).compute(lambda task, score: None)
    assert routed.probe == {}
