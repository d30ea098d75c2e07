"""A SLURM cluster of this machine, and `duet` commands that send sweeps to it."""

import contextlib
import os
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[1] / "launchers"))

import console

from launchers import run

SCRIPT = Path(__file__).with_name("slurm.sh")
PRESET = ["-m", "hydra/launcher=slurm", "hydra.launcher.cpus_per_task=1"]
LONG = 300  # seconds: a minute is the rule, on a busy machine it takes more
SETTING = ["suite.sizes.test=400", "router.train.steps=40"]


class Cluster:
    """slurmctld, slurmd and munged in a folder of their own."""

    def __init__(self, folder):
        self.folder = Path(folder)

    def script(self, verb):
        done = subprocess.run([SCRIPT, verb, self.folder], capture_output=True, text=True, timeout=LONG)
        if done.returncode == 3:
            pytest.skip(done.stderr.strip())
        assert done.returncode == 0, done.stderr

    def told(self, *command):
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout

    def kill(self, daemon):
        """As the machine's own end would: no farewell, no saved state."""
        os.kill(int((self.folder / f"{daemon}.pid").read_text()), 9)

    def lives(self, job):
        """How often the job was put back into the queue."""
        (found,) = (each for each in self.told("scontrol", "show", "job", job).split() if each.startswith("Restarts="))
        return int(found.partition("=")[2])


@contextlib.contextmanager
def started(output, *arguments):
    """`duet` as it runs; killed in the end."""
    output.mkdir(exist_ok=True)
    command = Command(output, *arguments)
    try:
        yield command
    finally:
        command.kill()


class Command:
    """`duet` in a child of this process, which has imported everything: its status, stdout and stderr."""

    def __init__(self, output, *arguments):
        self.output = output
        self.said = {name: output.with_name(f"{output.name}.{name}") for name in ("stdout", "stderr")}
        self.status = None
        self.pid = os.fork()
        if self.pid == 0:
            try:
                os._exit(self._child(console.command(output, *arguments)))
            except BaseException:
                traceback.print_exc()
                os._exit(70)

    def _child(self, command):
        for number, path in enumerate(self.said.values(), 1):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # also where the tests run in the background
        torch.set_num_threads(1)
        sys.argv = command
        os.chdir(self.output.parent)
        try:
            run.main()
        except SystemExit as stop:
            print(stop.code if isinstance(stop.code, str) else "", file=sys.stderr)
            return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        finally:
            sys.stdout.flush()

    @property
    def stdout(self):
        return self.said["stdout"].read_text()

    @property
    def stderr(self):
        return self.said["stderr"].read_text()

    def ended(self):
        if self.status is None and (found := os.waitpid(self.pid, os.WNOHANG))[0]:
            self.status = os.waitstatus_to_exitcode(found[1])
        return self.status is not None

    def wait(self, seconds=LONG):
        """The exit status."""
        until(self.ended, self, seconds)
        return self.status

    def kill(self):
        if not self.ended():
            os.kill(self.pid, 9)
            self.wait()

    def jobs(self):
        """Numbers of the jobs of its array, by their order in the sweep."""
        scripts = [path.name for path in self.output.glob("runs/*/.submitit/*/*_submission.sh")]
        return [f"{name.partition('_')[0]}_{index}" for name in scripts for index in (0, 1)]

    def log(self, job):
        """What a job wrote, in all its lives."""
        (path,) = self.output.glob(f"runs/*/.submitit/{job}/*_log.err")
        return path.read_text()


def until(condition, command, seconds=LONG):
    """Wait for something true, which is returned."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := condition():
            return found
        if condition != command.ended:
            assert not command.ended(), command.stderr
        time.sleep(0.05)
    raise AssertionError(f"waited {seconds} s for nothing; the command says:\n{command.stderr}")
