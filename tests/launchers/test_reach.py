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
from wandb_file import read_run
from wandb_server import Server

from launchers.tracking import reach
from launchers.tracking import tracker as track
from launchers.tracking.tracker import WandbTracker

LIMIT = 60.0  # what the tracker would wait, were it not for the checks
SOON, AT_ONCE = reach.PATIENCE + 5, 5.0  # seconds on a busy machine; without anything lost it takes one
ROWS = [make_row("ties"), make_row("tsv_m", 0.5), make_row("iso_c", 0.4)]


@pytest.fixture(autouse=True)
def nobody_was_silent(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(reach, "_SILENT", {})
    monkeypatch.setattr(reach, "_RESTS", [])
    wandb.teardown()  # its client reads the environment once
    yield
    wandb.teardown()


@pytest.fixture
def known(monkeypatch):
    """Makes a server the one that W&B's client knows."""

    def point(environment):
        for key, value in environment.items():
            monkeypatch.setenv(key, value)

    return point


def cell(folder, row):
    """The seconds that a cell loses to its tracker."""
    begun = time.monotonic()
    with WandbTracker(folder=str(folder), timeout=LIMIT) as tracker:
        tracker.start(row.config, row.run_id, row.method, "sweep")
        for task, accuracy in row.accuracy.items():
            tracker.log_task(task, accuracy)
        tracker.finish(row, [row], {})
    return time.monotonic() - begun


def refused():
    """The address of a port that nobody listens to."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}"


@pytest.mark.parametrize("fault", ["refuses", "hangs", "fails", "has no name"])
def test_a_server_out_of_reach_is_asked_once(fault, tmp_path, known, caplog):
    cell(tmp_path / "first", make_row("base"))  # offline: starts W&B's own process
    with Server(fault) as server:
        known(server.environment)
        if fault in ("refuses", "has no name"):
            known({"WANDB_BASE_URL": refused() if fault == "refuses" else "http://wandb.invalid"})
        first, second = cell(tmp_path, ROWS[0]), cell(tmp_path, ROWS[1])
        assert server.asked <= 2

    assert first < SOON and second < AT_ONCE
    for row in ROWS[:2]:
        assert read_run(tmp_path, row.run_id)[2]["accuracy/mean"] == pytest.approx(sum(row.accuracy.values()) / 8)
    warned = next(record.getMessage() for record in caplog.records if record.levelname == "WARNING")
    assert f"going on offline. Send the runs later with `wandb sync {tmp_path}/wandb/offline-run-*`." in warned


def test_a_server_that_opens_no_run_is_tried_once(tmp_path, known, monkeypatch, caplog):
    monkeypatch.setattr(track, "STARTING", 1)
    with Server("opens nothing") as server:
        known(server.environment)
        first, second = cell(tmp_path, ROWS[0]), cell(tmp_path, ROWS[1])
    assert 1 < first < SOON and second < AT_ONCE
    assert "going on offline" in caplog.text and len(list(tmp_path.glob("wandb/offline-run-*"))) == 2


@pytest.mark.parametrize("fault", ["gone", "hangs", "fails"])
def test_a_server_lost_during_a_run_delays_nothing(fault, tmp_path, known, caplog):
    with Server() as server:
        known(server.environment)
        with WandbTracker(folder=str(tmp_path), timeout=LIMIT) as tracker:
            tracker.start(ROWS[0].config, ROWS[0].run_id, "ties")
            tracker.log_task("cars", 0.5)
            begun = time.monotonic()
            server.stop() if fault == "gone" else setattr(server, "fault", fault)
            tracker.finish(ROWS[0], [ROWS[0]], {})
        ended = time.monotonic() - begun
        second, third = cell(tmp_path, ROWS[1]), cell(tmp_path, ROWS[2])
        begun = time.monotonic()
        reach.finish_rests()
        left = time.monotonic() - begun

    assert ended < SOON and second < SOON and third < AT_ONCE and left < AT_ONCE
    assert "did not take everything in time. Send it later with `wandb sync" in caplog.text
    assert {row.run_id for row in ROWS[1:]} == {path.stem[4:] for path in tmp_path.glob("wandb/offline-run-*/*.wandb")}


def test_what_was_kept_offline_is_sent_later(tmp_path, known):
    known({"WANDB_BASE_URL": refused(), "WANDB_API_KEY": "0" * 40})
    cell(tmp_path, ROWS[0])
    with Server() as server:
        runs = [str(path) for path in tmp_path.glob("wandb/offline-run-*")]
        command = [Path(sys.executable).with_name("wandb"), "sync", *runs]
        done = subprocess.run(command, env=os.environ | server.environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    told = server.runs[ROWS[0].run_id]
    assert told["groupName"] == "sweep" and told["history"]["accuracy/cars"] == ROWS[0].accuracy["cars"]


def test_a_server_that_answers_has_the_same_run_however_often_it_is_repeated(tmp_path, known):
    with Server() as server:
        known(server.environment)
        for row in (ROWS[0], ROWS[1], ROWS[0]):
            cell(tmp_path, row)
    assert set(server.runs) == {ROWS[0].run_id, ROWS[1].run_id} and not server.unknown
    for row in ROWS[:2]:
        run = server.runs[row.run_id]
        assert run["exit"] == 0 and run["groupName"] == "sweep"
        assert {task: run["history"][f"accuracy/{task}"] for task in row.tasks} == row.accuracy


def test_a_refusal_is_an_answer_and_a_silent_server_is_asked_again_later(known, monkeypatch):
    with Server("fails") as server:
        known(server.environment)
        assert reach.silence() == "HTTP 500" and server.asked == 2
        assert reach.silence() == "HTTP 500" and server.asked == 2
        monkeypatch.setattr(reach, "QUIET", 0.0)
        reach.give_up("later")
        server.fault = None
        assert reach.silence() is None
