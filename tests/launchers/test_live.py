"""What is shown of a sweep while it runs: jobs, table, time left; on a terminal and in a log."""

import json
import os
import time
from dataclasses import replace
from pathlib import Path

import console
import pytest
import yaml
from cells import TASKS, failed_row, make_row
from omegaconf import OmegaConf
from rich.console import Console
from screens import terminal

from launchers import rows
from launchers.claims import claim
from launchers.live import ENDED, LISTED, watch
from launchers.live.__main__ import main
from launchers.live.page import page, status
from launchers.live.sources import Results, Sweep
from launchers.live.view import Job, Plan, View, planned
from launchers.results.frame import summarise

EXPERIMENTS = sorted((Path(__file__).parents[2] / "conf" / "experiment").glob("*.yaml"))


def sweep_at(now, computed=(), running=(), waiting=0):
    """A view of cells that (began, ended), of those that began, and of so many that wait."""
    jobs = [Job(("method=ties",), "computed", began, ended) for began, ended in computed]
    jobs += [Job(("method=ties",), "running", began) for began in running]
    return View(Plan(len(jobs) + waiting, ("method",)), tuple(jobs), (), 0.0, now)


def test_the_rest_is_costed_by_the_computed_cells_and_counted_down():
    done = [(0, 2), (2, 12)]
    assert sweep_at(12, done, waiting=3).left == pytest.approx(18)
    assert [sweep_at(now, done, [12], 1).left for now in (12, 15, 18, 25)] == pytest.approx([12, 9, 6, 6])
    assert sweep_at(15, [], [12], 1).left is None and sweep_at(12, done).left == 0


def test_what_runs_side_by_side_is_divided():
    done = [(0, 10), (0, 10), (10, 20), (10, 20)]
    assert sweep_at(20, done, waiting=4).left == pytest.approx(20)
    assert sweep_at(20, done, waiting=1).left == pytest.approx(10)  # a single cell is not divided


def config(overrides, **sweeper):
    return OmegaConf.create({"hydra": {"sweeper": sweeper, "overrides": {"task": overrides}}})


def test_the_plan_counts_the_cells_of_hydra():
    plan = planned(config(["scale=fixed", "method=a,b"], params={"seed": "0,1", "method": "x,y,z", "engine.batch": 5}))
    assert plan.total == 4 and plan.axes == ("seed", "method")
    search = planned(config([], params={"method.keep": "interval(0, 1)"}, n_trials=40))
    assert search.total == 40
    assert planned(config(["x=range(0,4)"], params=None)).total == 4


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_an_experiment_completes_a_seed_before_it_begins_the_next(path):
    written = yaml.safe_load(path.read_text())
    params = [*written["hydra"]["sweeper"]["params"]] if "hydra" in written else []  # else another experiment's
    assert not {"seed", "order"} & {*params[1:]}


class Cells:
    """The files of a sweep of two seeds and two methods, as jobs leave them."""

    def __init__(self, folder):
        self.folder, self.results = folder / "sweep", folder / "results"
        self.folder.mkdir()
        cells = [(f"seed={seed}", f"method={method}") for seed in (0, 1) for method in ("ties", "tsv_m")]
        self.cells, self.started = cells, time.time() - 100
        self.rows = [make_row(method, seed=seed) for seed in (0, 1) for method in ("ties", "tsv_m")]
        self.jobs = Sweep(self.folder, Plan(4, ("seed", "method")), self.started)

    def begin(self, number, listed=True):
        job = self.folder / str(number)
        (job / ".hydra").mkdir(parents=True)
        (job / ".hydra" / "overrides.yaml").write_text(yaml.safe_dump(["scale=fixed", *self.cells[number]]))
        if listed:
            (job / LISTED).write_text(json.dumps([str(self.results / f"{self.rows[number].run_id}.json")]))

    def end(self, number):
        (self.folder / str(number) / ENDED).touch()

    def finish(self, number, age=0, **changes):
        path = rows.write(replace(self.rows[number], **changes), self.results)
        os.utime(path, (time.time() - age,) * 2)

    def states(self):
        return [job.state for job in self.jobs.look().jobs]


@pytest.fixture
def sweep(tmp_path):
    return Cells(tmp_path)


def test_a_job_is_followed_from_its_folder_to_its_row(sweep):
    assert sweep.states() == [] and sweep.jobs.look().left is None
    sweep.begin(0, listed=False)
    assert sweep.states() == ["preparing"]
    (sweep.folder / "0" / LISTED).write_text('["half')
    assert sweep.states() == ["preparing"]
    (sweep.folder / "0" / LISTED).write_text(json.dumps([str(sweep.results / f"{sweep.rows[0].run_id}.json")]))
    with claim(sweep.results, sweep.rows[0].run_id):
        (job,) = sweep.jobs.look().jobs
        assert job.state == "running" and f"process {os.getpid()}" in job.owner
    sweep.finish(0)
    view = sweep.jobs.look()
    assert [job.state for job in view.jobs] == ["computed"] and view.rows == (sweep.rows[0],)
    assert view.left > 0


def test_found_failed_and_computed_elsewhere_are_told_apart(sweep):
    sweep.begin(0)
    sweep.finish(0, age=500)
    assert sweep.states() == ["preparing"]  # it may be computed again: redo=true
    sweep.end(0)
    sweep.begin(1, listed=False)  # its experts could not be read
    sweep.end(1)
    sweep.begin(2)
    sweep.finish(2, status="error", error="ValueError: no", scores={})
    sweep.begin(3)
    sweep.end(3)
    with claim(sweep.results, sweep.rows[3].run_id):  # by another process with the same command
        assert sweep.states() == ["found", "failed", "failed", "running"]
    view = sweep.jobs.look()
    assert view.done == 4 and status(view) == "4 of 4 cells, 3 failed, 1 found from before"


def test_what_did_not_change_is_not_read_again(sweep, monkeypatch):
    sweep.begin(0)
    sweep.finish(0)
    first = sweep.jobs.look().rows
    monkeypatch.setattr(rows, "read", None)
    assert sweep.jobs.look().rows[0] is first[0]


def view_of(scored_rows, running=(), total=60):
    done = [Job((f"seed={row.seed}",), "computed", 100.0 + 10 * n, 110.0 + 10 * n) for n, row in enumerate(scored_rows)]
    now = 110.0 + 10 * len(scored_rows)
    return View(Plan(total, ("seed",)), (*done, *running), tuple(scored_rows), 100.0, now)


def drawn(view, width, height):
    printed = Console(width=width, color_system=None)
    with printed.capture() as page_:
        printed.print(page(view, summarise(view.rows), width, height))
    lines = [line.rstrip() for line in page_.get().splitlines()]
    assert len(lines) <= height and all(len(line) <= width for line in lines), lines
    return lines


MANY = [make_row("base", 0.3), make_row("expert", 0.9), *(
    make_row("ties", 0.4 + n / 100, knobs={"keep": n}, created=f"2025-01-02T00:00:{(n * 7) % 40:02}+00:00")
    for n in range(40))]  # fmt: skip


def test_the_page_holds_table_counts_and_what_runs():
    running = [Job(("seed=0", "method=duet"), "running", 125.0, owner="node7, process 4711, since 2025"),
               Job(("seed=1", "method=duet"), "preparing", 128.0)]  # fmt: skip
    lines = drawn(view_of([*MANY[:4], failed_row()], running), 79, 18)
    text = "\n".join(lines)
    names = [line.split()[0] for line in lines if line]
    assert names[:8] == ["mini8,", "method", "─" * len(lines[3]), "base", "ties", "ties", "tsv_m", "expert"]
    assert "failed" in text and "5 of 60 cells after 0:01:00, about 0:" in text
    assert "now 0:00:35 seed=0 method=duet on node7" in text and "now 0:00:32 preparing seed=1 method=duet" in text
    assert TASKS[0] not in text and TASKS[0] in "\n".join(drawn(view_of(MANY[:4]), 139, 30))  # where there is room


@pytest.mark.parametrize(("width", "height"), [(79, 18), (139, 37), (39, 12), (20, 5)])
def test_what_does_not_fit_is_named_and_the_best_and_the_newest_stay(width, height):
    running = [Job((f"seed={seed}",), "running", 100.0) for seed in range(9)]
    lines = drawn(view_of(MANY, running), width, height)
    if height > 12:
        text = "\n".join(lines)
        kept = [line for line in lines if line.startswith(("base", "expert", "ties"))]
        assert any(line.startswith("ties keep=39") for line in kept)  # the best
        assert [line.split()[1] for line in kept if "(new)" in line] == ["keep=17"]
        assert {"base", "expert"} <= {line.split()[0] for line in kept}
        assert f"not shown: {42 - len(kept)} more lines" in text and "and 7 more" in text


def test_of_several_suites_the_newest_is_shown():
    few = make_row("ties", tasks=TASKS[:2], created="2026-01-01T00:00:00+00:00")
    text = "\n".join(drawn(view_of([*MANY[:5], few]), 79, 18))
    assert "mini8, 2 tasks" in text and "not shown: 5 lines of other tasks" in text


class Broken:
    def look(self):
        raise ZeroDivisionError("nothing to see")


def test_whatever_fails_in_the_view_ends_it_in_one_line(caplog):
    watcher = watch.Watcher(Broken())
    assert watcher.wait(10)
    watcher.stop()
    (line,) = caplog.messages
    assert "nothing to see" in line and "which goes on" in line


def test_a_results_folder_is_watched_from_outside(sweep, capsys):
    sweep.finish(1)
    with claim(sweep.results, sweep.rows[0].run_id, "ties scale=fixed seed=0"):
        (job,) = (job for job in Results(sweep.results).look().jobs if job.state == "running")
        assert job.overrides == ("ties scale=fixed seed=0",)
        main([str(sweep.results), "--once"])
    text = capsys.readouterr().out
    assert "tsv_m" in text and "1 row\n" in text and "ties scale=fixed seed=0 on" in text
    main([str(sweep.results), "--once"])
    assert "1 row, nothing is being computed" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="no folder"):
        main([str(sweep.results / "missing")])


def test_a_sweep_is_watched_from_outside_until_it_is_done(sweep, capsys):
    swept = config([], params={"seed": "0,1", "method": "ties,tsv_m"})
    OmegaConf.save(swept, sweep.folder / "multirun.yaml")
    for number in range(4):
        sweep.begin(number)
        sweep.finish(number)
    main([str(sweep.folder)])
    assert "4 of 4 cells" in capsys.readouterr().out


@pytest.fixture
def scored(first_run, output):
    """An output folder with the rows of base and experts."""
    for method in ("base", "expert"):
        rows.write(first_run.rows[method], output / "results")
    return output


def test_a_log_gets_lines_without_control_codes(scored, duet_here):
    code, page_, errors = duet_here(scored, "-m", "method=base,average")
    assert code == 0 and "2 of 2 cells, 1 found from before" in errors and "\x1b" not in errors + page_
    assert sum("of 2 cells" in line for line in errors.splitlines()) in (1, 2) and not watch._WATCHERS
    errors = duet_here(scored, "-m", "method=base,average", "hydra.callbacks.report.live=false")[2]
    assert "of 2 cells" not in errors


def test_on_a_terminal_the_table_comes_last_and_log_lines_are_whole(scored):
    with terminal(console.command(scored, "-m", "method=base,average"), cwd=scored.parent) as (process, screen):
        screen.read()
        assert process.wait(60) == 0
    text, drawn_over = screen.text, ("of 2 cells after", "now 0:0", "method=base\x1b", "cells after")
    assert all(part in screen.raw for part in drawn_over[:2]) and not screen.cursor_hidden
    assert not any(part in text for part in drawn_over)  # the view is wiped
    table = text[text.rindex("\nmethod ") :].splitlines()
    assert [line.split()[0] for line in table[3:6]] == ["base", "average", "expert"]
    logged = [line.split() for line in text.splitlines() if line[2:3] == line[5:6] == ":"]
    assert [words[1:3] for words in logged if words[1][-1] == ":"] == [["base:", "found"], ["average:", "mean"]]
    assert [words[-1] for words in logged if words[1] in ("#0", "#1")] == ["method=base", "method=average"]


def test_ctrl_c_leaves_the_terminal_as_it_was(output):
    command = console.command(output, "-m", "method=duet,base", "router.train.steps=100000")
    with terminal(command, cwd=output.parent) as (process, screen):
        screen.read(until="now 0:0")
        screen.type(b"\x03")
        screen.read()
        assert process.wait(60) == 130
    assert not screen.cursor_hidden and screen.text.rstrip().endswith("run the same command to go on.")
    assert "now 0:" not in screen.text and "Traceback" not in screen.text
