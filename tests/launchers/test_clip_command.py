"""The command for the published benchmark, against a hub with small copies of everything that it fetches."""

import io
import os
import subprocess

import console
import pytest
from clips import BLOCKS, EMBED, SUFFIXES, WIDTH, base_repository, tuned, vision_repository, whole
from hub import Hub
from PIL import Image

from launchers import rows
from tasks.vision.dataset_registry import facts

EIGHT = ["SUN397", "Cars", "RESISC45", "EuroSAT", "SVHN", "GTSRB", "MNIST", "DTD"]
TOWER = f"{{layers: {BLOCKS}, width: {WIDTH}, head_width: 64, patch_size: 32, image_size: 224}}".replace(" ", "")
COMMAND = [
    str(console.DUET), "backbone=clip_vit_b32", "experts=hub_a", "suite=clip8", "method=duet",
    f"backbone.embed_dim={EMBED}", f"backbone.vision_cfg={TOWER}",  # as small as the copies on this hub
    "suite.limit=20", "router.train.steps=5",
]  # fmt: skip


def png(index):
    file = io.BytesIO()
    Image.new("RGB", (32, 32), (index % 256, 7 * index % 256, 255 - index % 256)).save(file, "PNG")
    return file.getvalue()


def rows_file(path, count, classes):
    from datasets import ClassLabel, Dataset, Features
    from datasets import Image as Column

    images = [{"bytes": png(index), "path": None} for index in range(count)]
    cells = {"image": images, "label": [index % classes for index in range(count)]}
    features = Features({"image": Column(), "label": ClassLabel(num_classes=classes)})
    Dataset.from_dict(cells, features=features).to_parquet(str(path))
    return path


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    folder, base = tmp_path_factory.mktemp("hub"), whole()
    with Hub(folder / "served") as hub:
        hub.add("openai/clip-vit-base-patch32", base_repository(base, safetensors=False))
        for seed, task in enumerate(EIGHT):
            hub.add(f"tanganke/clip-vit-base-patch32_{SUFFIXES[task]}", vision_repository(tuned(base, seed, False)))
            said = facts(task, "fusion_bench")
            where = (said.hub.get("args") or ["data"])[0]
            train, test = (rows_file(folder / f"{task}{n}", n, len(said.classes)) for n in (420, 25))
            files = {f"{where}/train-00000-of-00001.parquet": train, f"{where}/test-00000-of-00001.parquet": test}
            if where != "data":
                told = "".join(f"  - split: {part}\n    path: {where}/{part}-*\n" for part in ("train", "test"))
                files["README.md"] = f"---\nconfigs:\n- config_name: {where}\n  data_files:\n{told}---\n".encode()
            hub.add(said.hub["id"], files, kind="datasets")
        yield hub


def run(hub, tmp_path, *overrides, **environment):
    command = [*COMMAND, f"output={tmp_path / 'outputs'}", *overrides]
    seen = os.environ | hub.env(tmp_path / "cache") | environment
    return subprocess.run(command, env=seen, cwd=tmp_path, capture_output=True, text=True, timeout=300)


def test_the_published_benchmark_from_nothing(hub, tmp_path):
    done = run(hub, tmp_path)
    assert done.returncode == 0, done.stderr
    found = {row.method: row for row in rows.read(tmp_path / "outputs" / "results")}
    assert set(found) == {"base", "expert", "duet"}
    for row in found.values():
        assert row.status == "ok" and row.tasks == EIGHT and row.family == "hub_a" and row.suite == "clip8"
        assert {split["size"] for split in row.splits.values()} == {20}
        assert len(set(row.checkpoints.values())) == 9
    assert found["duet"].routing["accuracy"].keys() == {*EIGHT} and found["duet"].adaptation == "calibration"

    said = done.stderr
    assert "to download: 9 files" in said and "to decode, once: " in said and "one model takes about" in said
    assert "HTTP Request" not in said
    assert "SUN397" in done.stdout and "expert" in done.stdout

    hub.requests.clear()
    offline = run(hub, tmp_path, "method=tsv_m", "scale.scales=[0.5,1.0]", "scale.criterion=mean", HF_HUB_OFFLINE="1")
    assert offline.returncode == 0 and not hub.requests, offline.stderr
    assert "to download" not in offline.stderr and "to decode, once: 160 images" in offline.stderr  # of validation
    assert "base: mean score" not in offline.stderr  # its row too


def test_nothing_is_left_of_what_a_hub_does_not_have(hub, tmp_path):
    done = run(hub, tmp_path, "backbone=clip_vit_b16")
    assert done.returncode == 1 and "clip-vit-base-patch16" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "outputs" / "results").exists() or not rows.read(tmp_path / "outputs" / "results")
