"""Published tasks from miniature copies with the Hub's own names, columns, splits and formats."""

import io
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from hub import Hub
from PIL import Image

ROOT = Path(__file__).parents[2]
COPIES = {  # repository: folder in it (None: tar files), split -> labels; as the Hub has them
    "ufldl-stanford/svhn": ("cropped_digits", {"train": [*range(10)] * 3, "test": [3, 1, 9], "extra": [0] * 9}),
    "1aurent/PatchCamelyon": ("data", {"train": [True, False] * 15, "valid": [True], "test": [False, True]}),
    "ethz/food101": ("data", {"train": [*range(101)], "validation": [100, 7, 0]}),
    "clip-benchmark/wds_fer2013": (None, {"train": [*range(7)] * 3, "test": [6, 2]}),
}
NAMES = {"ufldl-stanford/svhn": [str(digit) for digit in range(10)]}
ASK = """
import json, sys
from tasks.vision.suite import build
from tasks.vision.data import Store
tasks = ["SVHN", "PCAM", "Food101", "FER2013"]
suite = build("some", tasks, Store(sys.argv[1] + "/images", sys.argv[1] + "/heads"), "clip_vit_b32", size=8)
sizes = lambda task: {name: len(task.split(name)) for name in ("train", "val", "calibration", "test")}
print(json.dumps({task.name: (sizes(task), task.split("test").labels.tolist(), task.split("test").id)
                  for task in suite.tasks}))
"""


def jpeg(shade):
    file = io.BytesIO()
    Image.new("RGB", (12, 9), (shade, 50, 50)).save(file, "JPEG")
    return file.getvalue()


def tar(labels):
    """A shard of a webdataset: <key>.jpg beside <key>.cls."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as shard:
        for index, label in enumerate(labels):
            for ending, content in (("cls", str(label).encode()), ("jpg", jpeg(label))):
                member = tarfile.TarInfo(f"s{index:07}.{ending}")
                member.size = len(content)
                shard.addfile(member, io.BytesIO(content))
    return file.getvalue()


def rows(path, labels, names):
    """A parquet file as the Hub's own tools write it."""
    from datasets import ClassLabel, Dataset, Features, Value
    from datasets import Image as Column

    label = ClassLabel(names=names) if names else Value("bool" if isinstance(labels[0], bool) else "int64")
    images = [{"bytes": jpeg(int(each)), "path": "x.jpg"} for each in labels]
    cells = {"image": images, "label": labels}
    Dataset.from_dict(cells, features=Features({"image": Column(), "label": label})).to_parquet(str(path))
    return path


@pytest.fixture
def hub(tmp_path):
    with Hub(tmp_path / "hub") as hub:
        for repo, (folder, splits) in COPIES.items():
            for split, labels in splits.items():
                if folder is None:
                    files = {f"{split}/0.tar": tar(labels)}
                else:
                    files = {f"{folder}/{split}-00000-of-00001.parquet": rows(tmp_path / "x", labels, NAMES.get(repo))}
                hub.add(repo, files, kind="datasets")
        told = "".join(f"  - split: {s}\n    path: cropped_digits/{s}-*\n" for s in COPIES["ufldl-stanford/svhn"][1])
        readme = f"---\nconfigs:\n- config_name: cropped_digits\n  data_files:\n{told}---\n"
        hub.add("ufldl-stanford/svhn", {"README.md": readme.encode()}, kind="datasets")
        yield hub


def ask(hub, tmp_path, output, offline="0"):
    environment = os.environ | hub.env(tmp_path / "cache") | {"HF_HUB_OFFLINE": offline, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", ASK, str(tmp_path / output)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_published_copies_become_tasks(hub, tmp_path):
    """Booleans, a webdataset, a test split called validation, unneeded splits; then again without a network."""
    found = ask(hub, tmp_path, "first")
    assert {name: labels for name, (_, labels, _) in found.items()} == {
        "SVHN": [3, 1, 9], "PCAM": [0, 1], "Food101": [100, 7, 0], "FER2013": [6, 2],
    }  # fmt: skip
    assert found["SVHN"][0] == {"train": 27, "val": 3, "calibration": 27, "test": 3}
    assert found["PCAM"][0] == {"train": 27, "val": 3, "calibration": 27, "test": 2}
    assert found["Food101"][0] == {"train": 91, "val": 10, "calibration": 91, "test": 3}
    assert not [path for path in hub.asked("GET", "/cdn/") if "extra" in path or "valid-" in path]

    hub.requests.clear()
    assert ask(hub, tmp_path, "second", offline="1") == found and not hub.requests
