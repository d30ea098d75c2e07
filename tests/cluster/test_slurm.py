"""Sweeps on a real SLURM: the rows of a quiet one, whatever is preempted, put back into the queue, killed, or down."""

import json
import os
import signal

from sweeps import until

from launchers import rows

SLOW = "engine.batch=1"  # no number of these rows depends on it


def numbers(output, *methods):
    return {row.run_id: (row.accuracy, row.collapsed) for row in rows.read(output / "results") if row.method in methods}


def by_method(output):
    return {row.method: row for row in rows.read(output / "results")}


def claimed(command):
    """The claims of the sweep's jobs, by job."""
    found = {}
    for path in (command.output / "results").glob("*.claim"):
        claim = json.loads(path.read_text())
        found[claim["job"]] = claim
    return found


def test_an_array_gives_the_rows_of_a_local_sweep_though_the_scheduler_dies_meanwhile(cluster, sweep, ready):
    command = sweep("hydra/launcher=slurm_gpu", "engine.device=cpu", "method=ties,wemoe")
    job = until(command.jobs, command)[0]
    until(lambda: claimed(command), command)
    told = cluster.told("scontrol", "show", "job", job)
    assert {"Requeue=1", "TresPerNode=gres:gpu:1", "TimeLimit=04:00:00", "JobName=duet"} <= set(told.split())
    cluster.kill("slurmctld")
    until(lambda: "the scheduler does not answer" in command.stderr, command)
    cluster.script("up")
    assert command.wait() == 0, command.stderr
    assert numbers(command.output, "ties", "wemoe") == numbers(ready / "quiet", "ties", "wemoe")
    assert len(numbers(command.output, "ties", "wemoe")) == 2
    assert "no accounting on this cluster (Slurm accounting storage is disabled)" in command.stderr
    assert command.stderr.count("does not answer") == 1
    assert "ties" in command.stdout and "wemoe" in command.stdout


def test_jobs_that_ran_out_of_time_or_were_preempted_go_on_where_they_were(cluster, sweep, ready):
    command = sweep("hydra.launcher.timeout_min=5", "method=wemoe,duet", SLOW)
    timed_out, preempted = until(command.jobs, command)
    found = [command.output / path for path in gates(ready / "quiet")]
    assert len(found) == 2 and not any(path.exists() for path in found)
    until(found[0].exists, command)
    cluster.told("scancel", "--signal=USR2", timed_out)  # what SLURM sends signal_delay_s before the limit
    until(found[1].exists, command)
    os.kill(claimed(command)[preempted]["pid"], signal.SIGSTOP)  # until the scheduler wakes it with its warning
    trained = [path.stat().st_ino for path in found]
    cluster.told("sbatch", "-p", "urgent", "--exclusive", "-o", "/dev/null", "--wrap", "true")
    assert command.wait() == 0, command.stderr
    # submitit says how many time-outs remain after `scontrol requeue`, which may have killed it by then
    assert "Job has timed out" in command.log(timed_out) and "DUE TO PREEMPTION" in command.log(preempted)
    assert cluster.lives(timed_out) > 0, command.log(timed_out)
    assert cluster.lives(preempted) > 0, command.log(preempted)
    assert numbers(command.output, "wemoe", "duet") == numbers(ready / "quiet", "wemoe", "duet")
    assert [path.stat().st_ino for path in found] == trained  # the same files: no gate was trained again


def gates(output):
    """The files of trained gates below an output folder, in the order of the sweep that trained them."""
    entries = [path for path in (output / ".cache").glob("??/[!.]*") if b'"collapsed"' in path.read_bytes()]
    return [path.relative_to(output) for path in sorted(entries, key=lambda path: path.stat().st_mtime)]


def test_a_job_killed_outright_is_reported_and_made_by_the_same_command(cluster, sweep, ready):
    command = sweep("method=ties,wemoe")
    _, victim = until(command.jobs, command)
    claim = until(lambda: claimed(command).get(victim), command)
    os.kill(claim["pid"], signal.SIGKILL)
    assert command.wait() == 1
    (report,) = [line for line in command.stderr.splitlines() if f"SLURM job {victim} (" in line]
    assert "method=wemoe" in report and "its state is FAILED" in report
    assert "Killed" in command.log(victim)
    assert f"/{victim}_0_log.err" in report
    assert "ties" in command.stdout and "wemoe" not in command.stdout.split("Accuracy")[0]
    assert set(by_method(command.output)) == {"base", "expert", "ties"}
    before = {path: path.stat().st_mtime_ns for path in (command.output / "results").glob("*.json")}

    again = sweep("method=ties,wemoe")
    assert again.wait() == 0, again.stderr
    assert numbers(again.output, "ties", "wemoe") == numbers(ready / "quiet", "ties", "wemoe")
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())


def test_ctrl_c_says_what_goes_on_in_the_queue(cluster, sweep):
    command = sweep("method=ties,wemoe", "hydra.launcher.array_parallelism=1")
    first, _ = until(command.jobs, command)
    array = first.partition("_")[0]
    os.kill(command.pid, signal.SIGINT)
    assert command.wait() == 130
    assert f"`scancel {array}` ends them" in command.stderr and "run the same command" in command.stderr
    assert len(cluster.told("squeue", "-h", "-r", "-j", array).splitlines()) == 2
    cluster.told("scancel", array)
