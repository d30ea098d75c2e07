"""A sweep that is killed again and again, alone or beside another process, ends with the rows of an undisturbed one."""

import itertools
import os
import random
import re
import signal
import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import forked
import pytest

from launchers import rows

TINY = [
    "suite.tasks=[cars,scenes]",
    "suite.sizes.train=24",
    "suite.sizes.val=8",
    "suite.sizes.calibration=8",
    "suite.sizes.test=24",
    "experts.recipe.steps=3",
    "experts.recipe.lr=0.003",
    "experts.recipe.batch=8",
    "experts.workers=1",
    "scale=fixed",
    "router.train.steps=4",
    "engine.batch=8",
]
METHODS = "method=average,duet"
KILLS = 20


@pytest.fixture(scope="module")
def chaos(tmp_path_factory):
    with forked.warm() as processes:
        yield Chaos(processes, tmp_path_factory.mktemp("chaos"))


class Chaos:
    """Sweeps in folders of their own, and the rows and costs of an undisturbed one."""

    def __init__(self, processes, folder):
        self.processes, self.folder, self.chance = processes, folder, random.Random(20)
        self.killed, self.met = 0, Counter()
        start = time.monotonic()
        assert self.ended(self.started(folder / "undisturbed")) == 0, self.said("undisturbed")
        self.seconds = time.monotonic() - start
        self.changes = int(re.findall(r"exit 0, (\d+) changes", self.said("undisturbed"))[-1])
        self.rows = numbers(folder / "undisturbed")

    def started(self, output, seeds="0,1", deadly=None, kinds=forked.KINDS, methods=METHODS, log=None):
        command = ["duet", "-m", *TINY, f"seed={seeds}", methods, f"output={output}"]
        watched, log = [output / "results", output / ".cache"], f"{log or output.name}.log"
        return self.processes.start(command, self.folder, self.folder / log, watched, deadly, kinds)

    def ended(self, child):
        return self.processes.wait(child)

    def said(self, name):
        return (self.folder / f"{name}.log").read_text()

    def note(self, output, status):
        """Whether a child was killed, and what it was about."""
        if status == 0:
            return False
        assert status == -signal.SIGKILL, self.said(output.name)
        self.killed += 1
        self.met.update(phases(output))
        return True

    def check(self, output, seeds):
        """Runs to the end what is left; the rows are those of the undisturbed sweep and nothing else is there."""
        assert self.ended(self.started(output, seeds)) == 0, self.said(output.name)
        wanted = {name: row for name, row in self.rows.items() if str(row["seed"]) in seeds}
        assert numbers(output) == wanted and len(wanted) == 4 * len(seeds.split(","))
        assert litter(output) == []
        assert "Traceback" not in self.said(output.name) and "damaged" not in self.said(output.name)


def numbers(output):
    """What must not depend on how often a sweep was disturbed."""
    timing = {"seconds": {}, "created": "", "overrides": []}  # base and experts are of whichever command came first
    return {row.run_id: asdict(row) | timing for row in rows.read(output / "results")}


def phases(output):
    """What a killed process was in the middle of, by what it left."""
    files = [Path(folder, name) for folder, _, names in os.walk(output) for name in names]  # some vanish meanwhile
    left = lambda pattern: any(file.match(pattern) for file in files)  # noqa: E731
    return {
        name
        for name, found in {
            "experts": left(".cache/??/*") and not left("results/*.json"),
            "claim": left("results/*.claim"),
            "gates or scores": left("unfinished/*/*/*"),
            "half a file": left(".*.*.*"),
            "between rows": 0 < sum(file.match("results/*.json") for file in files) < 8,
        }.items()
        if found
    }


def litter(output):
    """What only a sweep under way may have: claims, temporary files, unfinished cells."""
    made = [path.name for path in (output / "results").iterdir() if path.suffix != ".json"]
    cached = [path for path in (output / ".cache").rglob("*") if path.name.startswith(".")]
    return [name for name in made if name != ".claims.lock"] + cached + list((output / ".cache/unfinished").glob("*"))


def test_the_undisturbed_sweep_tells_seeds_and_methods_apart(chaos):
    """Else equal rows would mean nothing."""
    assert len(chaos.rows) == 8 and litter(chaos.folder / "undisturbed") == []
    told = {method: {str(row["scores"]) + str(row["routing"]) + str(row["checkpoints"]) for row in chaos.rows.values()
                     if row["method"] == method} for method in ("base", "average", "duet", "expert")}  # fmt: skip
    assert [len(each) for each in told.values()] == [2, 2, 2, 2]
    assert all(row["routing"]["matrix"][0] != row["routing"]["matrix"][1] for row in chaos.rows.values()
               if row["method"] == "duet")  # fmt: skip
    assert chaos.changes > 100


@pytest.mark.parametrize(
    ("name", "seeds", "kinds", "farthest"),
    [("any", "0", forked.KINDS, 30), ("all", "0,1", forked.KINDS, 40), ("renamed", "1", ("os.rename",), 7)],
)
def test_killed_between_changes_to_files(chaos, name, seeds, kinds, farthest):
    """Just before a random one of the next changes: claims without rows, rows with claims, half-written files."""
    output = chaos.folder / f"{name}0"
    for number in range(6):
        deadly = chaos.chance.randint(1, farthest)
        if not chaos.note(output, chaos.ended(chaos.started(output, seeds, deadly, kinds))):
            chaos.check(output, seeds)
            output = chaos.folder / f"{name}{number + 1}"
    chaos.check(output, seeds)


@pytest.mark.parametrize("seeds", ["0", "1"])
def test_killed_at_random_moments(chaos, seeds):
    output, longest, before = chaos.folder / f"moments{seeds}", chaos.seconds / 2, chaos.killed
    while chaos.killed < before + 3:
        child = chaos.started(output, seeds)
        time.sleep(chaos.chance.uniform(0, longest))
        os.kill(child, signal.SIGKILL)
        if not chaos.note(output, chaos.ended(child)):
            longest /= 2
    chaos.check(output, seeds)


def test_one_of_two_is_killed(chaos):
    """The other one goes on and never waits for the dead; what the dead had claimed is done by the next command."""
    for number in itertools.count():
        if chaos.killed >= KILLS and number >= 2:
            break
        output, seeds = chaos.folder / f"beside{number}", "01"[number % 2]
        worker = chaos.started(output, seeds, chaos.chance.randint(1, chaos.changes // 3))
        other = chaos.started(output, seeds)
        chaos.note(output, chaos.ended(worker))
        assert chaos.ended(other) == 0, chaos.said(output.name)
        chaos.check(output, seeds)


def test_two_sweeps_write_to_one_folder(chaos):
    """Their common cells are computed once; each table is whole, or it is said who computes what is missing."""
    output, methods = chaos.folder / "two", {"one": "method=average,duet", "other": "method=duet,task_arithmetic"}
    both = [chaos.started(output, "0", methods=method, log=name) for name, method in methods.items()]
    assert [chaos.ended(child) for child in both] == [0, 0], [chaos.said(name) for name in methods]
    found, said = numbers(output), [chaos.said(name) for name in methods]
    for method in ("base", "expert", "average", "duet", "task_arithmetic"):
        scored = [len(re.findall(rf"\d {method}: mean score", each)) for each in said]
        assert sum(scored) == 1, (method, said)
        for each, wanted in zip(said, methods.values(), strict=True):
            if method in wanted or method in ("base", "expert"):
                assert f"\n{method} " in each or f"{method}: being computed by" in each, each
    assert {key: row for key, row in found.items() if key in chaos.rows} == {
        key: row for key, row in chaos.rows.items() if row["seed"] == 0
    }
    assert len(found) == 5 and litter(output) == []


def test_the_kills_met_every_phase(chaos):
    """Not processes that had not begun, or had ended."""
    assert chaos.killed >= KILLS
    few = {"experts": 2, "claim": 5, "gates or scores": 2, "half a file": 2, "between rows": 5}
    assert {name: chaos.met[name] for name, least in few.items() if chaos.met[name] < least} == {}


def workers(parent):
    """The children of a process that are there to fine-tune."""
    told = [Path(f"/proc/{child}/cmdline") for task in Path(f"/proc/{parent}/task").iterdir()
            for child in (task / "children").read_text().split()]  # fmt: skip
    return [int(path.parent.name) for path in told if b"spawn_main" in path.read_bytes()]


def alive(pid):
    """Not ended, and no zombie either."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def until(met, seconds=120):
    end = time.monotonic() + seconds
    while not met():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.skipif(not Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").exists(), reason="needs /proc")
@pytest.mark.parametrize("dies", ["a worker", "the sweep"])
def test_no_process_outlives_another(chaos, tmp_path, dies):
    """Neither the processes that fine-tune experts their sweep, nor a sweep one of them, about which it says so."""
    long = ["experts.recipe.steps=100000", "experts.workers=2", "method=average"]
    command = ["duet", *TINY, *long, f"output={tmp_path}/outputs"]
    sweep = chaos.processes.start(command, tmp_path, tmp_path / "log")
    until(lambda: len(workers(sweep)) == 2)
    found = workers(sweep)
    os.kill(found[0] if dies == "a worker" else sweep, signal.SIGKILL)
    status, said = chaos.ended(sweep), (tmp_path / "log").read_text()
    assert status == (1 if dies == "a worker" else -signal.SIGKILL), said
    if dies == "a worker":
        assert "A process that fine-tuned cars, scenes was killed" in said and "Traceback" not in said
    until(lambda: not any(map(alive, found)), seconds=20)
