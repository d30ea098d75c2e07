"""What goes wrong with the machine is said in one paragraph; good rows stay, and the same command goes on."""

import contextlib
import errno
import json
import os
import re
import shutil
import subprocess
from dataclasses import asdict
from types import SimpleNamespace

import pytest

from launchers import claims, job, rows, table
from launchers.job import finish
from merging.errors import UserError
from merging.methods import Average
from tasks.journal import Journal

SMALL = ["suite.tasks=[cars,scenes]", "suite.sizes.test=16", "suite.sizes.train=16", "engine.batch=8"]
PLENTY = "64m"


@pytest.fixture
def duet(duet_here, tmp_path):
    """Runs `duet` on a handful of images of two tasks in one folder: (exit status, stdout, stderr)."""
    return lambda *arguments: duet_here(tmp_path / "outputs", *SMALL, *arguments)


@pytest.fixture
def output(tmp_path):
    (tmp_path / "outputs").mkdir()
    return tmp_path / "outputs"


@pytest.fixture
def mounted():
    """Mounts a disk of its own at a folder; skips where that is not allowed."""
    with contextlib.ExitStack() as disks:

        def mount(folder, size=PLENTY):
            folder.mkdir(parents=True, exist_ok=True)
            done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", folder], capture_output=True)
            if done.returncode:
                pytest.skip(f"no disk can be mounted here: {done.stderr.decode().strip()}")
            disks.callback(subprocess.run, ["umount", "-l", folder], check=True)

        yield mount


def contents(folder):
    return {path.name: path.read_bytes() for path in (folder / "results").glob("*.json")}


def by_method(output):
    timing = {"seconds": {}, "created": ""}
    return {row.method: asdict(row) | timing for row in rows.read(output / "results")}


def fill(folder, leave):
    """Leaves so many bytes free on the folder's disk."""
    with (folder / "ballast").open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, shutil.disk_usage(folder).free - leave)


@pytest.mark.skipif(shutil.which("mount") is None, reason="no mount command")
def test_a_full_disk(duet, output, mounted):
    """Full from the start, and in the middle of a sweep."""
    mounted(output)
    assert duet("method=average")[0] == 0
    good = contents(output)
    for leave in (0, 1_500_000):
        fill(output, leave)
        code, _, errors = duet("-m", "method=average,task_arithmetic,duet", "router.train.steps=3")
        assert code == 1 and "Traceback" not in errors and "Logging error" not in errors
        assert re.search(rf"Cannot write .*{output}\S*: No space left on device\..* ?Free some space", errors), errors
        assert {name: contents(output)[name] for name in good} == good
        (output / "ballast").unlink()
    assert by_method(output)["task_arithmetic"]["status"] == "ok"  # there was room for that

    code, page, errors = duet("-m", "method=average,task_arithmetic,duet", "router.train.steps=3")
    assert code == 0, errors
    assert "average: found in" in errors and "task_arithmetic: found in" in errors and "duet: mean score" in errors
    assert {row["status"] for row in by_method(output).values()} == {"ok"} and "failed" not in page
    assert not [path for path in output.rglob(".*") if path.name not in (".claims.lock", ".cache", ".hydra")]


def test_a_row_for_which_there_is_no_room(duet, output, monkeypatch):
    """The cell is not computed again when there is."""
    assert duet("method=base")[0] == 0
    replace = os.replace

    def full(source, target):
        if str(target).endswith(".json") and "results" in str(target):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return replace(source, target)

    monkeypatch.setattr(os, "replace", full)
    code, _, errors = duet("method=average")
    assert code == 1 and "Traceback" not in errors
    assert re.search(r"Cannot write \S*results/[0-9a-f]{12}\.json: No space left on device.*run the same", errors)
    monkeypatch.setattr(os, "replace", replace)
    monkeypatch.setattr("tasks.evaluate.answer", lambda *_, **__: pytest.fail("scored again"))
    code, page, errors = duet("method=average")
    assert code == 0 and "\naverage " in page and "average: mean score" in errors


@pytest.mark.skipif(shutil.which("mount") is None, reason="no mount command")
@pytest.mark.parametrize("what", ["", "results"], ids=["the output folder", "the results folder"])
def test_a_read_only_disk(duet, output, mounted, what):
    mounted(output / what)
    assert duet("method=average")[0] == 0
    good = contents(output)
    subprocess.run(["mount", "-o", "remount,ro", output / what], check=True)
    for mode in ([], ["-m"]):
        code, page, errors = duet("method=average,task_arithmetic" if mode else "method=task_arithmetic", *mode)
        assert code == 1 and page == "" and "Traceback" not in errors
        assert re.search(rf"Cannot write to output={output / what}\S*: Read-only file system\. Free", errors), errors
        assert "mean score" not in errors  # told before anything is computed
    assert contents(output) == good
    table.main([str(output / "results")])  # reading needs no more than this


def test_a_file_in_place_of_the_results_folder(duet, output):
    (output / "results").write_text("in the way")
    code, _, errors = duet("method=average")
    assert code == 1 and "Traceback" not in errors and "mean score" not in errors
    assert re.search(rf"Cannot write to output={output}/results: (File exists|Not a directory)\.", errors), errors


DAMAGES = {
    "truncated": (lambda text: text[: text.index(b'"needs"')], r"EOF while parsing .* at line \d+ column \d"),
    "empty": (lambda text: b"", r"EOF while parsing a value at line 1 column 0"),
    "binary": (lambda text: text.replace(b'"mini8"', b'"\xff\x00"', 1), r".* at line \d+ column \d+"),
    "NaN": (lambda text: re.sub(rb'"scale": \S+,', b'"scale": NaN,', text), r".* at line \d+ column \d+"),
    "type": (lambda text: text.replace(b'"seed": 0,\n "code"', b'"seed": "0",\n "code"'), r"seed: "),
}


def test_damaged_rows(duet, output, capsys, caplog):
    """Named by file and line; the others are used, and the next run computes only what is damaged."""
    assert duet("method=average")[0] == 0
    before, (path,) = by_method(output), [path for path in (output / "results").glob("*.json")
                                          if json.loads(path.read_text())["method"] == "average"]  # fmt: skip
    content = path.read_bytes()
    for damage, message in DAMAGES.values():
        path.write_bytes(damage(content))
        assert path.read_bytes() != content
        caplog.clear()
        table.main([str(output / "results")])
        page = capsys.readouterr().out
        assert re.search(rf"damaged row file {path}: {message}", caplog.text), caplog.text
        assert "\nbase " in page and "\nexpert " in page and "\naverage " not in page

    code, page, errors = duet("method=average")
    assert code == 0 and "\naverage " in page and errors.count(f"damaged row file {path}") == 1, errors
    assert errors.count("mean score") == 1 and by_method(output) == before


def test_a_failed_cell_is_tried_again(duet, output, monkeypatch):
    def broken(*_):
        raise ZeroDivisionError("nothing to merge by")

    merge = Average.__call__
    monkeypatch.setattr(Average, "__call__", broken)
    for _ in range(2):
        code, page, errors = duet("-m", "method=average,task_arithmetic")
        assert code == 1 and "ZeroDivisionError: nothing to merge by" in errors
        assert re.search(r"\naverage +(- +)+failed", page) and "\ntask_arithmetic " in page
        assert "average failed (seed 0): ZeroDivisionError: nothing to merge by" in page
    assert by_method(output)["average"]["error"] == "ZeroDivisionError: nothing to merge by"
    assert "task_arithmetic: found in" in errors

    monkeypatch.setattr(Average, "__call__", merge)
    code, page, errors = duet("-m", "method=average,task_arithmetic")
    assert code == 0 and "average: mean score" in errors and "failed" not in page
    assert by_method(output)["average"]["error"] is None and not list((output / "results").glob("*.claim"))


def test_an_experiment_that_names_an_unknown_knob(duet_here, tmp_path):
    (tmp_path / "experiment").mkdir()
    text = "# @package _global_\nhydra: {sweeper: {params: {method: duet, method.ranks.vaule: '0.1,1'}}}\n"
    (tmp_path / "experiment" / "mine.yaml").write_text(text)
    found = f"hydra.searchpath=[file://{tmp_path}]"
    code, page, errors = duet_here(tmp_path / "outputs", "-m", found, "experiment=mine")
    assert code == 1 and page == "" and "Traceback" not in errors
    assert "no method.ranks.vaule. Did you mean value?" in errors
    assert not (tmp_path / "outputs").exists() and "Launching" not in errors


def test_what_a_process_left_that_was_killed_behind_its_row(duet, output):
    """The row is found, and its claim and its scores go."""
    assert duet("method=average")[0] == 0
    ended = subprocess.Popen(["true"])
    ended.wait()
    content = claims._here() | {"pid": ended.pid, "since": "2026-01-01 12:00 UTC"}
    for path in (output / "results").glob("*.json"):
        path.with_suffix(".claim").write_text(json.dumps(content))
        (output / ".cache" / "unfinished" / path.stem / "00").mkdir(parents=True)
    before = contents(output)
    assert len(before) == 3 and duet("method=average")[0] == 0
    assert contents(output) == before and not list((output / "results").glob("*.claim"))
    assert not list((output / ".cache" / "unfinished").iterdir())


def test_a_cell_that_another_finished_just_before_the_claim(tmp_path, monkeypatch):
    """Between the look for its row and the claim: it is not computed a second time."""
    row = SimpleNamespace(run_id="0" * 12, status="ok")
    looks = iter([None, row, row])
    monkeypatch.setattr(rows, "find", lambda *_: next(looks))
    never = lambda *_: pytest.fail("computed a second time")  # noqa: E731
    cell = SimpleNamespace(run_id=row.run_id, label="average", overrides=(), compute=never, journal=Journal())
    assert finish(cell, tmp_path, lambda *_: None) is row and not list(tmp_path.glob("*.claim"))


def test_a_failure_without_room_for_its_row(tmp_path, monkeypatch, caplog):
    """The failure itself is what is raised."""

    def full(*_):
        raise UserError("Cannot write it: No space left on device.")

    def fails(*_):
        raise ZeroDivisionError("nothing to merge by")

    monkeypatch.setattr(rows, "write", full)
    monkeypatch.setattr(job, "replace", lambda row, **_: row)
    cell = SimpleNamespace(
        run_id="0" * 12, label="ties", overrides=(), compute=fails, journal=Journal(), row=lambda: None
    )
    with pytest.raises(ZeroDivisionError):
        finish(cell, tmp_path, lambda *_: None)
    assert "The failure of ties has no row: Cannot write it: No space left" in caplog.text


def test_a_claim_that_cannot_be_written(unwritable):
    with pytest.raises(UserError, match=r"Cannot claim cell in .*folder: .*run the same command again"):
        claims.claim(unwritable, "cell").__enter__()
