"""A run is explained, and the printed command is the same run."""

import io
import json
import re
import shlex
from dataclasses import replace

import pytest
from cells import TASKS, failed_row, make_row, routed_row, run_id
from hydra import compose, initialize_config_module
from hydra.core.override_parser.overrides_parser import OverridesParser
from rich.console import Console

from launchers import rows
from launchers.cells import code_version
from launchers.job import resolved
from launchers.show import command, explain, main, pick
from merging.errors import UserError

CHECKPOINTS = {"base": "b" * 64, **{task: task * 8 for task in TASKS}}


def configured(overrides):
    with initialize_config_module("conf", version_base="1.3"):
        return resolved(compose("config", list(overrides)))


def row_of(overrides):
    """A row as `duet` with these overrides would have written it."""
    config = configured(overrides)
    method = next(
        (override.partition("=")[2] for override in overrides if override.startswith("method=")), "task_arithmetic"
    )
    row = make_row(method, seed=config["seed"])
    config = json.loads(json.dumps(config))  # as read from its file
    name = run_id(config, CHECKPOINTS)
    return replace(row, config=config, checkpoints=CHECKPOINTS, run_id=name, overrides=list(overrides))


def test_the_command_survives_a_shell_and_hydra():
    overrides = ["method=ties", "method.density=0.1", "experts.revision='a b\\'s, [x]'", "+suite.extra={a: 1}"]
    first, *printed = shlex.split(command(make_row(overrides=overrides), "o o"))
    assert first == "duet" and printed[:-1] == overrides
    (place,) = OverridesParser.create().parse_overrides(printed[-1:])
    assert place.value() == "o o"


def test_a_row_of_other_code_is_told_from_one_of_today():
    row = row_of(["method=ties"])
    assert f"written by {row.code}; this is {code_version()}" in " ".join(explained(row).split())
    assert "it is found; redo=true" in explained(replace(row, code=code_version()))


def test_a_reference_row_is_led_to_by_the_command_it_was_computed_beside():
    base = replace(make_row("base"), overrides=["method=ties", "method.density=0.1"])
    assert "duet method=ties method.density=0.1" in explained(base)


def explained(row, *others, **knobs):
    page = io.StringIO()
    explain(row, [*others, row], Console(file=page, width=100, color_system=None), **knobs)
    return page.getvalue()


def test_a_run_is_explained():
    base = replace(row_of(["method=base"]), macs=10**7, stored_bytes=10_000_000)
    routed = routed_row("duet", 0.72)
    told = row_of(["method=duet", "method.static_coef=0.5"])
    row = replace(routed, config=told.config, run_id=told.run_id, checkpoints=CHECKPOINTS, remarks=["Half of it."],
                  overrides=told.overrides)  # fmt: skip
    expert = make_row("expert", 0.9, checkpoints=CHECKPOINTS)
    page = explained(row, expert, base, output="my runs")
    flat = " ".join(page.split())

    assert f"duet on mini8, run {row.run_id}: mean score 75.5 %" in flat  # 72 and 3.5 for the tasks' steps
    norm = sum((0.72 + step / 100) / (0.9 + step / 100) for step in range(8)) / 8
    assert f"{100 * norm:.1f} % of the experts'" in flat
    for fact in ("DuetMerging: shared-factor", "Scale 0.3, picked by search on the val split", "Router task_id",
                 "500 samples a task", "unlabelled calibration samples", "15.0 MB to store, 1.50 x the base",
                 "1.26 x the base", "router 6.08 s", "11.3 s in all", "code 1a2b3c4",
                 "Half of it."):  # fmt: skip
        assert fact in flat, fact
    assert re.search(r"textures +79\.0 +81\.4 +97\.0", page)
    assert shlex.split(page[page.index("Repeat it") :].splitlines()[1]) == [
        "duet", "method=duet", "method.static_coef=0.5", "output=my runs"]  # fmt: skip


def test_a_failed_run_and_one_of_an_unknown_method_are_explained():
    failed = replace(row_of(["method=ties"]), status="error", error="ValueError: rank 0", scores={}, seconds={})
    assert "failed, ValueError: rank 0" in explained(failed) and "duet method=ties" in explained(failed)

    gone = replace(failed_row("wizardry"), code="abc123", overrides=["method=wizardry"])
    assert "abc123" in explained(gone)
    assert "older than the commands in rows" in " ".join(explained(failed_row("wizardry")).split())


def test_a_prefix_names_one_run():
    some = [replace(make_row(method), run_id=name) for method, name in
            [("ties", "ab12"), ("dare", "ab34"), ("iso_c", "cd56")]]  # fmt: skip
    assert pick(some, "C").method == "iso_c" and pick(some, "ab34").method == "dare"
    with pytest.raises(UserError, match=r"2 runs .* ab12 ties seed 0; ab34 dare seed 0.*more digits"):
        pick(some, "ab")
    with pytest.raises(UserError, match=r"no run cd65 .*Did you mean cd56"):
        pick(some, "cd65")


def test_the_command_line(tmp_path, capsys):
    row = row_of(["method=ties"])
    rows.write(row, tmp_path / "results")
    main([row.run_id[:5], "--results", str(tmp_path / "results")])
    page = capsys.readouterr().out
    assert f"output={tmp_path}" in page and f"run {row.run_id}" in page
    with pytest.raises(SystemExit, match="error: There is no run zzz"):
        main(["zzz", "--results", str(tmp_path / "results")])
    with pytest.raises(SystemExit, match="error: There are no rows at"):
        main(["zzz", "--results", str(tmp_path / "nowhere")])
