"""Class folders, parquet files and the Hub give the images and labels that lie there."""

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hub import Fault, Hub, commit
from PIL import Image

from merging.errors import UserError
from tasks.vision.folders import FolderSource
from tasks.vision.rows import ARROW, RowSource
from tasks.vision.sources import open_source

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory):
    """The cache of `datasets` in a folder of these tests."""
    import datasets

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        yield


def png(shade):
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (shade, 0, 255 - shade)).save(file, "PNG")
    return file.getvalue()


def fill(root, classes, count=3, part=""):
    """<root>/<part>/<class>/<index>.png"""
    for name in classes:
        folder = root / part / name
        folder.mkdir(parents=True)
        for index in range(count):
            (folder / f"{index}.png").write_bytes(png(index))
    return root


def parquet(path, images, labels, names=None, columns=("image", "label"), kind="image"):
    """A parquet file as the Hub's own tools write it, or with plain bytes."""
    from datasets import ClassLabel, Dataset, Features, Value
    from datasets import Image as Column

    cells = {"image": [{"bytes": each, "path": None} for each in images], "bytes": images}[kind]
    feature = ClassLabel(names=names) if names else Value({bool: "bool", int: "int64", str: "string"}[type(labels[0])])
    types = {"image": Column(), "bytes": Value("binary")}
    features = Features({columns[0]: types[kind], columns[1]: feature})
    Dataset.from_dict(dict(zip(columns, (cells, labels), strict=True)), features=features).to_parquet(str(path))
    return str(path)


def test_parts_in_folders(tmp_path):
    for part, count in (("train", 3), ("val", 1), ("test", 2)):
        fill(tmp_path, ["red_fox", "owl"], count, part)
    source = FolderSource(tmp_path)
    assert source.classes() == ("owl", "red_fox")
    train, val, test = (source.table(part) for part in ("train", "val", "test"))
    assert train is not None and train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert val is not None and test is not None and (len(val.labels), len(test.labels)) == (2, 4)
    assert train.read([4])[0].content == tmp_path / "train" / "red_fox" / "1.png"


def test_one_folder_of_classes_has_no_test_part(tmp_path):
    """Also where a class is called train."""
    source = FolderSource(fill(tmp_path, ["bus", "train"]))
    assert source.classes() == ("bus", "train") and source.table("test") is None and source.table("val") is None


def test_the_order_is_that_of_torchvision(tmp_path):
    from torchvision.datasets import ImageFolder

    fill(tmp_path / "train", ["b", "A", "a10", "a2"], 12)
    fill(tmp_path / "train" / "b", ["deep", "Deeper"])
    table, theirs = FolderSource(tmp_path).table("train"), ImageFolder(str(tmp_path / "train"))
    assert table is not None
    assert [(str(path), int(label)) for path, label in zip(table.paths, table.labels, strict=True)] == theirs.samples


def test_numbered_classes_are_sorted_as_numbers(tmp_path):
    assert FolderSource(fill(tmp_path, ["0", "1", "2", "10"])).classes() == ("0", "1", "2", "10")


def test_folders_by_other_names(tmp_path):
    for part in ("fit", "held"):
        fill(tmp_path, ["a", "b"], 2, part)
    source = FolderSource(tmp_path, {"train": "fit", "test": "held"})
    assert source.table("test") is not None and source.table("val") is None
    with pytest.raises(UserError, match=r"no test part called 'tested'. It has: fit, held"):
        FolderSource(tmp_path, {"train": "fit", "test": "tested"}).table("test")


def test_a_part_can_be_left_alone(tmp_path):
    for part in ("train", "val", "test"):
        fill(tmp_path, ["a", "b"], 2, part)
    assert FolderSource(tmp_path, {"val": False}).table("val") is None


def test_empty_and_missing_folders_are_errors(tmp_path):
    fill(tmp_path / "data", ["a", "b"])
    (tmp_path / "data" / "c").mkdir()
    (tmp_path / "data" / "c" / "notes.txt").write_text("no image")
    with pytest.raises(UserError, match="no image in the class folder c"):
        FolderSource(tmp_path / "data").classes()
    (tmp_path / "hollow" / "train" / "a").mkdir(parents=True)
    (tmp_path / "hollow" / "train" / "b").mkdir()
    with pytest.raises(UserError, match="no image in the class folder a, b"):
        FolderSource(tmp_path / "hollow").classes()
    with pytest.raises(UserError, match=r"Cannot read .*nothing"):
        FolderSource(tmp_path / "nothing").classes()
    with pytest.raises(UserError, match="has no class folders"):
        FolderSource(tmp_path / "data" / "a").classes()


@pytest.mark.parametrize(("labels", "names", "want"), [
    ([2, 0, 1], ["x", "y", "z"], [2, 0, 1]), ([True, False, True], None, [1, 0, 1]),
    (["owl", "fox", "owl"], None, [1, 0, 1]), ([5, 0, 3], None, [5, 0, 3]),
])  # fmt: skip
def test_labels_of_every_kind(tmp_path, labels, names, want):
    path = parquet(tmp_path / "a.parquet", [png(0), png(1), png(2)], labels, names)
    source = RowSource(parquet=path)
    table = source.table("train")
    assert table is not None and table.labels.tolist() == want
    assert source.classes() == (tuple(names) if names else ("fox", "owl") if labels[0] == "owl" else None)
    assert [each.content for each in table.read([2, 0])] == [png(2), png(0)] and source.table("test") is None


def test_plain_bytes_and_other_columns(tmp_path):
    path = parquet(tmp_path / "a.parquet", [png(7)], [3], columns=("jpg", "cls"), kind="bytes")
    table = RowSource(parquet=path, image="jpg", label="cls").table("train")
    assert table is not None and table.read([0])[0].content == png(7)
    with pytest.raises(UserError, match="no column 'image', only jpg, cls"):
        RowSource(parquet=path).table("train")


def test_splits_of_parquet_files(tmp_path):
    for index in range(2):
        parquet(tmp_path / f"train-{index}.parquet", [png(index)], [index])
    test = parquet(tmp_path / "test.parquet", [png(8)], [1])
    for given in (str(tmp_path), {"train": str(tmp_path / "train-*.parquet"), "test": test}):
        source = RowSource(parquet=given)
        tables = [source.table(part) for part in ("train", "val", "test")]
        assert [None if each is None else len(each.labels) for each in tables] == [2, None, 1]
    with pytest.raises(UserError, match=r"no parquet files at .*none.parquet"):
        RowSource(parquet=str(tmp_path / "none.parquet")).table("train")


def test_a_label_that_train_lacks_is_an_error(tmp_path):
    given = {part: parquet(tmp_path / part, [png(0)], [name]) for part, name in (("train", "fox"), ("test", "owl"))}
    with pytest.raises(UserError, match="a label that is no class: 'owl'"):
        RowSource(parquet=given).table("test")


def test_exactly_one_place():
    with pytest.raises(UserError, match="says folder and hub of"):
        open_source("birds", {"folder": "a", "hub": "b/c"})
    with pytest.raises(UserError, match="says none of"):
        open_source("birds", {})


@pytest.mark.parametrize(("name", "split"), [
    ("svhn-train.arrow", "train"), ("rendered-sst2-test.arrow", "test"), ("x-train-00001-of-00003.arrow", "train"),
    ("cache-abcdefab.arrow", None), ("a-big_split.arrow", "big_split"),
])  # fmt: skip
def test_names_of_prepared_files(name, split):
    match = ARROW.search(name)
    assert (match[1] if match else None) == split


ASK = """
from merging.errors import UserError
from tasks.vision.rows import RowSource
for name in ("owner/numbers", "owner/letters"):
    try:
        for part in ("train", "val", "test"):
            table = RowSource(hub=name, args=("digits",)).table(part)
            found = table and (table.labels.tolist(), [each.content[:4] for each in table.read([1])])
            print(part, found)
    except UserError as error:
        print(error)
"""
FOUND = ["train ([0, 1, 2], [b'\\x89PNG'])", "val None", "test ([2, 1], [b'\\x89PNG'])"]


@pytest.fixture
def hub(tmp_path):
    """A data set with a third split that nobody asks for."""
    files = {
        f"digits/{split}-00000-of-00001.parquet": Path(
            parquet(tmp_path / f"{split}.parquet", [png(label) for label in labels], labels, ["a", "b", "c"])
        )
        for split, labels in (("train", [0, 1, 2]), ("test", [2, 1]), ("extra", [0] * 50))
    }
    told = "".join(f"  - split: {each}\n    path: digits/{each}-*\n" for each in ("train", "test", "extra"))
    files["README.md"] = f"---\nconfigs:\n- config_name: digits\n  data_files:\n{told}---\n".encode()
    with Hub(tmp_path / "hub") as hub:
        hub.add("owner/numbers", files, kind="datasets")
        yield hub


IDS = """
import sys
from merging.cache import Cache
from tasks.vision.parts import Rule
from tasks.vision.rows import RowSource
for folder in sys.argv[2:]:
    source = RowSource(hub="owner/numbers", args=("digits",), cache=Cache(folder))
    print(source.content("test", Rule(), ask=False))
    print(source.content("test", Rule()))
    if sys.argv[1] == "load":
        source.table("test")
"""


def ask(hub, cache, offline, code=ASK, *arguments):
    """What a process finds that sees this hub only."""
    environment = os.environ | hub.env(cache) | {"HF_HUB_OFFLINE": offline, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], env=environment, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_the_hub_gives_the_splits_that_are_asked_for_and_no_other(hub, tmp_path):
    """Then the same without a network. What is not there is said in one paragraph."""
    hub.fault("train-00000-of-00001.parquet", Fault(status=503, times=1, methods=("GET",)))
    *found, missing = ask(hub, tmp_path / "cache", "0")
    assert found == FOUND and missing.startswith("Cannot load the data set owner/letters digits")
    assert {Path(path).name[:4] for path in hub.asked("GET", "/cdn/")} == {"trai", "test"}
    hub.requests.clear()
    *found, missing = ask(hub, tmp_path / "cache", "1")
    assert found == FOUND and missing.startswith("HF_HUB_OFFLINE is set and owner/letters digits is not in the")
    assert not hub.requests


def test_the_hub_is_known_by_the_commit_that_was_read_first(hub, tmp_path):
    """Also without a network; another cache takes the commit of today."""
    kept, fresh = str(tmp_path / "kept"), str(tmp_path / "fresh")
    unknown, first = ask(hub, tmp_path / "cache", "0", IDS, "load", kept)
    assert unknown == "None" and commit(tmp_path / "hub" / "datasets" / "owner" / "numbers") in first
    assert ask(hub, tmp_path / "cache", "1", IDS, "load", kept, str(tmp_path / "other")) == [
        first,
        first,
        "None",
        first,
    ]
    hub.add("owner/numbers", {"digits/new.txt": b"more"}, kind="datasets")
    known, same, unknown, now = ask(hub, tmp_path / "cache", "0", IDS, "ask", kept, fresh)
    assert known == same == first and unknown == "None" and now != first
