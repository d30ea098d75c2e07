"""A row is found again while the content that decides its numbers is the same, wherever it lies, and no longer."""

import shutil

import console
import pytest
from clips import BLOCKS, EMBED, WIDTH, tuned, whole
from PIL import Image
from safetensors.torch import save_file

from launchers import rows

TOWER = f"{{layers: {BLOCKS}, width: {WIDTH}, head_width: 64, patch_size: 32, image_size: 64}}".replace(" ", "")


@pytest.fixture
def data(tmp_path, monkeypatch):
    """Two tasks of class folders, a CLIP and an expert for each, all beside the outputs."""
    state = whole(1, 32, 64)
    save_file(state, tmp_path / "clip.safetensors")
    save_file(state, tmp_path / "text.safetensors")
    for seed, task in enumerate(("pets", "fruit")):
        save_file(tuned(state, seed), tmp_path / f"{task}.safetensors")
        for part in ("train", "test"):
            for index in range(12):
                photo(tmp_path / task / part / "ab"[index % 2], index)
    monkeypatch.setattr(console, "TINY", [
        "suite=folder", "backbone=clip_vit_b32", f"backbone.embed_dim={EMBED}", f"backbone.vision_cfg={TOWER}",
        "experts=folder", "experts.base=clip.safetensors", "experts.experts='{task}.safetensors'", "scale=fixed",
        "suite.text=text.safetensors", "suite.sources.pets.folder=pets", "+suite.sources.fruit.folder=fruit",
    ])  # fmt: skip
    return tmp_path


def photo(folder, shade):
    folder.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), (20 * shade, 99, 255 - 20 * shade)).save(folder / f"{shade}.png")


@pytest.fixture
def computed(data, duet_here):
    """Runs `duet method=average` and tells which rows were computed rather than found."""

    def call(*arguments):
        before = (
            {row.run_id: row.created for row in rows.read(data / "out" / "results")} if (data / "out").exists() else {}
        )
        code, _, errors = duet_here(data / "out", "method=average", *arguments)
        assert code == 0, errors
        return {row.method for row in rows.read(data / "out" / "results") if row.run_id not in before}

    return call


ALL = {"base", "average", "expert"}


def test_rows_follow_the_images_and_heads(data, computed):
    assert computed() == ALL and computed() == set()
    photo(data / "pets" / "test" / "a", 13)
    assert computed() == ALL and computed() == set()  # the same call: no redo is needed, also for base and experts
    sizes = {row.splits["pets"]["size"] for row in rows.read(data / "out" / "results")}
    assert sizes == {12, 13}
    for part in ("train", "test"):
        photo(data / "fruit" / part / "c", 3)
    assert computed("redo=true") == ALL
    save_file(whole(2, 32, 64), data / "text.safetensors")
    assert computed() == ALL and computed() == set()


def test_rows_do_not_depend_on_where_things_lie(data, computed):
    assert computed() == ALL
    for name in ("pets", "clip.safetensors", "text.safetensors", "fruit.safetensors"):
        shutil.move(data / name, data / f"moved_{name}")
    moved = ["experts.base=moved_clip.safetensors", "suite.text=moved_text.safetensors", "experts.multitask=moved.pt",
             "+experts.paths.fruit=moved_fruit.safetensors", "suite.sources.pets.folder=moved_pets"]  # fmt: skip
    assert computed(*moved) == set()
    (row,) = [row for row in rows.read(data / "out" / "results") if row.method == "average"]
    assert row.overrides is not None and "method=average" in row.overrides


def test_what_is_not_read_does_not_count(data, computed):
    """A training image changes validation and calibration, which a merge at a fixed scale does not look at."""
    assert computed() == ALL
    photo(data / "pets" / "train" / "a", 13)
    assert computed() == set()
    searching = ["method=task_arithmetic", "scale=search", "scale.scales=[0.3]", "scale.criterion=mean"]
    assert computed(*searching) == {"task_arithmetic"} and computed(*searching) == set()
    photo(data / "pets" / "train" / "b", 14)
    assert computed(*searching) == {"task_arithmetic"}


def test_a_row_says_how_its_images_were_read(data, computed):
    (data / "pets" / "test").rename(data / "pets" / "Testing")
    (data / "pets" / "train" / "a" / "notes.txt").write_text("beside")
    shutil.rmtree(data / "fruit" / "test" / "b")
    assert computed() == ALL
    for row in rows.read(data / "out" / "results"):
        assert row.remarks == [
            "pets: read train=train (12 images, 2 classes), test=Testing (12 images, 2 classes).",
            "pets: skipped 1 no image (notes.txt).",
            "fruit: test has no sample of 1 of 2 classes (b).",
        ]  # fmt: skip
        assert row.contents["pets"].keys() == {"head", "test"}


@pytest.mark.parametrize("which", ["text.safetensors", "all.safetensors"])
def test_a_file_that_is_named_and_not_merged_is_not_overwritten(data, duet_here, which):
    shutil.copy(data / "pets.safetensors", data / "all.safetensors")
    before = (data / which).read_bytes()
    code, _, errors = duet_here(
        data / "out", "method=average", "experts.multitask=all.safetensors", f"save={data / which}"
    )
    assert code == 1 and f"{which} is one of the inputs" in errors and (data / which).read_bytes() == before
