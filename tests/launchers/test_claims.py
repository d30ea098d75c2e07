"""A cell has one owner at a time, and a dead one does not keep it."""

import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from launchers import claims
from launchers.claims import Taken, claim, owner

HOLD = """
import sys, time
from launchers.claims import Taken, claim
try:
    with claim(sys.argv[1], "cell"):
        print("mine", flush=True)
        time.sleep(float(sys.argv[2]))
except Taken as taken:
    print(f"taken: {taken}", flush=True)
"""


def started(folder, seconds):
    command = [sys.executable, "-c", HOLD, str(folder), str(seconds)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def written(folder, age=0.0, **changes):
    """A claim as another process would have left it."""
    path = folder / "cell.claim"
    content = {"host": "far", "space": "x", "pid": 1, "since": "2026-01-01 12:00 UTC"} | changes
    path.write_text(json.dumps(content))
    os.utime(path, (time.time() - age,) * 2)


def test_one_of_many_gets_it_and_leaves_nothing(tmp_path):
    processes = [started(tmp_path, 3) for _ in range(6)]
    lines = [process.communicate(timeout=60)[0].strip() for process in processes]
    assert sorted(line.split(":")[0] for line in lines) == ["mine", *["taken"] * 5]
    assert all(str(processes[lines.index("mine")].pid) in line for line in lines if line != "mine")
    assert not list(tmp_path.glob("*.claim")) and not list(tmp_path.glob(".cell*"))


def test_threads_of_one_process_are_kept_apart(tmp_path):
    def hold(_):
        try:
            with claim(tmp_path, "cell"):
                time.sleep(0.5)
                return True
        except Taken:
            return False

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(hold, range(8))) == 1


def test_a_killed_owner_is_followed_at_once(tmp_path):
    process = started(tmp_path, 60)
    assert process.stdout.readline().strip() == "mine"
    assert f"process {process.pid}, since 20" in owner(tmp_path, "cell")
    process.kill()
    process.wait()
    assert (tmp_path / "cell.claim").exists() and owner(tmp_path, "cell") is None
    with claim(tmp_path, "cell"):
        assert str(os.getpid()) in owner(tmp_path, "cell")
    assert owner(tmp_path, "cell") is None


def test_an_owner_elsewhere_counts_as_dead_after_a_silence(tmp_path):
    written(tmp_path)
    assert owner(tmp_path, "cell") == "far, process 1, since 2026-01-01 12:00 UTC"
    with pytest.raises(Taken, match="far, process 1"), claim(tmp_path, "cell"):
        pass
    written(tmp_path, age=claims.SILENT + 5)
    assert owner(tmp_path, "cell") is None
    with claim(tmp_path, "cell"):
        pass


def test_the_same_number_in_another_container_is_not_this_process(tmp_path):
    here = json.loads(json.dumps({"host": claims.socket.gethostname(), "space": "another", "pid": 2**22 + 1}))
    written(tmp_path, **here)
    assert "process 4194305" in owner(tmp_path, "cell")  # cannot be asked: only silence tells
    written(tmp_path, **here | {"space": claims._here()["space"]})
    assert owner(tmp_path, "cell") is None


def test_owners_give_signs_of_life(tmp_path, monkeypatch):
    monkeypatch.setattr(claims, "BEAT", 0.05)
    with claim(tmp_path, "cell"):
        path = tmp_path / "cell.claim"
        os.utime(path, (0, 0))
        time.sleep(0.5)
        assert time.time() - path.stat().st_mtime < 5


def in_slurm(monkeypatch, **variables):
    for key in ("JOB_ID", "ARRAY_JOB_ID", "ARRAY_TASK_ID", "RESTART_COUNT"):
        monkeypatch.delenv(f"SLURM_{key}", raising=False)
    for key, value in variables.items():
        monkeypatch.setenv(f"SLURM_{key}", str(value))


ARRAY = {"JOB_ID": 15, "ARRAY_JOB_ID": 12, "ARRAY_TASK_ID": 3}


@pytest.mark.parametrize(
    ("here", "free"),
    [
        (ARRAY | {"RESTART_COUNT": 2}, True),  # the same job, started again, on whichever machine
        (ARRAY | {"RESTART_COUNT": 1}, False),  # another process of the same life
        (ARRAY | {"ARRAY_TASK_ID": 4, "RESTART_COUNT": 2}, False),
        ({"JOB_ID": 12, "RESTART_COUNT": 2}, False),
        ({}, False),
    ],
)
def test_a_slurm_job_started_again_takes_over_from_its_earlier_life(here, free, tmp_path, monkeypatch):
    written(tmp_path, job="12_3", life=1)
    in_slurm(monkeypatch, **here)
    holder = None if free else "far, SLURM job 12_3, process 1, since 2026-01-01 12:00 UTC"
    assert owner(tmp_path, "cell") == holder


def test_claims_of_no_job_are_nobodys_earlier_life(tmp_path, monkeypatch):
    in_slurm(monkeypatch, RESTART_COUNT=5)
    written(tmp_path)
    assert owner(tmp_path, "cell") is not None
    written(tmp_path, job="", life=0)
    assert owner(tmp_path, "cell") is not None


@pytest.mark.parametrize(
    ("here", "job", "life"),
    [(ARRAY | {"RESTART_COUNT": 2}, "12_3", 2), ({"JOB_ID": 15}, "15", 0), ({}, "", 0)],
)
def test_a_claim_names_its_slurm_job(here, job, life, tmp_path, monkeypatch):
    in_slurm(monkeypatch, **here)
    with claim(tmp_path, "cell"):
        content = json.loads((tmp_path / "cell.claim").read_text())
        assert (content["job"], content["life"]) == (job, life)
        assert (f"SLURM job {job}, " in owner(tmp_path, "cell")) == bool(job)


def test_a_job_that_starts_again_makes_the_row_itself(tmp_path, monkeypatch):
    written(tmp_path, job="12_3", life=0)
    in_slurm(monkeypatch, **ARRAY, RESTART_COUNT=1)
    with claim(tmp_path, "cell"):
        assert json.loads((tmp_path / "cell.claim").read_text())["life"] == 1
    assert not (tmp_path / "cell.claim").exists()


def test_claims_of_a_dead_job_are_released(tmp_path):
    written(tmp_path, job="12_3")
    claims.release(tmp_path, "12_30")
    assert (tmp_path / "cell.claim").exists()
    claims.release(tmp_path, "12_3")
    assert not (tmp_path / "cell.claim").exists()
    (tmp_path / "cell.claim").write_text("{")
    claims.release(tmp_path, "12_3")  # whose it is cannot be said: it is left alone


def test_a_damaged_claim_is_respected_for_a_moment_only(tmp_path):
    path = tmp_path / "cell.claim"
    path.write_text("{")
    assert owner(tmp_path, "cell") == "a process that has just started"
    os.utime(path, (time.time() - claims.BEAT - 5,) * 2)
    assert owner(tmp_path, "cell") is None


def test_a_failure_gives_the_cell_back(tmp_path):
    with pytest.raises(ZeroDivisionError), claim(tmp_path, "cell"):
        1 / 0  # noqa: B018
    assert owner(tmp_path, "cell") is None and not (tmp_path / "cell.claim").exists()
