"""A W&B server that is gone, hangs or fails costs an experiment next to nothing, whenever it happens."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import wandb
from cells import make_row
from wandb_file import read_run, records
from wandb_server import Server

from launchers.tracking import wandb_tracker
from launchers.tracking.wandb_tracker import WandbTracker

LIMIT, BUSY = 1.0, 6.0  # seconds that the tracker waits, and what a busy machine takes beside it
ROWS = [make_row("ties"), make_row("tsv_m", 0.5), make_row("iso_c", 0.4)]


@pytest.fixture(autouse=True)
def no_server_was_lost_before(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(wandb_tracker, "_UNANSWERED", {})
    monkeypatch.setattr(wandb_tracker, "STARTING", 1)
    wandb.teardown()  # its client reads the environment once
    yield
    wandb.teardown()


@pytest.fixture
def point(monkeypatch):
    """Makes a server the one that W&B's client knows."""

    def to(environment):
        for key, value in (environment | {"WANDB_HTTP_TIMEOUT": "1"}).items():
            monkeypatch.setenv(key, value)

    return to


def track(folder, row):
    """The seconds that a cell spends on its tracker."""
    start = time.monotonic()
    with WandbTracker(folder=str(folder), timeout=LIMIT) as tracker:
        tracker.start(row.config, row.run_id, row.method, "sweep")
        for task, accuracy in row.accuracy.items():
            tracker.log_task(task, accuracy)
        tracker.finish(row, [row], {})
    return time.monotonic() - start


def refused():
    """The address of a port that nobody listens to."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}"


@pytest.mark.parametrize("fault", ["refuses", "hangs", "fails", "opens nothing"])
def test_a_server_that_opens_no_run_is_waited_for_once(fault, tmp_path, point, caplog):
    with Server(fault) as server:
        point(server.environment | ({"WANDB_BASE_URL": refused()} if fault == "refuses" else {}))
        first, asked = track(tmp_path, ROWS[0]), server.asked
        second = track(tmp_path, ROWS[1])
        assert server.asked == asked  # not again by the second

    assert first < LIMIT + BUSY and second < BUSY
    for row in ROWS[:2]:
        assert read_run(tmp_path, row.run_id)[2]["accuracy/mean"] == pytest.approx(sum(row.accuracy.values()) / 8)
    (warning,) = (record.getMessage() for record in caplog.records if record.levelname == "WARNING")
    assert f"going on offline. Send the runs later with `wandb sync {tmp_path}/wandb/offline-run-*`." in warning


@pytest.mark.parametrize("fault", ["gone", "hangs", "fails"])
def test_what_a_lost_server_did_not_take_stays_on_disk(fault, tmp_path, point, caplog):
    row = ROWS[0]
    with Server() as server:
        point(server.environment)
        with WandbTracker(folder=str(tmp_path), timeout=LIMIT) as tracker:
            tracker.start(row.config, row.run_id, "ties")
            server.stop() if fault == "gone" else setattr(server, "fault", fault)
            start = time.monotonic()
            for task, accuracy in row.accuracy.items():
                tracker.log_task(task, accuracy)
            tracker.finish(row, [row], {})
        seconds = time.monotonic() - start
        track(tmp_path, ROWS[1])

    assert seconds < 2 * LIMIT + BUSY
    assert "did not take everything in time. Send it later with `wandb sync" in caplog.text
    (file,) = tmp_path.glob(f"wandb/run-*/run-{row.run_id}.wandb")
    summary = {item.key: item.value_json for record in records(file) for item in record.summary.update}
    assert float(summary["accuracy/mean"]) == pytest.approx(sum(row.accuracy.values()) / 8)
    assert [path.stem for path in tmp_path.glob("wandb/offline-run-*/*.wandb")] == [f"run-{ROWS[1].run_id}"]


def test_what_was_kept_offline_is_sent_later(tmp_path, point):
    point({"WANDB_BASE_URL": refused(), "WANDB_API_KEY": "0" * 40})
    track(tmp_path, ROWS[0])
    with Server() as server:
        runs = [str(path) for path in tmp_path.glob("wandb/offline-run-*")]
        command = [Path(sys.executable).with_name("wandb"), "sync", *runs]
        done = subprocess.run(command, env=os.environ | server.environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    run = server.runs[ROWS[0].run_id]
    assert run["groupName"] == "sweep" and run["history"]["accuracy/cars"] == ROWS[0].accuracy["cars"]


def test_a_server_that_answers_has_the_same_run_however_often_it_is_repeated(tmp_path, point):
    with Server() as server:
        point(server.environment)
        for row in (ROWS[0], ROWS[1], ROWS[0]):
            track(tmp_path, row)
    assert set(server.runs) == {ROWS[0].run_id, ROWS[1].run_id} and not server.unknown
    for row in ROWS[:2]:
        run = server.runs[row.run_id]
        assert run["exit"] == 0 and run["groupName"] == "sweep"
        assert {task: run["history"][f"accuracy/{task}"] for task in row.tasks} == row.accuracy
