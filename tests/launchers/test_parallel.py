"""The same command, started twice or killed in between: every cell once, and the rows of an undisturbed run."""

import re
import signal
import subprocess
import time

import console
from processes import interruptible

from launchers import rows

METHODS = ["average", "tsv_m", "duet"]
SWEEP = ["-m", f"method={','.join(METHODS)}", "router.train.steps=20"]


def numbers(output):
    """What must not depend on how often a run was disturbed."""
    return {row.run_id: (row.method, row.accuracy, row.routing, row.collapsed) for row in rows.read(output / "results")}


def test_two_processes_share_a_sweep(output, first_run, tmp_path):
    alone = tmp_path / "alone" / "outputs"
    alone.mkdir(parents=True)
    (alone / ".cache").symlink_to(first_run.output / ".cache")
    process = console.duet(alone, *SWEEP)
    assert process.returncode == 0, process.stderr

    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    both = [subprocess.Popen(console.command(output, *SWEEP), cwd=tmp_path, **pipes) for _ in range(2)]
    said = [process.communicate(timeout=300)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    for method in [*METHODS, "base", "expert"]:
        scored = sum(len(re.findall(rf"\d {method}: mean score", errors)) for errors in said)
        assert scored == 1, (method, said)
    assert numbers(output) == numbers(alone)
    assert not list((output / "results").glob("*.claim"))
    assert "being computed by" in said[0] + said[1]


def test_a_killed_run_is_finished_by_the_same_command(output, tmp_path):
    command = console.command(output, "method=wemoe", "router.train.steps=20", "engine.batch=1")
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    for moment in ("unfinished", "claim"):
        with interruptible(command, cwd=tmp_path, **pipes) as process:
            wait_for(output, moment, process)
            process.send_signal(signal.SIGKILL)
    after = console.duet(output, "method=wemoe", "router.train.steps=20", "engine.batch=1")
    assert after.returncode == 0, after.stderr
    disturbed = numbers(output)

    assert console.duet(output, "method=wemoe", "router.train.steps=20", "engine.batch=1", "redo=true").returncode == 0
    assert numbers(output) == disturbed and {method for method, *_ in disturbed.values()} == {"wemoe", "base", "expert"}
    assert not list((output / ".cache" / "unfinished").glob("*"))


def wait_for(output, moment, process):
    """Until gates or scores are stored, or a cell is claimed."""
    where = {"unfinished": output / ".cache" / "unfinished", "claim": output / "results"}[moment]
    pattern = {"unfinished": "*/??/*", "claim": "*.claim"}[moment]
    while process.poll() is None and not list(where.glob(pattern)):
        time.sleep(0.005)
