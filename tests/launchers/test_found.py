"""What the names of rows are remembered under changes with every file that they come from."""

import os
from types import SimpleNamespace

import pytest
from omegaconf import OmegaConf

from launchers.found import is_local, state
from tasks.vision.data import Store
from tasks.vision.suite import build


@pytest.fixture
def files(tmp_path):
    """A configuration that names files in every way there is, and one file of each."""
    named = {
        "base": "base.safetensors",
        "template": "checkpoints/{task}.safetensors",
        "folder": "pictures",
        "pattern": "tables/test-*.parquet",
    }
    made = ["base.safetensors", "checkpoints/pets.safetensors", "pictures/train/cat/1.jpg", "tables/test-0.parquet"]
    for name in made:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("one")
    config = OmegaConf.create({
        "experts": {"_target_": "tasks.vision.folder.Folder", "base": str(tmp_path / named["base"]),
                    "experts": str(tmp_path / named["template"])},
        "suite": {"_target_": "tasks.vision.suite.build", "store": {"images": str(tmp_path / "decoded")},
                  "sources": {"pets": {"folder": str(tmp_path / named["folder"])},
                              "cars": {"parquet": {"test": [str(tmp_path / named["pattern"])]}}}},
        "output": str(tmp_path / "outputs"),
    })  # fmt: skip
    return SimpleNamespace(config=config, made=[tmp_path / name for name in made], folder=tmp_path)


@pytest.mark.parametrize("which", range(4))
def test_a_file_that_changes(files, which):
    before = state(files.config)
    assert state(files.config) == before
    path = files.made[which]
    stat = path.stat()
    path.write_text("two")
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert state(files.config) != before


def test_a_file_of_the_same_time_and_size_under_the_same_name(files):
    before, path = state(files.config), files.made[0]
    stat = path.stat()
    path.with_name("other").write_text("two")
    os.utime(path.with_name("other"), ns=(stat.st_atime_ns, stat.st_mtime_ns))
    path.with_name("other").rename(path)
    assert state(files.config) != before


def test_a_file_more_also_behind_a_link(files):
    pictures, away = files.folder / "pictures", files.folder / "away"
    away.mkdir()
    (pictures / "train" / "dog").symlink_to(away)
    (pictures / "train" / "round").symlink_to(pictures)  # is not walked for ever
    before = state(files.config)
    (away / "2.jpg").write_text("one")
    after = state(files.config)
    assert after != before
    (files.folder / "checkpoints" / "cars.safetensors").write_text("one")
    assert state(files.config) != after


def test_a_file_that_an_index_names(files):
    index = files.folder / "parts" / "model.safetensors.index.json"
    index.parent.mkdir()
    index.write_text("{}")
    files.config.experts.base = str(index)
    before = state(files.config)
    index.with_name("model-00001-of-00002.safetensors").write_text("one")
    assert state(files.config) != before


def test_a_template_with_the_characters_of_a_pattern(files):
    expert = files.folder / "run[1]" / "pets.safetensors"
    expert.parent.mkdir()
    expert.write_text("one")
    files.config.experts.experts = str(expert.parent / "{task}.safetensors")
    before = state(files.config)
    expert.write_text("another")
    assert state(files.config) != before


def test_what_a_run_writes_changes_nothing(files):
    before = state(files.config)
    for name in ("outputs/results/row.json", "decoded/pets.pt", "other.txt"):
        (files.folder / name).parent.mkdir(parents=True, exist_ok=True)
        (files.folder / name).write_text("one")
    assert state(files.config) == before


def test_code_from_outside_is_not_followed(files):
    files.config.method = {"_target_": "my_package.Median"}
    assert state(files.config) is None


def test_what_may_come_from_the_hub_is_not_remembered(tmp_path):
    def suite(text, **source):
        return build("mine", None, Store(str(tmp_path), str(tmp_path)), text, sources={"pets": source})

    text, near, far = tmp_path / "clip.safetensors", {"folder": str(tmp_path)}, {"hub": "user/pets"}
    text.write_text("")
    nothing, hub = (SimpleNamespace(downloads=lambda suite, backbone, files=files: files) for files in ([], ["a file"]))
    assert is_local(suite(str(text), **near), SimpleNamespace(), None)
    assert is_local(SimpleNamespace(every=[SimpleNamespace(name="cars")]), nothing, None)
    assert not is_local(suite(str(text), **near), hub, None)
    assert not is_local(suite(str(text), **far), SimpleNamespace(), None)
    assert not is_local(suite("clip_vit_b32", **near), SimpleNamespace(), None)
    assert not is_local(suite({"repo": "user/clip"}, **near), SimpleNamespace(), None)
