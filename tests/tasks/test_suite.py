"""The splits of mini8: fixed, balanced, disjoint and fingerprinted."""

from collections import Counter
from dataclasses import fields
from types import SimpleNamespace

import pytest
import torch

from merging.backbones.open_clip import OpenClip
from merging.errors import UserError
from tasks.mini.digits import handwriting
from tasks.mini.generate import CLASSES, to_bytes
from tasks.mini.model import CONTEXT, TEMPLATES, TOWER, load_base, tokenize, vocabulary
from tasks.mini.suite import _split, build
from tasks.split import SPLITS
from tasks.suite import Suite, calibration

SIZES = {"train": 90, "val": 40, "calibration": 20, "test": 40}
DRAWN = [task for task in CLASSES if task != "digits"]


@pytest.fixture(scope="module")
def mini8():
    return {task.name: task for task in build("mini8", list(CLASSES), SIZES).tasks}


def pictures(split):
    return [image.numpy().tobytes() for image in split.inputs]


@pytest.mark.parametrize("task", CLASSES)
def test_splits_share_no_image(mini8, task):
    every = [picture for name in SPLITS for picture in pictures(mini8[task].split(name))]
    assert len(set(every)) == len(every)


@pytest.mark.parametrize("task", DRAWN)
def test_drawn_splits_have_their_size_and_equal_classes(mini8, task):
    for name, size in SIZES.items():
        split = mini8[task].split(name)
        counts = Counter(split.labels.tolist())
        assert split.name == name and len(split) == len(split.inputs) == size
        assert set(counts) <= set(range(len(CLASSES[task])))
        assert max(counts.values()) - min(counts[label] for label in range(len(CLASSES[task]))) <= 1


@pytest.mark.parametrize("task", ["cars", "digits"])
def test_splits_repeat(mini8, task):
    for name in SPLITS:
        again = _split.__wrapped__(mini8[task].data, name)  # past the memory of this process
        assert torch.equal(again.inputs, mini8[task].split(name).inputs)
        assert again.id == mini8[task].split(name).id and len(again.id) == 16


def test_the_fingerprint_tells_splits_seeds_and_sizes_apart(mini8):
    other_seed = build("mini8", ["cars"], SIZES, seed=1).tasks[0]
    other_size = build("mini8", ["cars"], SIZES | {"test": 39}).tasks[0]
    ids = [mini8["cars"].split(name).id for name in SPLITS]
    ids += [other_seed.split("test").id, other_size.split("test").id, mini8["aerial"].split("test").id]

    assert len(set(ids)) == len(ids)
    assert other_size.split("val").id == mini8["cars"].split("val").id
    assert not set(pictures(other_seed.split("train"))) & set(pictures(mini8["cars"].split("test")))


def test_every_handwritten_scan_is_in_exactly_one_split(mini8):
    images, labels = handwriting()
    parts = [mini8["digits"].split(name) for name in SPLITS]

    assert torch.equal(torch.cat([part.labels for part in parts]), labels) and len(labels) == 1797
    assert torch.equal(torch.cat([part.inputs for part in parts]), to_bytes(images))
    assert all(set(part.labels.tolist()) == set(range(10)) for part in parts)


def test_about_150_classes_with_names_that_fit_the_text_tower():
    assert 140 <= sum(map(len, CLASSES.values())) <= 160
    for names in CLASSES.values():
        assert len(set(names)) == len(names)
        for template in TEMPLATES:
            ids = tokenize([template.format(name) for name in names])
            assert ids.shape == (len(names), CONTEXT) and len(set(map(tuple, ids.tolist()))) == len(names)
            assert (ids.amax(1) == vocabulary()["<end>"]).all()  # where open_clip pools


def test_heads_are_unit_text_features_times_the_temperature(mini8):
    scale = load_base().logit_scale.exp().item()
    for task in mini8.values():
        head = task.head().weight
        assert head.shape == (len(task.classes), 128) and not head.requires_grad
        assert head.norm(dim=1) == pytest.approx(torch.full((len(head),), scale), rel=1e-5)


@pytest.mark.parametrize(
    ("tasks", "sizes", "message"),
    [
        (["cars", "carz"], {}, r"no task 'carz' in the suite mini8\. It has: scenes, cars"),
        (["cars", "digits", "cars"], {}, "cars is listed more than once"),
        ([], {}, "list of tasks is empty"),
        (["cars"], {"test": 0}, r"suite\.sizes\.test=0 leaves the split test of mini8 empty"),
        (["cars"], {"val": -5}, r"suite\.sizes\.val=-5"),
    ],
)
def test_a_suite_that_cannot_be_measured_is_refused(tasks, sizes, message):
    with pytest.raises(UserError, match=message):
        build("mini8", tasks, SIZES | sizes)


def test_a_suite_keeps_its_order(mini8):
    assert Suite("two", (mini8["digits"], mini8["cars"])).names == ("digits", "cars")


def test_calibration_is_a_split_without_its_labels(mini8):
    suite = Suite("two", (mini8["digits"], mini8["cars"]))
    backbone = OpenClip("mini", **TOWER, mean=(0.5,) * 3, std=(0.5,) * 3)
    shown = calibration(suite, backbone, "calibration")
    splits = [mini8[name].split("calibration") for name in suite.names]

    assert shown.split == "calibration" and shown.ids == tuple(split.id for split in splits)
    assert shown.sizes == tuple(len(split) for split in splits)
    for task, split in enumerate(splits):
        together = torch.cat(list(shown.batches(task, batch=7)))
        assert torch.equal(together, backbone.prepare(split.inputs))
        assert torch.equal(shown.inputs(task, torch.tensor([3, 0])), together[[3, 0]])
        assert torch.equal(shown.heads[task].weight, mini8[suite.names[task]].head().weight)
    assert shown.backbone == backbone.identity()
    assert {field.name for field in fields(shown)} == {
        "split", "ids", "sizes", "inputs", "heads", "head_ids", "read", "tower", "device", "backbone", "precision"
    }  # fmt: skip


@pytest.mark.parametrize("name", ["base", "mean", "norm"])
def test_names_that_rows_and_tables_use_are_no_tasks(name):
    for tasks in ({"tasks": (SimpleNamespace(name=name),)}, {"tasks": (SimpleNamespace(name="a"),),
                                                             "held_out": (SimpleNamespace(name=name),)}):  # fmt: skip
        with pytest.raises(UserError, match=f"A task cannot be called {name}: rows and tables have base, mean, norm"):
            Suite("mine", **tasks)


def test_sizes_of_unknown_splits_are_refused():
    with pytest.raises(
        UserError, match=r"suite\.sizes has tran, which is no split\. Splits are train, val, calibration"
    ):
        build("mini8", ["cars"], {"train": 2, "tran": 3, "val": 1, "calibration": 1, "test": 1})
