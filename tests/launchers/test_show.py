"""A run is explained, and the printed command is the same run."""

import io
import json
import re
import shlex
from dataclasses import replace

import pytest
from cells import TASKS, failed_row, make_row, routed_row
from hydra import compose, initialize_config_module
from hydra.core.override_parser.overrides_parser import OverridesParser
from rich.console import Console

from launchers import rows
from launchers.job import resolved
from launchers.repeat import repeat, spelled
from launchers.results.show import command, explain, main, pick
from merging.errors import UserError

CHECKPOINTS = {"base": "b" * 64, **{task: task * 8 for task in TASKS}}
GATE = "router.gate.granularity=batch"
COMMANDS = [
    [],
    ["method=base"],
    ["method=expert", "seed=3"],
    ["method=ties", "method.density=0.1", "scale=fixed"],
    ["method=ties", "scale.scales=[0.1,1.0,2]", "engine.precision=bf16", "suite.sizes.val=20"],
    ["method=dare", "method@method.then=ties", "method.then.density=0.3", "seed=1"],
    ["method=dare", "method@method.then=neuron_mask", "method@method.then.then=average"],
    ["method=duet", "method@method.rest=tsv_m", "method.ranks.value=0.5", "router=oracle"],
    ["method=duet_all", "router=task_id_distillation", "router.train.warm_up.steps=7"],
    ["method=duet_svd_static", "router=entropy", "router.train.warm_up={_target_: merging.adapt.TaskId, steps: 3}"],
    ["method=duet", "router=task_id_distillation", "router.train.warm_up=null"],
    ["method=duet", "method.static_coef=1", "method.ranks.value=1"],  # not 1.0
    ["method=twin", "router=twin", GATE, "engine.batch=50"],
    ["method=duet_dynamic", "+method.rest.kinds.conv=0.25", "method.rest.kinds.attention=0.4"],
    ["backbone=clip_vit_b32", "experts=hub_a", "experts.revision='a b\\'s, [x]'", "suite=clip8", "method=tsv_m"],
    ["backbone=clip_vit_l14", "experts=task_vectors", "suite=clip14", "suite.limit=100", "method=smile", "output=o o"],
    ["backbone=clip_vit_b16", "experts=folder", "suite=folder", "suite.sources.pets.folder='/d $HOME/x=1'"],
    ["+suite.extra={a: [1, 1.0, true, null, 'null', '1', 'x y'], b: {c: 1e-5}}"],
]


def configured(overrides):
    with initialize_config_module("conf", version_base="1.3"):
        return resolved(compose("config", list(overrides)))


def row_of(overrides):
    """A row as `duet` with these overrides would have written it."""
    config = configured(overrides)
    method = next((each.partition("=")[2] for each in overrides if each.startswith("method=")), "task_arithmetic")
    row = make_row(method, seed=config["seed"])
    config = json.loads(json.dumps(config))  # as read from its file
    return replace(row, config=config, checkpoints=CHECKPOINTS, run_id=rows.run_id(config, CHECKPOINTS))


@pytest.mark.parametrize("overrides", COMMANDS, ids=" ".join)
def test_the_command_composes_to_the_same_run(overrides):
    row = row_of(overrides)
    again = repeat(row)
    first, *printed = shlex.split(command(again))
    config = configured(printed)

    assert first == "duet" and config == row.config
    assert rows.run_id(config, row.checkpoints) == row.run_id == again.run_id and again.exact(row)


def test_the_command_names_choices_and_no_knob_that_follows_from_them():
    row = row_of(["method=duet_all", "router=task_id_distillation", "seed=2", "method.init=0.5"])
    again = repeat(row)
    assert set(again.overrides) == {"method=duet_all", "router=task_id_distillation", "seed=2", "method.init=0.5"}
    assert again.knobs == {"method.init": (0.5, 0.3)}
    assert again.choices == {"method": ("duet_all", "task_arithmetic"), "router": ("task_id_distillation", "task_id")}
    assert repeat(row_of([])).overrides == ()


def test_a_row_of_an_older_configuration_says_what_it_lacks():
    row = row_of(["method=task_arithmetic", "method.scale=0.4"])
    config = {**row.config, "method": {key: value for key, value in row.config["method"].items() if key != "kinds"}}
    old = replace(row, config=config, run_id=rows.run_id(config, row.checkpoints))
    again = repeat(old)

    assert again.newer == ("method.kinds",) and again.run_id == row.run_id and not again.exact(old)
    assert "another version" in explained(old) and "lacks method.kinds" in " ".join(explained(old).split())


@pytest.mark.parametrize(
    "value", ["null", "1", "1e3", "true", "a b", "it's", "back\\", "\\'", "x,y", "{a}", "", "ü", "a:b"]
)
def test_text_stays_text(value):
    (parsed,) = OverridesParser.create().parse_overrides([f"key=[{spelled(value)},{spelled(value)}]"])
    assert [getattr(each, "text", each) for each in parsed.value()] == [value, value]


def explained(row, *others, **knobs):
    page = io.StringIO()
    explain(row, [*others, row], Console(file=page, width=100, color_system=None), **knobs)
    return page.getvalue()


def test_a_run_is_explained():
    base = replace(row_of(["method=base"]), macs=10**7, stored_bytes=10_000_000)
    routed = routed_row("duet", 0.72)
    told = row_of(["method=duet", "method.static_coef=0.5"])
    row = replace(routed, config=told.config, run_id=told.run_id, checkpoints=CHECKPOINTS, remarks=["Half of it."])
    alike = [[1.0 if one == other else 0.01 * (one + other) for other in range(8)] for one in range(8)]
    expert = make_row("expert", 0.9, checkpoints=CHECKPOINTS, similarity=alike)
    page = explained(row, expert, base, output="my runs")
    flat = " ".join(page.split())

    assert f"duet on mini8, run {row.run_id}: mean accuracy 75.5 %" in flat  # 72 and 3.5 for the tasks' steps
    norm = sum((0.72 + step / 100) / (0.9 + step / 100) for step in range(8)) / 8
    assert f"{100 * norm:.1f} % of the experts'" in flat
    for fact in ("DuetMerging: shared-factor", "Scale 0.3, picked by search on the val split", "Router task_id",
                 "500 images a task", "unlabelled calibration images", "15.0 MB to store, 1.50 x the base",
                 "1.26 x the base", "router 6.08 s", "11.3 s in all", "code 1a2b3c4",
                 "Half of it.", "0.070 on average, 0.130 for digits and textures"):  # fmt: skip
        assert fact in flat, fact
    assert re.search(r"method\.static_coef +0\.5 +1\.0", page) and re.search(r"textures +79\.0 +81\.4 +97\.0", page)
    assert shlex.split(page[page.index("Repeat it") :].splitlines()[1]) == [
        "duet", "method=duet", "method.static_coef=0.5", "output='my runs'"]  # fmt: skip
    assert "It is the same run" in page


def test_a_failed_run_and_one_of_an_unknown_method_are_explained():
    failed = replace(row_of(["method=ties"]), status="error", error="ValueError: rank 0", scores={}, seconds={})
    assert "failed, ValueError: rank 0" in explained(failed) and "duet method=ties" in explained(failed)

    gone = replace(failed_row("wizardry"), code="abc123")
    assert "conf/method does not have" in " ".join(explained(gone).split()) and "abc123" in explained(gone)


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
