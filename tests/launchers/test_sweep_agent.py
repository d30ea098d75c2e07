"""The real clients of W&B, `wandb sweep` and `wandb agent`, run an experiment against a server on this machine."""

import os
import subprocess
import sys
from pathlib import Path

import console
import pytest
import wandb
import yaml
from conftest import by_method
from wandb_server import Server

from launchers.sweeps import __main__ as command

BIN = Path(sys.executable).parent


def client(*command, cwd, environment):
    """What the command printed. A busy machine is waited for; W&B's own service of this process is not shared."""
    env = os.environ | environment | {"PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}
    env.pop("WANDB_SERVICE", None)
    done = subprocess.run(command, cwd=cwd, env=env, stdout=-1, stderr=subprocess.STDOUT, text=True, timeout=600)
    assert done.returncode == 0, done.stdout
    return done.stdout


def test_agents_run_the_experiment_and_the_server_has_the_numbers_of_the_rows(output, tmp_path, monkeypatch, capsys):
    tiny = [override for override in console.TINY if not override.startswith("scale=")]
    overrides = ["experiment=coefficient", *tiny, f"output={output}", "method=ties,tsv_m", "method.scale=0.3", "seed=0",
                 "engine.device=cpu"]  # fmt: skip
    monkeypatch.chdir(tmp_path)
    wandb.teardown()  # its client reads the environment once
    with Server() as server:
        for key, value in server.environment.items():
            monkeypatch.setenv(key, value)
        command.main(["wandb", "--file", "sweep.yaml", "--register", *overrides])
        assert "wandb agent duet-merging/sweep0" in capsys.readouterr().out
        assert server.sweeps["sweep0"]["config"] == yaml.safe_load((tmp_path / "sweep.yaml").read_text())

        client("wandb", "sweep", "sweep.yaml", cwd=tmp_path, environment=server.environment)
        assert server.sweeps["sweep1"]["text"] == server.sweeps["sweep0"]["text"]
        printed = client("wandb", "agent", "me/duet-merging/sweep1", cwd=tmp_path, environment=server.environment)
    wandb.teardown()
    assert not server.unknown and server.sweeps["sweep1"]["left"] == []

    rows = by_method(output)
    # agents of W&B end well whatever became of the runs
    assert set(rows) == {"base", "ties", "tsv_m", "expert"}, printed
    assert set(server.runs) == {"run1", "run2"}  # as the agent named them
    runs = {run["config"]["row"]["value"]["method"]: run for run in server.runs.values()}
    assert set(runs) == {"ties", "tsv_m"}
    for method, run in runs.items():
        row, experts = rows[method], rows["expert"]
        assert run["exit"] == 0 and run["sweep"] == "sweep1" and run["groupName"] == "coefficient"
        assert {task: run["history"][f"accuracy/{task}"] for task in row.tasks} == row.accuracy
        norm = sum(row.accuracy[task] / experts.accuracy[task] for task in row.tasks) / len(row.tasks)
        assert run["history"]["accuracy/norm"] == pytest.approx(norm, abs=1e-3)
