"""What the waiting command makes of the scheduler's words and of the jobs' ends; no cluster is needed."""

import json
import os

import pytest
from hydra.core.utils import JobReturn, JobStatus

from launchers.sweeps import slurm
from launchers.sweeps.slurm import Watcher, no_accounting, outcome
from merging.errors import UserError


@pytest.fixture
def told(monkeypatch):
    """What squeue and sacct answer: a list of lines, or an error."""
    answers = {"squeue": [], "sacct": []}
    monkeypatch.setattr(slurm, "answer", lambda command, *_: answers[command])
    monkeypatch.setattr(slurm, "GRACE", 0.0)
    return answers


def states(watcher, *jobs):
    return {job: (watcher.get_state(job, "force"), watcher.is_done(job, "cache")) for job in jobs}


def test_only_an_end_for_good_is_an_end(told):
    watcher = Watcher(accounting=False)
    for job in ("7_0", "7_1", "7_2", "8"):
        watcher.register_job(job)
    told["squeue"] = ["7_0|CONFIGURING", "7_1|PREEMPTED", "7_2|REQUEUE_HOLD", "8|NODE_FAIL"]
    assert states(watcher, "7_0", "7_1", "7_2", "8") == {
        "7_0": ("CONFIGURING", False), "7_1": ("PREEMPTED", False), "7_2": ("REQUEUE_HOLD", False),
        "8": ("NODE_FAIL", True),
    }  # fmt: skip
    told["squeue"] = ["7_0|OUT_OF_MEMORY", "8|PENDING"]  # 8 was put back, the others were forgotten
    assert states(watcher, "7_0", "7_1", "8") == {
        "7_0": ("OUT_OF_MEMORY", True), "7_1": ("GONE", True), "8": ("PENDING", False)
    }  # fmt: skip
    told["squeue"] = ["8|RUNNING"]
    assert states(watcher, "7_0", "8") == {"7_0": ("OUT_OF_MEMORY", True), "8": ("RUNNING", False)}


def test_an_end_is_believed_after_a_while(told, monkeypatch):
    monkeypatch.setattr(slurm, "GRACE", 3600.0)
    watcher = Watcher(accounting=False)
    watcher.register_job("7_0")
    told["squeue"] = ["7_0|FAILED"]
    assert states(watcher, "7_0") == {"7_0": ("FAILED", False)}


@pytest.mark.parametrize(("line", "state"), [(["CANCELLED by 0"], "CANCELLED"), ([], "GONE"), ("no database", "GONE")])
def test_accounting_remembers_what_squeue_forgot(told, line, state):
    watcher = Watcher(accounting=True)
    watcher.register_job("7_0")
    told["squeue"], told["sacct"] = "slurm_load_jobs error: Invalid job id specified", line
    assert states(watcher, "7_0") == {"7_0": (state, True)}


def test_silence_of_the_scheduler_is_no_end_and_said_once(told, caplog):
    watcher = Watcher(accounting=False)
    watcher.register_job("7_0")
    told["squeue"] = ["7_0|RUNNING"]
    watcher.get_state("7_0", "force")
    told["squeue"] = "Unable to contact slurm controller"
    for _ in range(3):
        assert states(watcher, "7_0") == {"7_0": ("RUNNING", False)}
    assert caplog.text.count("does not answer (Unable to contact slurm controller)") == 1


@pytest.mark.parametrize(
    ("script", "missing"),
    [
        ("echo 12; exit 0", None),
        ("echo Slurm accounting storage is disabled >&2; exit 1", "Slurm accounting storage is disabled"),
        ("exit 1", "sacct failed"),
        (None, "there is no sacct"),
    ],
)
def test_accounting_is_looked_for(script, missing, tmp_path, monkeypatch):
    if script is not None:
        (tmp_path / "sacct").write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / "sacct").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path) + (f"{os.pathsep}/bin" if script else ""))
    assert no_accounting() == missing


@pytest.fixture
def job(tmp_path, monkeypatch):
    """Makes a job of a sweep that has ended: with a result, or without and in this state."""
    submitit = pytest.importorskip("submitit", reason="needs pip install -e '.[slurm]'")
    import cloudpickle
    from submitit.slurm.slurm import SlurmJob

    monkeypatch.setattr(slurm, "FAILED", [])

    def make(result=None, state="COMPLETED"):
        watcher = Watcher(accounting=False)
        monkeypatch.setattr(watcher, "_ask", lambda: watcher._note({"7_1": state}))
        monkeypatch.setattr(SlurmJob, "watcher", watcher)
        monkeypatch.setattr(slurm, "GRACE", 0.0)
        made = SlurmJob(folder=tmp_path / "%j", job_id="7_1")
        made.paths.folder.mkdir()
        made.paths.stderr.write_text("Killed\n")
        submitit.core.utils.DelayedSubmission(print, ["method=ties", "hydra.verbose=true"]).dump(
            made.paths.submitted_pickle
        )
        if result is not None:
            made.paths.result_pickle.write_bytes(cloudpickle.dumps(result))
        return made

    return make


def test_a_result_comes_home(job, tmp_path):
    returned = outcome(job(("success", JobReturn(status=JobStatus.COMPLETED, _return_value=(0.5, 7)))), tmp_path)
    assert returned.return_value == (0.5, 7) and not slurm.FAILED


def test_a_job_that_was_killed_is_reported_and_its_claims_end(job, tmp_path, caplog):
    for name, owner in {"mine": "7_1", "other": "7_2"}.items():
        (tmp_path / f"{name}.claim").write_text(json.dumps({"job": owner}))
    (tmp_path / "damaged.claim").write_text("[")
    returned = outcome(job(state="OUT_OF_MEMORY"), tmp_path)
    assert returned.return_value is None and slurm.FAILED == ["7_1"]
    (said,) = caplog.messages
    assert said.startswith("SLURM job 7_1 (method=ties) died without a result, its state is OUT_OF_MEMORY.")
    assert "hydra.launcher.mem_gb" in said and str(tmp_path / "7_1" / "7_1_0_log.err") in said
    assert {path.stem for path in tmp_path.glob("*.claim")} == {"other", "damaged"}


@pytest.mark.parametrize(
    ("result", "words"),
    [
        (("success", JobReturn(overrides=["method=ties"], status=JobStatus.FAILED, _return_value=UserError("no"))),
         "failed: no. Its log"),
        (("success", JobReturn(overrides=["method=ties"], status=JobStatus.FAILED, _return_value=OSError(28, "full"))),
         "failed: OSError: [Errno 28] full. Its log"),
        (("error", "Traceback ...\nOSError: no"), "did not get as far as the experiment"),
    ],
)  # fmt: skip
def test_a_job_that_failed_is_reported_and_the_sweep_goes_on(result, words, job, tmp_path, caplog):
    assert outcome(job(result), tmp_path).return_value is None
    assert words in caplog.text and "SLURM job 7_1 (method=ties)" in caplog.text and slurm.FAILED == ["7_1"]


def test_ctrl_c_names_the_jobs_that_go_on(job, tmp_path, monkeypatch, capsys):
    waiting = job()
    monkeypatch.setattr(type(waiting), "wait", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        outcome(waiting, tmp_path)
    assert "The jobs of 7 stay in SLURM's queue; `scancel 7` ends them." in capsys.readouterr().err
