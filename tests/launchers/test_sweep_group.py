"""The runs of a sweep have one group."""

import sys

import console
import hydra
import pytest
from conftest import by_method
from hydra.core.hydra_config import HydraConfig
from wandb_file import artifacts, group

from launchers.sweeps.axes import group_of


@pytest.fixture
def groups(tmp_path, monkeypatch):
    """The groups of the jobs that Hydra makes of a command line; the sweep's own folder is another one each time."""
    started = iter(range(9))
    (tmp_path / "config.yaml").write_text("{method: ties, seed: 0, density: 1, cache_gb: 1, engine: {device: auto}}")

    def call(*arguments, folder_of_config=None):
        names = []

        @hydra.main(config_path=folder_of_config or str(tmp_path), config_name="config", version_base="1.3")
        def job(_):
            names.append(group_of(HydraConfig.get()))

        folder = tmp_path / f"started{next(started)}"
        folders = [f"hydra.sweep.dir={folder}", f"hydra.run.dir={folder}"]
        monkeypatch.setattr(sys, "argv", ["duet", *arguments, *folders])
        with console.logging_kept():
            job()
        return names

    return call


def test_an_experiment_is_its_own_group(groups):
    granular = ["experiment=granularity", "seed=0", "~hydra.callbacks.report"]
    gates = "router.gate.granularity=sample,token"
    assert groups(*granular, gates, folder_of_config="pkg://conf") == ["granularity"] * 2
    assert groups(*granular, "hydra.mode=RUN", folder_of_config="pkg://conf") == ["granularity"]


def test_a_bare_sweep_is_named_by_its_folder(groups):
    assert groups("-m", "seed=0", "method=ties,tsv_m") == ["started0"] * 2
    assert groups("seed=1") == [None]


def test_the_run_of_a_sweep_is_told_its_group_and_stores_its_model(output, duet_here):
    overrides = ["-m", "experiment=coefficient", "method=ties", "method.scale=1.0", "seed=0"]
    status, _, errors = duet_here(output, *overrides, "tracker=wandb", "tracker.model=true")
    assert status == 0, errors
    run_id, folder = by_method(output)["ties"].run_id, output / "runs"
    (model,) = [artifact for artifact in artifacts(folder, run_id) if artifact.type == "model"]
    file = folder / "wandb" / "models" / f"{run_id}.safetensors"
    assert group(folder, run_id) == "coefficient" and model.manifest.contents[0].size == file.stat().st_size > 0
