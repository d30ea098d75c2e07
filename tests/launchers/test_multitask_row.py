"""The reference row of one model for all tasks: made by mini8, read from a folder, refused by published families."""

import pytest
from console import by_method
from test_finetune_command import finetune_here  # noqa: F401  # a fixture

from launchers.job import multitask_of
from launchers.results.frame import summarise
from merging.backbones.open_clip import OpenClip
from merging.checkpoints import SafetensorsFile
from merging.errors import UserError
from tasks.mini.model import BASE, TOWER
from tasks.mini.suite import build
from tasks.vision.families import HubFamily
from tasks.vision.folder import Folder

BACKBONE = OpenClip("mini_clip", **TOWER, mean=(0.5,) * 3, std=(0.5,) * 3)  # type: ignore[arg-type]


def suite(*names, **more):
    return build("mini8", names, {"train": 64, "val": 20, "calibration": 8, "test": 40}, **more)


def test_mini8_trains_it(output, duet_here):
    status, table, errors = duet_here(output, "method=multitask", "scale=search")
    assert status == 0, errors
    found = by_method(output)
    row, base = found["multitask"], found["base"]
    assert row.needs == "labels" and row.opened == {"train": ["method=multitask with labels"]} and row.router == "none"
    assert row.stored_bytes == base.stored_bytes and row.macs == base.macs and row.scale is None
    assert {name: row.checkpoints[name] for name in base.checkpoints} == base.checkpoints
    assert row.checkpoints["multitask"] not in base.checkpoints.values()
    (summary,) = summarise(found.values())
    assert list(summary.lines["kind"]) == ["base", "multitask", "expert"] and summary.lines["norm"][2] > 0
    said = " ".join(table.split())
    assert "trained on the labelled train samples of all tasks together: multitask" in said and "unlabelled" not in said

    _, _, errors = duet_here(output, "method=multitask", "scale=fixed", "router=oracle")
    assert "multitask: found" in errors


def test_a_folder_reads_what_finetune_made(finetune_here, tmp_path, cache):  # noqa: F811
    status, page, errors = finetune_here("folder=own", "multitask=true")
    assert status == 0, errors
    assert "own/multitask.safetensors" in page and not (tmp_path / "own" / "cars.safetensors").exists()

    own = Folder(str(BASE), "own/{task}.safetensors", multitask="own/multitask.safetensors")
    found = multitask_of(own, suite("cars", "digits"), BACKBONE, cache)
    file = SafetensorsFile(tmp_path / "own" / "multitask.safetensors")
    assert all(found.tensor(key).equal(file.tensor(key)) for key in file.specs())
    for others in (suite("cars"), suite("cars", "signs"), suite("cars", "digits", held_out=["digits"])):
        with pytest.raises(UserError, match="was trained on cars, digits, and the merged tasks are cars"):
            multitask_of(own, others, BACKBONE, cache)
    with pytest.raises(UserError, match=r"There is no own/other\.pt, the model trained on all tasks together"):
        multitask_of(Folder(str(BASE), multitask="own/other.pt"), suite("cars"), BACKBONE, cache)


def test_published_families_have_none(cache):
    with pytest.raises(UserError, match="the family hub_a has only experts of one task each"):
        multitask_of(HubFamily("hub_a"), suite("cars"), BACKBONE, cache)
