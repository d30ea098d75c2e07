"""Fixtures of the tests of launchers/."""

import json
import os
import shutil
import sys
from types import SimpleNamespace

import console
import pytest
from console import by_method
from filelock import FileLock

from launchers import job, run

WANDB = ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL", "WANDB_IDENTITY_TOKEN_FILE")


@pytest.fixture(autouse=True)
def nobody_is_logged_in(monkeypatch, tmp_path):
    for key in WANDB:
        monkeypatch.delenv(key, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))


@pytest.fixture(scope="session")
def first_run(tmp_path_factory):
    """The first run of all, which trains the experts: what it printed, its output folder and rows by method.

    One of the processes that share the tests makes it, and all work on copies.
    """
    shared, output = tmp_path_factory.getbasetemp(), tmp_path_factory.mktemp("first") / "outputs"
    shared = shared.parent if "PYTEST_XDIST_WORKER" in os.environ else shared
    made, printed = shared / "first_of_all", shared / "first_of_all.json"
    with FileLock(shared / "first_of_all.lock"):
        if not printed.exists():
            made.mkdir()
            process = console.duet(made / "outputs", "scale=search", "scale.scales=[0.3,1.0]")
            assert process.returncode == 0, process.stderr
            printed.write_text(json.dumps({"stdout": process.stdout, "stderr": process.stderr}))
    shutil.copytree(made, output.parent, dirs_exist_ok=True)
    process = SimpleNamespace(**json.loads(printed.read_text()))
    return SimpleNamespace(process=process, output=output, rows=by_method(output))


@pytest.fixture
def output(first_run, tmp_path):
    """An output folder without rows that shares the cache of the first run."""
    folder = tmp_path / "outputs"
    folder.mkdir()
    os.symlink(first_run.output / ".cache", folder / ".cache")
    return folder


@pytest.fixture
def duet_here(monkeypatch, capsys, tmp_path):
    """Runs `duet` in this process: (exit status, stdout, stderr)."""

    def call(output, *arguments):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", console.command(output, *arguments))
        monkeypatch.setattr(job, "_SETUPS", {})
        with console.logging_kept(), pytest.raises(SystemExit) as stop:
            run.main()
        page, errors = capsys.readouterr()
        if isinstance(stop.value.code, str):  # the interpreter prints it and exits with 1
            return 1, page, errors + stop.value.code
        return stop.value.code or 0, page, errors

    return call
