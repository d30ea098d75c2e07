"""What was logged to W&B is read back from the run's own file, byte by byte."""

import base64
import hashlib
import json
from dataclasses import fields
from pathlib import Path

import pytest
import yaml
from cells import TASKS, failed_row, make_row, routed_row
from hydra.utils import instantiate
from omegaconf import OmegaConf
from wandb_file import artifacts, read_run

from launchers.callback import draw
from launchers.tracking.tracker import Tracker
from launchers.tracking.wandb_tracker import WandbTracker, default_mode

CONF = Path(__file__).parents[2] / "conf" / "tracker"


def test_an_offline_run_holds_everything(tmp_path):
    row, expert = make_row("ties", 0.6), make_row("expert", 0.8, tasks=TASKS)
    table = [row, expert, failed_row()]
    with WandbTracker(folder=str(tmp_path), group="sweep") as tracker:
        tracker.start(row.config, row.run_id, "ties on mini8")
        for step in (0, 10):
            tracker.log({"adapt/loss": 1.0 - step / 100}, step)
        tracker.log_task("cars", 0.8, method="expert")
        for task in TASKS:
            tracker.log_task(task, row.accuracy[task])
        tracker.finish(row, table, draw(table, tmp_path))
    config, history, summary, exit_code = read_run(tmp_path, row.run_id)

    assert {key: config[key] for key in row.config} == row.config
    assert config["row"]["checkpoints"] == row.checkpoints and config["row"]["code"] == row.code
    assert history["adapt/loss"] == [1.0, 0.9] and history["step"] == [0, 10]
    assert history["expert/cars"] == [0.8]
    for task in TASKS:
        assert history[f"accuracy/{task}"] == [row.accuracy[task]] and summary[f"accuracy/{task}"] == row.accuracy[task]
    assert summary["accuracy/mean"] == pytest.approx(0.635)
    assert summary["accuracy/norm"] == pytest.approx(sum(row.accuracy[t] / expert.accuracy[t] for t in TASKS) / 8, 1e-4)
    assert summary["status"] == "ok" and summary["scale"] == 0.3 and exit_code == 0

    (folder,) = tmp_path.glob("wandb/offline-run-*/files")
    stored = json.loads((folder / history["table.path"][0]).read_text())
    assert [line[stored["columns"].index("method")] for line in stored["data"]] == ["ties", "tsv_m", "expert"]
    assert (folder / history["heatmap.path"][0]).read_bytes() == (tmp_path / "heatmap.png").read_bytes()


def test_a_routed_run_is_tracked_with_its_gates(tmp_path):
    row = routed_row(collapsed=["cars"])
    with WandbTracker(folder=str(tmp_path)) as tracker:
        tracker.start(row.config, row.run_id, "duet on mini8")
        for step in range(3):
            tracker.log({"router/entropy": 2.0 - step, "router/task_id": 0.5}, step)
        tracker.finish(row, [row], draw([row], tmp_path))
    config, history, summary, _ = read_run(tmp_path, row.run_id)

    assert history["router/entropy"] == [2.0, 1.0, 0.0] and history["step"] == [0, 1, 2]
    assert {name: config["row"][name] for name in ("router", "adaptation", "collapsed")} == {
        "router": "task_id", "adaptation": "calibration", "collapsed": ["cars"]
    }  # fmt: skip
    assert summary["routing_accuracy"] == pytest.approx(0.935)
    assert summary["routing_accuracy/cars"] == pytest.approx(0.91)
    assert summary["energy"] == pytest.approx(0.6) and summary["params"] == 100_000
    assert summary["seconds/router"] == 6.08
    (folder,) = tmp_path.glob("wandb/offline-run-*/files")
    assert (folder / history["routing.path"][0]).read_bytes() == (tmp_path / "routing.png").read_bytes()


def test_the_merged_model_is_an_artifact_that_stays_where_it_is(tmp_path):
    row, tracker = make_row("ties"), WandbTracker(folder=str(tmp_path), model=True)
    file = Path(tracker.model_file(row.run_id) or "")
    file.parent.mkdir(parents=True)
    file.write_bytes(bytes(range(256)) * 1000)
    with tracker:
        tracker.start(row.config, row.run_id, "ties on mini8")
        tracker.finish(row, [row], {}, str(file))
    (artifact,) = [stored for stored in artifacts(tmp_path, row.run_id) if stored.type == "model"]
    (entry,) = artifact.manifest.contents

    assert artifact.name == f"ties-{row.run_id}" and json.loads(artifact.metadata)["run_id"] == row.run_id
    assert (entry.path, entry.size, Path(entry.local_path)) == ("model.safetensors", 256_000, file)
    assert base64.b64decode(entry.digest) == hashlib.md5(file.read_bytes()).digest()
    assert WandbTracker(folder=str(tmp_path)).model_file(row.run_id) is None


def test_disabled_leaves_nothing(tmp_path):
    with WandbTracker(folder=str(tmp_path / "tracked"), mode="disabled") as tracker:
        tracker.start({}, "dddddddddddd", "silent")
        tracker.log_task("cars", 0.5)
        tracker.finish(make_row(), [make_row()], {})
    assert not list(tmp_path.rglob("*.wandb"))


def test_two_jobs_in_one_process_are_two_runs(tmp_path):
    tracker, first, second = WandbTracker(folder=str(tmp_path)), make_row("ties"), failed_row("tsv_m")
    for row in (first, second):
        with tracker:
            tracker.start(row.config, row.run_id, row.method)
            tracker.finish(row, [row], {})

    assert read_run(tmp_path, first.run_id)[3] == 0
    _, history, summary, exit_code = read_run(tmp_path, second.run_id)
    assert exit_code == 1 and summary["status"] == "error" and "accuracy/cars" not in history


def test_an_exception_ends_the_run_as_failed_and_goes_on(tmp_path):
    with pytest.raises(KeyboardInterrupt), WandbTracker(folder=str(tmp_path)) as tracker:
        tracker.start({}, "0123456789ab", "stopped")
        raise KeyboardInterrupt
    assert read_run(tmp_path, "0123456789ab")[3] == 1


def test_losing_wandb_is_one_warning_and_never_an_error(tmp_path, monkeypatch, caplog):
    with WandbTracker(folder=str(tmp_path)) as tracker:
        tracker.start({}, "aaaaaaaaaaaa", "lost")
        monkeypatch.setattr(tracker._run, "log", lambda *_: (_ for _ in ()).throw(ConnectionError("gone")))
        tracker.log_task("cars", 0.5)
        tracker.log({"loss": 1.0}, 0)
        tracker.finish(make_row(), [make_row()], {})
    warnings = [record for record in caplog.records if record.levelname == "WARNING"]
    assert len(warnings) == 1 and "gone" in warnings[0].getMessage()

    (tmp_path / "file").touch()
    with WandbTracker(folder=str(tmp_path / "file")) as tracker:
        tracker.start({}, "bbbbbbbbbbbb", "no folder")
        tracker.log_task("cars", 0.5)


def test_the_mode_follows_keys_and_logins(monkeypatch, tmp_path):
    assert default_mode() == "offline"
    (tmp_path / "netrc").write_text("machine api.wandb.ai\n  login user\n  password x\n")
    (tmp_path / "netrc").chmod(0o600)
    assert default_mode() == "online"
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org")
    assert default_mode() == "offline"
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    assert default_mode() == "online"
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert default_mode() == "disabled"


def test_configs_build_and_name_every_knob():
    conf = {path.stem: yaml.safe_load(path.read_text()) for path in CONF.glob("*.yaml")}
    assert type(instantiate(conf["none"])) is Tracker
    wandb = OmegaConf.create({"output": "outputs", "tracker": conf["wandb"]}).tracker
    assert instantiate(wandb) == WandbTracker(folder="outputs/runs")
    options = {option.name for option in fields(WandbTracker) if option.init}
    assert set(conf["wandb"]) == options | {"_target_"}
