"""How a folder of images is understood: its parts, its classes, what is left out, and what is refused."""

import logging
import os

import pytest
from test_sources import fill, png

from merging.errors import UserError
from tasks.vision.folders import FolderSource
from tasks.vision.layout import chosen


def sizes(source):
    """Images of every part, None for a part that is not there."""
    tables = {part: source.table(part) for part in ("train", "val", "test")}
    return {part: None if table is None else len(table.labels) for part, table in tables.items()}


@pytest.mark.parametrize(("train", "val", "test"), [
    ("Training", "Validation", "Testing"), ("TRAIN", "dev", "TEST"), ("train", "valid", "Test"),
    ("training", "VAL", "testing"),
])  # fmt: skip
def test_usual_names_are_known_in_any_case(tmp_path, caplog, train, val, test):
    for name, count in ((train, 3), (val, 1), (test, 2)):
        fill(tmp_path, ["cat", "dog"], count, name)
    source = FolderSource(tmp_path)
    with caplog.at_level(logging.INFO):
        assert source.classes() == ("cat", "dog") and sizes(source) == {"train": 6, "val": 2, "test": 4}
    read = f"train={train} (6 images, 2 classes), val={val} (2 images, 2 classes), test={test} (4 images, 2 classes)"
    assert caplog.text.count(f"{tmp_path}: read {read}") == 1 and source.notes() == [f"read {read}"]


@pytest.mark.parametrize("names", [("train", "test"), ("train", "val", "test"), ("cat", "dog")])
def test_plain_layouts_need_no_remark(tmp_path, names):
    for name in names:
        fill(tmp_path, ["a", "b"] if "train" in names else [""], 2, name)
    assert FolderSource(tmp_path).notes() == []


def test_a_folder_of_images_beside_their_annotations(tmp_path):
    fill(tmp_path / "Images", ["cat", "dog"], 2)
    (tmp_path / "annotations").mkdir()
    source = FolderSource(tmp_path)
    assert source.classes() == ("cat", "dog") and source.notes() == ["read train=Images (4 images, 2 classes)"]
    for part in ("Train", "Test"):
        fill(tmp_path / "nested" / "images", ["cat", "dog"], 1, part)
    nested = FolderSource(tmp_path / "nested")
    assert sizes(nested) == {"train": 2, "val": None, "test": 2} and "test=images/Test" in nested.notes()[0]


@pytest.mark.parametrize("names", [
    ("train", "Train2"), ("train", "test", "test2"), ("fold1", "fold2", "fold3"), ("train_set", "test_set"),
    ("Train", "Eval"), ("split 1", "split 2"), ("train", "meta"), ("my_train", "my_test"), ("seen", "val"),
])  # fmt: skip
def test_what_may_be_splits_or_classes_is_refused(tmp_path, names):
    for name in names:
        fill(tmp_path, ["cat", "dog"], 1, name)
    with pytest.raises(
        UserError, match=r"may be splits of the data set or classes. Say which is which: train: <folder>"
    ):
        FolderSource(tmp_path).classes()
    named = FolderSource(tmp_path, {"train": names[0], "test": names[1]})
    assert named.classes() == ("cat", "dog") and sizes(named) == {"train": 2, "val": None, "test": 2}


@pytest.mark.parametrize("names", [("train", "Training"), ("train", "val", "dev"), ("train", "Test", "testing")])
def test_two_folders_for_one_part_are_refused(tmp_path, names):
    for name in names:
        fill(tmp_path, ["cat", "dog"], 1, name)
    with pytest.raises(
        UserError, match=rf"{names[-2]} and {names[-1]}, and each may be|{names[-1]} and {names[-2]}, and"
    ):
        FolderSource(tmp_path).classes()


def test_a_split_serves_one_part():
    """One that is named for test is not found by its usual name too, and of two usual names none is guessed."""
    assert chosen("val", {"test": "validation"}, ["train", "validation"], "x") is None
    assert chosen("test", {"test": "validation"}, ["train", "validation"], "x") == "validation"
    with pytest.raises(
        UserError, match=r"x has val and validation, and each may be the val part. .*val: false for none"
    ):
        chosen("val", {}, ["train", "val", "validation"], "x")
    assert chosen("val", {"val": False}, ["train", "val", "validation"], "x") is None


@pytest.mark.parametrize("names", [("bus", "train"), ("train station", "test tube"), ("crash test", "bullet train"),
                                   ("developer", "valley", "trainer"), ("test", "exam")])  # fmt: skip
def test_classes_may_be_called_like_splits(tmp_path, names):
    source = FolderSource(fill(tmp_path, names))
    assert source.classes() == tuple(sorted(names)) and sizes(source) == {
        "train": 3 * len(names),
        "val": None,
        "test": None,
    }


@pytest.mark.parametrize("names", [("cat",), ("images", "labels")])
def test_folders_that_are_no_classes_are_refused(tmp_path, names):
    for part in ("train", "test"):
        fill(tmp_path, names, 2, part)
    with pytest.raises(UserError, match=f"class folders of .*train would be {', '.join(names)}. A task needs two"):
        FolderSource(tmp_path).classes()
    with pytest.raises(UserError, match=f"would be {', '.join(names)}"):
        FolderSource(fill(tmp_path / "whole", names)).classes()


def test_one_folder_is_not_two_parts(tmp_path):
    for part in ("train", "test"):
        fill(tmp_path, ["a", "b"], 2, part)
    (tmp_path / "val").symlink_to(tmp_path / "test")
    with pytest.raises(UserError, match="are the same folder, so that val and test would have the same images"):
        FolderSource(tmp_path).classes()
    assert sizes(FolderSource(tmp_path, {"val": False})) == {"train": 4, "val": None, "test": 4}


def test_train_decides_the_classes(tmp_path):
    fill(tmp_path, ["a", "b", "c"], 2, "train")
    fill(tmp_path, ["b", "c"], 1, "val")
    (tmp_path / "val" / "a").mkdir()
    fill(tmp_path, ["c"], 3, "test")
    source = FolderSource(tmp_path)
    assert source.classes() == ("a", "b", "c")
    val, test = source.table("val"), source.table("test")
    assert val is not None and test is not None and val.labels.tolist() == [1, 2] and test.labels.tolist() == [2, 2, 2]

    fill(tmp_path, ["d", "e"], 1, "test")
    with pytest.raises(UserError, match=r"test has images of d, e, which .*train lacks. Train decides the classes"):
        FolderSource(tmp_path).classes()


def test_hidden_entries_are_left_out_and_named(tmp_path, caplog):
    fill(tmp_path, ["cat", "dog"])
    fill(tmp_path / "cat", [".ipynb_checkpoints", "__MACOSX"])
    fill(tmp_path, [".thumbnails"])
    for name in ("cat/.DS_Store", "dog/Thumbs.db", "dog/._1.png", "dog/notes.txt", "dog/LICENSE", "list.csv", "1.png"):
        (tmp_path / name).write_bytes(b"\0Mac")
    source = FolderSource(tmp_path)
    with caplog.at_level(logging.INFO):
        assert sizes(source)["train"] == 6
    (said,) = source.notes()
    assert "6 hidden (.DS_Store, ._1.png, .ipynb_checkpoints and 3 more)" in said
    assert "2 no image (LICENSE, notes.txt)" in said and "2 beside the class folders (1.png, list.csv)" in said
    assert caplog.text.count(said) == 1


def test_an_image_is_known_by_its_content(tmp_path):
    """One without an ending counts; one that only claims to be an image is told when it is decoded."""
    fill(tmp_path, ["cat", "dog"], 1)
    (tmp_path / "cat" / "scan").write_bytes(png(5))
    (tmp_path / "dog" / "photo.JPG.txt").write_bytes(b"\xff\xd8\xff\xe0 a jpeg")
    (tmp_path / "dog" / "words.dat").write_bytes(b"BMW is no bitmap")
    source = FolderSource(tmp_path)
    table = source.table("train")
    assert table is not None and [path.name for path in table.paths] == ["0.png", "scan", "0.png", "photo.JPG.txt"]
    assert source.notes() == ["skipped 1 no image (words.dat)"]


def test_loops_are_not_followed(tmp_path):
    """Links to a folder above, to another class, and between two folders outside; none adds an image twice."""
    outside = fill(tmp_path / "outside", ["more", "other"], 2)
    data = fill(tmp_path / "data" / "train", ["cat", "dog"], 3)
    (data / "cat" / "up").symlink_to(data)
    (data / "cat" / "top").symlink_to(tmp_path)
    (data / "cat" / "dogs").symlink_to(data / "dog")
    (data / "again").symlink_to(data.parent)
    (data / "cat" / "more").symlink_to(outside / "more")
    (outside / "more" / "back").symlink_to(outside)
    source = FolderSource(data.parent)
    table = source.table("train")
    assert source.classes() == ("cat", "dog") and table is not None and table.labels.tolist() == [0] * 5 + [1] * 3
    assert source.notes() == ["skipped 5 linked back into the data set (again, back, dogs and 2 more)"]


def test_links_to_images_elsewhere_are_images(tmp_path):
    store = fill(tmp_path / "store", ["cat", "dog", "kittens"], 2)
    data = tmp_path / "data"
    (data / "cat").mkdir(parents=True)
    (data / "cat" / "young").symlink_to(store / "kittens")
    (data / "cat" / "0.png").symlink_to(store / "cat" / "0.png")
    (data / "dog").symlink_to(store / "dog")
    assert FolderSource(data).notes() == [] and sizes(FolderSource(data))["train"] == 5

    (data / "hound").symlink_to(store / "dog")
    with pytest.raises(UserError, match=r"The class folders dog and hound of .* are the same folder"):
        FolderSource(data).classes()


def test_dead_links_are_named(tmp_path):
    fill(tmp_path, ["cat", "dog"])
    (tmp_path / "cat" / "9.png").symlink_to(tmp_path / "gone.png")
    (tmp_path / "cow").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"2 links lead to no file: .*cow, .*cat/9.png. Put back what they point to"):
        FolderSource(tmp_path).classes()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_folders_that_cannot_be_read_are_not_passed_over(tmp_path):
    fill(tmp_path, ["cat", "dog"])
    (tmp_path / "cat" / "closed").mkdir(0)
    with pytest.raises(UserError, match=r"Cannot read .*closed"):
        FolderSource(tmp_path).classes()


def test_domains_that_share_their_classes_are_no_classes(tmp_path):
    for domain in ("Art", "Clipart", "Product"):
        fill(tmp_path / "home", ["bed", "fork"], 2, domain)
    with pytest.raises(UserError, match=r"Art, Clipart, Product, and each of them holds bed, fork: .* such as domains"):
        FolderSource(tmp_path / "home").classes()
    named = FolderSource(tmp_path / "home", {"train": "Art", "test": "Product"})
    assert named.classes() == ("bed", "fork") and sizes(named) == {"train": 4, "val": None, "test": 4}
    for species in ("cat", "dog"):
        fill(tmp_path / "views" / "train", ["front", "side"], 2, species)  # classes, as the message says how
        fill(tmp_path / "mixed", ["front", f"only {species}"], 2, species)
    for name in ("views", "mixed"):
        assert FolderSource(tmp_path / name).classes() == ("cat", "dog")
