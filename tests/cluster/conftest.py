"""Fixtures of the tests on a cluster."""

import contextlib
import importlib.util
import os
import shutil
import tempfile

import pytest
from sweeps import PRESET, SETTING, Cluster, started


@pytest.fixture(scope="session")
def cluster():
    """Started where root can start one and the plugin is installed, else a skip that says what is missing."""
    if importlib.util.find_spec("hydra_plugins.hydra_submitit_launcher") is None:
        pytest.skip("needs pip install -e '.[slurm]'")
    with tempfile.TemporaryDirectory(prefix="slurm") as folder, pytest.MonkeyPatch.context() as patch:
        found = Cluster(folder)
        found.script("up")
        patch.setenv("SLURM_CONF", f"{folder}/slurm.conf")
        for key, value in {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}.items():
            patch.setenv(key, value)  # jobs inherit them
        yield found
        found.script("down")


@pytest.fixture(scope="session")
def ready(tmp_path_factory):
    """An output folder with the experts and what scores them, beside one of a sweep that nothing disturbed."""
    folder = tmp_path_factory.mktemp("ready")
    for name, methods in {"experts": "base", "quiet": "ties,wemoe,duet"}.items():
        output = folder / name
        if name == "quiet":
            linked(folder / "experts", output)
        with started(output, "-m", f"method={methods}", *SETTING) as command:
            assert command.wait() == 0, command.stderr
    return folder


def linked(source, target):
    """A folder of its own with the same files, which are only ever replaced."""
    for part in ("results", ".cache"):
        shutil.copytree(source / part, target / part, copy_function=os.link)


@pytest.fixture
def sweep(cluster, ready, tmp_path):
    """Sends a sweep to the cluster that finds the experts and what scores them, and nothing else."""
    output = tmp_path / "outputs"
    linked(ready / "experts", output)
    with contextlib.ExitStack() as stack:
        yield lambda *arguments: stack.enter_context(started(output, *PRESET, *SETTING, *arguments))
    cluster.told("scancel", "-u", "root")
