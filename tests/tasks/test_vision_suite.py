"""Which images serve which split; tasks from a few lines of configuration; nothing is opened before it is needed."""

import copy
import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_module
from hydra.utils import instantiate
from PIL import Image

from merging.errors import UserError
from tasks.split import Split
from tasks.vision import data as module
from tasks.vision import suite as suite_module
from tasks.vision.data import Need, Store
from tasks.vision.parts import Rule
from tasks.vision.suite import build

TASKS = {
    "clip8": "SUN397 Cars RESISC45 EuroSAT SVHN GTSRB MNIST DTD",
    "clip14": "SUN397 Cars RESISC45 EuroSAT SVHN GTSRB MNIST DTD Flowers102 PCAM FER2013 OxfordIIITPet STL10 CIFAR100",
    "clip20": "SUN397 Cars RESISC45 EuroSAT SVHN GTSRB MNIST DTD Flowers102 PCAM FER2013 OxfordIIITPet STL10 CIFAR100 "
    "CIFAR10 Food101 FashionMNIST EMNIST KMNIST RenderedSST2",
}


def chosen(rule, split, **sizes):
    """(part, indices) for a data set with these parts."""
    part, indices = rule.choose(split, sizes.get, "birds")
    return part, indices.tolist()


def test_validation_is_that_of_the_published_code():
    """min(10 %, 5000) of train by torch.utils.data.random_split with seed 0, as task_vectors draws it."""
    from torch.utils.data import random_split

    for count, held in ((1020, 102), (60000, 5000)):
        rest, val = random_split(range(count), [count - held, held], torch.Generator().manual_seed(0))  # type: ignore[arg-type]
        assert chosen(Rule(), "val", train=count, test=9) == ("train", sorted(val.indices))
        assert chosen(Rule(), "train", train=count, test=9) == ("train", sorted(rest.indices))
    assert rest.indices[0] == 36044  # on MNIST, asserted by the published registry


@pytest.mark.parametrize("sizes", [
    {"train": 3000, "test": 40}, {"train": 3000}, {"train": 3000, "val": 50}, {"train": 3000, "val": 70, "test": 40},
    {"train": 12}, {"train": 4, "test": 1},
])  # fmt: skip
def test_splits_do_not_overlap(sizes):
    found = {split: chosen(Rule(calibration=64), split, **sizes) for split in ("train", "val", "calibration", "test")}
    at = {split: {(part, index) for index in indices} for split, (part, indices) in found.items()}
    assert all(len(at[split]) == len(found[split][1]) > 0 for split in at)
    assert not at["val"] & at["train"] and not at["test"] & (at["train"] | at["val"])
    assert at["calibration"] <= at["train"] and len(at["calibration"]) == min(64, len(at["train"]))
    assert len(at["train"] | {each for each in at["val"] | at["test"] if each[0] == "train"}) == sizes["train"]
    for part in ("val", "test"):
        assert part not in sizes or found[part] == (part, list(range(sizes[part])))


def test_calibration_is_drawn_from_all_over():
    """Its first images too, though data sets are sorted by class."""
    _, indices = chosen(Rule(), "calibration", train=50000, test=9)
    assert len(indices) == 1024 and indices != sorted(indices)
    assert abs(torch.tensor(indices[:100]).float().mean() - 25000) < 5000


def test_a_limit_draws_few_of_the_same_images():
    whole, few = Rule(seed=3), Rule(seed=3, limit=20)
    for split in ("train", "val", "calibration", "test"):
        (part, many), (same, some) = (chosen(rule, split, train=4000, test=900) for rule in (whole, few))
        assert part == same and len(some) == 20 and {*some} <= {*many}
    test = chosen(few, "test", train=4000, test=900)[1]
    assert test == sorted(test) and test[-1] > 500


def test_seeds_draw_differently_and_repeat():
    draws = [chosen(Rule(seed=seed), "val", train=500, test=9)[1] for seed in (0, 1, 0)]
    assert draws[0] == draws[2] != draws[1]


def test_too_few_images_and_bad_shares_are_refused():
    with pytest.raises(UserError, match="birds has too few images"):
        chosen(Rule(), "train", train=1, test=5)
    with pytest.raises(UserError, match="too few images"):
        chosen(Rule(), "test", train=5, test=0)
    with pytest.raises(UserError, match=r"suite.limit=0"):
        Rule(limit=0)
    with pytest.raises(UserError, match="test_share=1"):
        Rule(test_share=1)


def photos(root, parts=("train", "test"), classes=("barn_owl", "red fox"), count=6):
    """PNG files of random colours in class folders."""
    rng = torch.Generator().manual_seed(0)
    for part in parts:
        for name in classes:
            folder = root / part / name
            folder.mkdir(parents=True)
            for index in range(count):
                colour = torch.randint(0, 256, (3,), generator=rng).tolist()
                Image.new("RGB", (20, 24), tuple(colour)).save(folder / f"{index}.png")
    return root


@pytest.fixture
def store(tmp_path):
    return Store(str(tmp_path / "images"), str(tmp_path / "cache"), 1)


def one(store, sources, **knobs):
    """The only task of a suite; its text tower is never opened."""
    return build("mine", None, store, "clip_vit_b32", sources=sources, **{"size": 16, **knobs}).tasks[0]


def test_class_folders_become_a_task(tmp_path, store):
    task = one(store, {"birds": {"folder": str(photos(tmp_path / "photos"))}})
    assert task.name == "birds" and tuple(task.classes) == ("barn owl", "red fox")
    assert task.heads.templates == ("a photo of a {}.",)
    sizes = {name: len(task.split(name)) for name in ("train", "val", "calibration", "test")}
    assert sizes == {"train": 11, "val": 1, "calibration": 11, "test": 12}
    test = task.split("test")
    assert test.inputs.shape == (12, 3, 16, 16) and test.labels.tolist() == [0] * 6 + [1] * 6
    assert test.id == Split("test", test.inputs.clone(), test.labels.clone()).id
    assert task.split("test") is test


def test_one_folder_is_divided_by_seed(tmp_path, store):
    root = photos(tmp_path / "photos", parts=(".",), count=10)
    task, again, other = (
        one(store, {"birds": {"folder": str(root), "test_share": 0.25}}, seed=seed) for seed in (0, 0, 1)
    )
    assert {name: len(task.split(name)) for name in ("train", "val", "test")} == {"train": 14, "val": 1, "test": 5}
    assert task.split("test").id == again.split("test").id != other.split("test").id


def test_given_names_and_templates(tmp_path, store):
    given = {"folder": str(photos(tmp_path / "photos")), "classes": ["owl", "fox"], "templates": ["a {}", "the {}"]}
    task = one(store, {"birds": given})
    assert (task.classes, task.heads.templates) == (("owl", "fox"), ("a {}", "the {}"))
    with pytest.raises(UserError, match=r"birds has 1 class names, its data set .* has 2"):
        one(store, {"birds": given | {"classes": ["owl"]}}).split("test")


def test_a_limit_is_another_split(tmp_path, store):
    sources = {"birds": {"folder": str(photos(tmp_path / "photos"))}}
    whole, few = one(store, sources), one(store, sources, limit=3)
    assert (len(whole.split("test")), len(few.split("test"))) == (12, 3)
    assert whole.split("test").id != few.split("test").id


def test_the_test_split_survives_other_sizes_of_validation(tmp_path, store, monkeypatch):
    sources = {"birds": {"folder": str(photos(tmp_path / "photos"))}}
    first = one(store, sources).split("test")
    monkeypatch.setattr(module.Images, "make", lambda *_: pytest.fail("decoded again"))
    again = one(store, sources, val=1, calibration=3).split("test")
    assert isinstance(again, type(first)) and again.id == first.id


def test_decoded_images_need_no_source(tmp_path, store, monkeypatch):
    """A machine without the network or the data set goes on with what was decoded."""
    data = pytest.importorskip("datasets")
    monkeypatch.setattr(data.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    cells = {"image": [Image.new("RGB", (9, 9), (i, i, i)) for i in range(12)], "label": [i % 3 for i in range(12)]}
    features = data.Features({"image": data.Image(), "label": data.ClassLabel(names=["a", "b_c", "d"])})
    path = tmp_path / "all.parquet"
    data.Dataset.from_dict(cells, features=features).to_parquet(str(path))
    task = one(store, {"shades": {"parquet": str(path)}})
    assert tuple(task.classes) == ("a", "b c", "d")
    wanted = task.split("test")
    fresh = one(store, {"shades": {"parquet": str(path)}})
    monkeypatch.setattr(data, "load_dataset", lambda *_, **__: pytest.fail("loaded again"))
    assert fresh.split("test").id == wanted.id


def test_damaged_images_are_named(tmp_path, store):
    root = photos(tmp_path / "photos")
    (root / "test" / "red fox" / "2.png").write_bytes(b"\x89PNG")
    with pytest.raises(UserError, match=r"1 of the 12 images of birds test cannot be read: .*red fox/2.png"):
        one(store, {"birds": {"folder": str(root)}}).split("test")


@pytest.mark.parametrize(("sources", "said"), [
    ({"birds": {"folders": "x"}}, "birds has folders, which is no option. Known are args, classes, folder"),
    ({"birds": {"folder": "x", "hub": "a/b"}}, "Give exactly one"),
    ({"birds": {}}, "says none of folder, parquet and hub"),
])  # fmt: skip
def test_bad_sources_are_refused_when_built(store, sources, said):
    with pytest.raises(UserError, match=said):
        one(store, sources)


def test_unknown_tasks_and_twice_named_ones_are_refused(store):
    with pytest.raises(UserError, match="no task 'Birds'"):
        build("x", ["Birds"], store, "clip_vit_b32")
    with pytest.raises(UserError, match="DTD is listed more than once"):
        build("x", ["DTD", "DTD"], store, "clip_vit_b32")
    with pytest.raises(UserError, match=r"EMNIST of tall_masks has no known copy .*suite.sources.EMNIST.folder"):
        build("x", ["EMNIST"], store, "clip_vit_b32", variant="tall_masks")


def test_a_published_task_from_a_local_folder(tmp_path, store, caplog):
    """Its names and prompts stay the published ones; the order of the folders is checked, its size reported."""
    names = ["AnnualCrop", "Forest", "HerbaceousVegetation", "Highway", "Industrial", "Pasture", "PermanentCrop",
             "Residential", "River", "SeaLake"]  # fmt: skip
    root = photos(tmp_path / "eurosat", ("train", "val", "test"), names, 2)
    task = one(store, {"EuroSAT": {"folder": str(root)}}, variant="tall_masks")
    with caplog.at_level(logging.WARNING):
        assert len(task.split("val")) == 20 and task.classes[9] == "lake or sea"
    assert "has 20 images, published are 2700" in caplog.text

    wrong = photos(tmp_path / "wrong", ("train", "test"), ["angry", "disgust", "fear", "happy", "neutral", "sad"], 1)
    with pytest.raises(UserError, match=r"FER2013 has 7 class names, its data set .* has 6"):
        one(store, {"FER2013": {"folder": str(wrong)}}).split("test")


def test_labels_beyond_the_classes_are_refused(tmp_path, store):
    task = one(store, {"birds": {"folder": str(photos(tmp_path / "photos"))}})
    table = task.data.source.table("test")
    with pytest.raises(UserError, match="run from 0 to 1; with 1 classes they must lie in 0 to 0"):
        replace(task.data, class_names=("owl",))._check_labels(table, "test")


def test_nothing_is_opened_when_built(store, monkeypatch):
    monkeypatch.setattr(suite_module, "open_source", lambda task, options, cache: untouchable)
    untouchable = type("Untouchable", (), {"__getattr__": lambda self, name: pytest.fail(name)})()
    suite = build("clip20", TASKS["clip20"].split(), store, "clip_vit_b32")
    assert len(suite.tasks) == 20 and len(suite.tasks[0].classes) == 397
    assert not Path(store.images).exists() and not Path(store.cache).exists()


def test_a_backbone_without_text_is_refused_before_anything_is_loaded(tmp_path, store):
    task = build("x", ["DTD"], store, "mini_clip").tasks[0]
    for ask in (lambda: task.split("test"), task.head, task.needs):
        with pytest.raises(UserError, match=r"no text tower for 'mini_clip'"):
            ask()


def test_needs_are_known_before_a_download(tmp_path, store):
    task = build("x", ["DTD"], store, "clip_vit_b16").tasks[0]
    images = 376 + 1024 + 1880
    assert task.needs() == [
        Need("openai/clip-vit-base-patch16", "model", 0, 0), Need("tanganke/dtd", "dataset", images, images * 150528),
    ]  # fmt: skip
    mine = one(store, {"birds": {"folder": str(photos(tmp_path / "photos"))}})
    assert [need.kind for need in mine.needs()] == ["model", "local"]
    for split in ("val", "calibration", "test"):
        mine.split(split)
    assert [need.kind for need in mine.needs()] == ["model"]


def test_a_task_travels_without_what_it_has_opened(tmp_path, store):
    task = one(store, {"birds": {"folder": str(photos(tmp_path / "photos"))}})
    task.split("test")
    sent = copy.copy(task)  # by the protocol that sends it to another process
    assert "_splits" not in copy.copy(task.data).__dict__ and "_files" not in copy.copy(task.data.source).__dict__
    assert sent.split("test").id == task.split("test").id


def test_a_head_comes_from_the_named_file(tmp_path, store):
    from safetensors.torch import save_file
    from test_heads import by_hand, clip

    model = clip()
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, tmp_path / "clip.safetensors")
    sources = {"birds": {"folder": str(photos(tmp_path / "photos"))}}
    task = build("mine", None, store, str(tmp_path / "clip.safetensors"), sources=sources, size=16).tasks[0]
    want = by_hand(model, ["barn owl", "red fox"], ["a photo of a {}."])
    torch.testing.assert_close(task.head().weight, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", TASKS)
def test_published_suites_compose(name, tmp_path):
    with initialize_config_module("conf", version_base="1.3"):
        config = compose("config", [f"suite={name}", f"output={tmp_path}", "suite.limit=5"])
    suite = instantiate(config.suite)
    assert suite.name == name and " ".join(suite.names) == TASKS[name]
    assert suite.tasks[0].data.store.images == f"{tmp_path}/images" and suite.tasks[0].data.rule.limit == 5


def test_a_few_lines_of_yaml_make_a_task(tmp_path):
    """From the command line too: the shipped file with another folder, and a published task beside it."""
    photos(tmp_path / "pets")
    overrides = [f"suite.sources.pets.folder={tmp_path}/pets", "suite.tasks=[pets,MNIST]", "suite.size=16",
                 "suite.text=clip_vit_b32", "+suite.sources.pets.templates=['a {}.']"]  # fmt: skip
    with initialize_config_module("conf", version_base="1.3"):
        config = compose("config", ["suite=folder", f"output={tmp_path}", *overrides])
    suite = instantiate(config.suite)
    assert suite.names == ("pets", "MNIST") and suite.tasks[0].heads.templates == ("a {}.",)
    assert len(suite.tasks[0].split("test")) == 12
