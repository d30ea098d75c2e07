"""Ids of splits and heads follow the content of files, never their paths, and unchanged files are not read again."""

import os
import shutil
from dataclasses import replace

import pytest
import torch
from clips import whole
from safetensors.torch import save_file
from test_sources import fill, parquet, png

from merging.errors import UserError
from tasks.heads.head import ZeroShot
from tasks.mini import suite as mini
from tasks.split import Split
from tasks.suite import Suite, absent, content, contents, remarks
from tasks.vision import digests as module
from tasks.vision.data import Store
from tasks.vision.dataset_registry import VARIANTS, facts, names
from tasks.vision.suite import build

SPLITS = ("train", "val", "calibration", "test")


def pets(tmp_path, folder="pets", text="clip.safetensors", **source):
    """A fresh look at a folder, as a new process has it."""
    store = Store(str(tmp_path / "images"), str(tmp_path / "cache"), 1)
    where = {"folder": str(tmp_path / folder)} if "parquet" not in source else {}
    return build("mine", None, store, str(tmp_path / text), size=8, sources={"pets": where | source}).tasks[0]


def ids(task, *what):
    return {each: content(task, each) for each in what or SPLITS}


def changed(before, after):
    return {what for what in before if before[what] != after[what]}


@pytest.fixture
def folder(tmp_path):
    """Class folders with all parts, and a text tower."""
    save_file(whole(1, 32, 64), tmp_path / "clip.safetensors")
    for part, count in (("train", 20), ("val", 2), ("test", 3)):
        fill(tmp_path / "pets", ["cat", "red_fox"], count, part)
    return tmp_path / "pets"


def test_every_image_counts_where_it_serves(tmp_path, folder):
    before = ids(pets(tmp_path))
    assert ids(pets(tmp_path)) == before and len({*before.values()}) == 4
    for part, moved in (("test", {"test"}), ("val", {"val"}), ("train", {"train", "calibration"})):
        (folder / part / "cat" / "99.png").write_bytes(png(99))
        now = ids(pets(tmp_path))
        assert changed(before, now) == moved
        before = now


def test_a_new_image_is_decoded_and_the_old_split_is_not_taken(tmp_path, folder):
    old = pets(tmp_path).split("test")
    (folder / "test" / "red_fox" / "9.png").write_bytes(png(200))
    new = pets(tmp_path).split("test")
    assert (len(old), len(new)) == (6, 7) and torch.equal(new.inputs[:6], old.inputs)
    assert new.inputs[6].unique().tolist() == [0, 55, 200] and new.labels.tolist() == [0] * 3 + [1] * 4


def test_another_image_under_the_same_name_size_and_time_counts(tmp_path, folder):
    path, before = folder / "test" / "cat" / "0.png", ids(pets(tmp_path), "test")
    stat, old = path.stat(), path.read_bytes()
    path.rename(folder.parent / "kept")
    path.write_bytes(bytes([*old[:-20], old[-20] ^ 1, *old[-19:]]))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert path.stat().st_size == stat.st_size and ids(pets(tmp_path), "test") != before


def test_a_new_class_counts(tmp_path, folder):
    before = ids(pets(tmp_path), "head", *SPLITS)
    fill(folder / "train", ["bat"], 1)
    assert changed(before, ids(pets(tmp_path), "head", *SPLITS)) == {"head", "train", "val", "calibration", "test"}


def test_no_path_and_no_file_beside_counts(tmp_path, folder):
    before = ids(pets(tmp_path), "head", *SPLITS)
    (folder / "test" / "cat" / "notes.txt").write_text("beside")
    shutil.copytree(folder, tmp_path / "elsewhere", copy_function=shutil.copyfile)
    shutil.copyfile(tmp_path / "clip.safetensors", tmp_path / "other.safetensors")
    (tmp_path / "elsewhere" / "test").rename(tmp_path / "elsewhere" / "Testing")
    assert ids(pets(tmp_path, "elsewhere", "other.safetensors"), "head", *SPLITS) == before


def test_what_has_not_changed_is_not_read_again(tmp_path, folder, monkeypatch):
    before, read = ids(pets(tmp_path)), []
    honest = module.sha256
    monkeypatch.setattr(module, "sha256", lambda path: read.append(path.name) or honest(path))
    assert ids(pets(tmp_path)) == before and read == []
    (folder / "train" / "cat" / "77.png").write_bytes(png(77))
    ids(pets(tmp_path))
    assert read == ["77.png"]


def test_a_text_tower_under_the_same_path_makes_another_head(tmp_path, folder):
    first, before = pets(tmp_path).head().weight, ids(pets(tmp_path), "head", "test")
    save_file(whole(2, 32, 64), tmp_path / "clip.safetensors")
    assert changed(before, ids(pets(tmp_path), "head", "test")) == {"head"}
    fresh = pets(tmp_path)
    anew = replace(fresh, heads=replace(fresh.heads, cache=str(tmp_path / "new"))).head().weight
    assert torch.equal(pets(tmp_path).head().weight, anew) and not torch.equal(anew, first)
    prompts = ids(pets(tmp_path, templates=["the {}"]), "head")
    assert len({prompts["head"], before["head"], ids(pets(tmp_path), "head")["head"]}) == 3


def test_parquet_files_count_by_content(tmp_path):
    def at(name):
        return ids(pets(tmp_path, parquet={"train": str(tmp_path / name / "a.parquet")}), "train", "test")

    for name, last in (("one", 40), ("two", 40), ("three", 41)):
        (tmp_path / name).mkdir()
        images = [png(shade) for shade in (*range(19), last)]
        parquet(tmp_path / name / "a.parquet", images, [index % 2 for index in range(20)], ["x", "y"])
    save_file(whole(1, 32, 64), tmp_path / "clip.safetensors")
    assert at("one") == at("two") != at("three")
    shutil.copyfile(tmp_path / "three" / "a.parquet", tmp_path / "one" / "a.parquet")
    assert at("one") == at("three")


def test_drawn_images_are_known_without_drawing_them(monkeypatch):
    monkeypatch.setattr(mini, "render", lambda *_: pytest.fail("drawn"))

    def drawn(task="cars", test=40, seed=0):
        sizes = {"train": 64, "val": 20, "calibration": 8, "test": test}
        return content(mini.build("mini8", [task], sizes, seed).tasks[0], "test")

    assert drawn() == drawn() and len({drawn(), drawn("signs"), drawn(test=41), drawn(seed=1)}) == 4


class Named:
    """A task that says nothing of its content."""

    name, classes = "hues", ("red", "green", "blue")

    def __init__(self, labels=(0, 1, 2), shade=0):
        self._split = Split("test", torch.full((3, 3, 1, 1), shade, dtype=torch.uint8), torch.tensor(labels))

    def split(self, name):
        return self._split

    def head(self):
        return ZeroShot(torch.eye(3))


def test_any_task_has_an_id():
    assert content(Named(), "test") == Named().split("test").id != content(Named(shade=1), "test")
    assert content(Named(), "head") == content(Named(shade=1), "head")


def test_absent_classes_and_equal_tasks_are_said():
    one, other = Named((0, 0, 2)), Named((0, 0, 2))
    other.name = "tints"
    suite = Suite("two", (one, other))  # type: ignore[arg-type]
    said = remarks(suite, {task.name: task.split("test") for task in suite.tasks})
    assert said == [
        "hues: test has no sample of 1 of 3 classes (green).", "tints: test has no sample of 1 of 3 classes (green).",
        "hues and tints are scored on the same samples.",
    ]  # fmt: skip
    assert absent(Named(), Named().split("test")) is None
    assert contents(suite, "test")["tints"].keys() == {"head", "test"}
    apart = contents(Suite("two", (one,), (other,)), "test", ["val"])  # type: ignore[arg-type]
    assert apart["hues"].keys() == {"head", "test", "val"} and apart["tints"].keys() == {"head", "test"}


@pytest.mark.parametrize("classes", [("red_fox", "red fox"), ("Cat", "cat"), ("red  fox", "red fox ")])
def test_two_classes_with_one_prompt_are_refused(tmp_path, folder, classes):
    said = rf"{classes[0]!r} \(number \d\) and {classes[1]!r} \(number \d\) of pets give one prompt"
    with pytest.raises(UserError, match=said):
        pets(tmp_path, classes=list(classes))  # when it is built
    fill(tmp_path / "twins", classes)
    with pytest.raises(UserError, match=f"{said}|{classes[1]!r} .* and {classes[0]!r}"):
        pets(tmp_path, "twins").needs()  # before anything is loaded


def test_published_classes_have_prompts_of_their_own():
    for name in names():
        for variant in VARIANTS:
            said = facts(name, variant).classes
            assert len({" ".join(each.lower().split()) for each in said}) == len(said)
