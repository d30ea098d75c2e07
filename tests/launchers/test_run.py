"""From the command line to rows, table and saved model."""

import json
import os
import signal
import subprocess
from dataclasses import asdict
from pathlib import Path

import console
import pytest
import yaml
from console import by_method
from hydra import compose, initialize_config_module
from hydra.utils import instantiate
from processes import interruptible
from wandb_file import read_run

import merging
from launchers import rows
from merging import open_merged
from merging.checkpoints import SafetensorsFile
from tasks.evaluate import outcome
from tasks.mini.model import BASE

SHIPPED = json.loads(BASE.with_suffix(".json").read_text())


@pytest.fixture
def built():
    """Suite and backbone as the command line of the tests configures them."""
    with initialize_config_module("conf", version_base="1.3"):
        config = compose("config", console.TINY)
    return instantiate(config.suite), instantiate(config.backbone, _convert_="all")


def found(output):
    return sorted(rows.read(output / "results"), key=lambda row: (row.method, row.run_id))


def listed(page, *methods):
    """How often each method begins a line of the printed table."""
    words = [line.split(" ")[0] for line in page.splitlines()]
    return [words.count(method) for method in methods]


def test_a_run_leaves_three_rows_and_a_table(first_run):
    assert sorted(first_run.rows) == ["base", "expert", "task_arithmetic"]
    assert listed(first_run.process.stdout, "base", "task_arithmetic", "expert") == [1, 1, 1]
    (folder,) = (first_run.output / "runs").iterdir()
    assert {"table.md", "heatmap.png", "rows.json", "run.log"} <= {path.name for path in folder.iterdir()}
    assert os.listdir(first_run.output.parent) == ["outputs"]  # nothing beside it


def test_the_experts_row_says_how_alike_they_are(first_run):
    (one, above), (below, other) = first_run.rows["expert"].similarity
    assert one == other == 1 and above == below and -1 < above < 1
    assert first_run.rows["base"].similarity == first_run.rows["task_arithmetic"].similarity == []


def test_rows_say_where_their_numbers_come_from(first_run, built):
    suite, backbone = built
    splits = {task.name: task.split("test") for task in suite.tasks}
    for name, row in first_run.rows.items():
        assert row.status == "ok" and row.error is None and row.needs == "nothing" and row.seed == 0
        assert row.tasks == list(row.accuracy) == console.TASKS and row.family == "mini8" and row.code
        assert row.splits == {t: {"name": "test", "id": s.id, "size": len(s)} for t, s in splits.items()}
        assert list(row.checkpoints) == ["base", *console.TASKS] and len(set(row.checkpoints.values())) == 3
        assert row.checkpoints["base"] == SHIPPED["sha256"]
        assert set(row.seconds) == {"merge", "search", "score"} and row.macs == backbone.macs > 10**6
        assert row.router == ("oracle" if name == "expert" else "none")
        assert set(row.config) == {"backbone", "experts", "suite", "method", "scale", "router", "engine", "seed"}
        assert row.config["router"] is None and row.adaptation == "none" and row.params >= 0 and row.routing == {}
    merged, base, expert = (first_run.rows[name] for name in ("task_arithmetic", "base", "expert"))
    assert merged.scale in (0.3, 1.0) and merged.scale_source == "search:val"
    assert list(merged.validation) == console.TASKS and base.validation is None and base.scale_source == "-"
    assert expert.stored_bytes > merged.stored_bytes >= base.stored_bytes > 4_000_000


def test_a_second_run_finds_what_the_first_computed(first_run, duet_here):
    before = {path: path.stat().st_mtime_ns for path in (first_run.output / "results").iterdir()}
    code, page, errors = duet_here(first_run.output, "scale=search", "scale.scales=[0.3,1.0]")

    assert code == 0 and "task_arithmetic: found in" in errors and page == first_run.process.stdout
    assert "fine-tuning" not in errors and "mean score" not in errors
    assert {path: path.stat().st_mtime_ns for path in (first_run.output / "results").iterdir()} == before


def test_redo_computes_again_and_gets_the_same(output, duet_here):
    assert duet_here(output, "method=average")[2].count("mean score") == 3
    first = found(output)
    code, _, errors = duet_here(output, "method=average", "redo=true")

    assert code == 0 and "found in" not in errors
    assert errors.count("mean score") == 1  # base and experts are redone by method=base and method=expert
    timing = {"seconds": {}, "created": ""}
    assert [asdict(row) | timing for row in found(output)] == [asdict(row) | timing for row in first]


def test_a_knob_makes_another_cell(output, duet_here):
    """The base and the experts do not depend on it."""
    first, second = (duet_here(output, f"method.scale={scale}")[2] for scale in (0.3, 0.5))
    assert first.count("mean score") == 3 and second.count("mean score") == 1
    assert [row.method for row in found(output)] == ["base", "expert", "task_arithmetic", "task_arithmetic"]
    assert {row.scale for row in found(output)} == {None, 0.3, 0.5}


def test_a_routed_run_says_where_the_images_went(output, duet_here):
    code, page, errors = duet_here(output, "-m", "method=duet", "router=task_id,oracle")
    assert code == 0, errors
    every = {(row.method, row.router): row for row in found(output)}
    gated, told, base = every["duet", "task_id"], every["duet", "oracle"], every["base", "none"]

    assert len(every) == 4  # with the experts
    matrix, right = gated.routing["matrix"], gated.routing["accuracy"]
    assert [sum(weights) for weights in matrix] == pytest.approx([1, 1], abs=1e-5)
    assert all(0 <= weight <= 1 for weights in matrix for weight in weights) and matrix[0] != matrix[1]
    assert list(right) == console.TASKS and all(0.5 < share <= 1 for share in right.values())  # cars are no digits
    assert gated.granularity == "sample" and gated.needs == "inputs" and gated.collapsed == []
    assert gated.adaptation == told.adaptation == "calibration"  # without gates still for the neuron masks
    assert gated.params > told.params > 0 and gated.stored_bytes > told.stored_bytes > base.stored_bytes
    assert gated.macs > base.macs == told.macs and told.routing == {}
    assert gated.seconds["router"] > told.seconds["router"]
    ffn = [key for key in gated.energy if ".mlp." in key]
    assert ffn == list(gated.energy) and all(0 < share <= 1 for key in ffn for share in gated.energy[key])
    assert gated.config["router"]["name"] == "task_id" and told.config["router"]["name"] == "oracle"

    assert "\nduet router=task_id " in page and "\nduet router=oracle " in page and "routing accuracy" in errors
    assert "never bold): duet router=oracle." in page and "x1.00" in page
    (sweep,) = (output / "runs").iterdir()
    pictures = {path.relative_to(sweep).as_posix() for path in sweep.rglob("routing.png")}
    assert pictures == {"routing.png"}  # a job draws only for a tracker that shows pictures


def test_gates_trained_on_test_images_are_marked(output, duet_here):
    code, page, errors = duet_here(output, "method=duet", "router.split=test", "router.train.steps=3")
    assert code == 0, errors
    (row,) = [row for row in found(output) if row.method == "duet"]
    assert row.adaptation == "test" and row.needs == "inputs" and row.routing
    assert (
        "Saw the unlabelled test samples (transductive; no fair rival, never bold): duet." in page and " adapt " in page
    )


def test_what_has_no_gates_is_the_same_under_every_router(output, duet_here):
    assert duet_here(output, "method=ffn_oracle", "router=task_id")[2].count("mean score") == 3
    errors = duet_here(output, "method=ffn_oracle", "router=oracle")[2]
    assert "ffn_oracle: found in" in errors and "mean score" not in errors and len(found(output)) == 3


def test_a_swept_save_writes_a_file_per_job(output, duet_here, tmp_path):
    methods = "method=average,task_arithmetic"
    save = f"save={tmp_path}/${{hydra:job.num}}-${{hydra:runtime.choices.method}}.safetensors"
    assert duet_here(output, "-m", methods, save)[0] == 0
    assert sorted(path.name for path in tmp_path.glob("*.safetensors")) == [
        "0-average.safetensors", "1-task_arithmetic.safetensors"
    ]  # fmt: skip
    first, second = (tmp_path / f"{name}.safetensors" for name in "ab")
    code, _, errors = duet_here(output, "-m", "method=average", f"save={first},{second}")
    assert code == 0, errors
    assert first.read_bytes() == second.read_bytes()


def test_a_sweep_is_one_table_and_a_tracked_run_per_job(output):
    process = console.duet(output, "-m", "method=average,duet", "tracker=wandb", f"tracker.folder={output}")

    assert process.returncode == 0, process.stderr
    assert listed(process.stdout, "base", "average", "duet", "expert") == [1, 1, 1, 1]
    every = {row.method: row for row in found(output)}
    assert len(every) == 4 and len(list(output.glob("wandb/offline-run-*"))) == 2
    for method in ("average", "duet"):
        config, history, summary, exit_code = read_run(output, every[method].run_id)
        assert exit_code == 0 and summary["status"] == "ok"
        assert config["method"] == every[method].config["method"]
        assert config["row"]["checkpoints"] == every[method].checkpoints
        for task, value in every[method].accuracy.items():
            assert history[f"accuracy/{task}"] == [value] == [summary[f"accuracy/{task}"]]
    assert "routing.path" in read_run(output, every["duet"].run_id)[1]
    told = read_run(output, every["average"].run_id)[1]  # the first job also scored the references
    assert {
        f"{m}/{t}": [every[m].accuracy[t]] for m in ("base", "expert") for t in console.TASKS
    }.items() <= told.items()


def test_a_failing_job_does_not_stop_the_sweep(output, duet_here, monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parent)
    targets = "method._target_=throwing.Throws,merging.methods.TaskArithmetic,merging.methods.Average"
    code, page, errors = duet_here(output, "-m", "method=average", targets)

    assert code == 1 and "ZeroDivisionError: nothing to merge by" in errors
    every = found(output)
    (failed,) = [row for row in every if row.status == "error"]
    assert failed.error == "ZeroDivisionError: nothing to merge by" and failed.accuracy == {}
    assert failed.config["method"]["_target_"] == "throwing.Throws"
    assert sum(row.method == "average" and row.status == "ok" for row in every) == 2
    assert "failed" in page and listed(page, "base", "expert") == [1, 1]


def test_a_saved_model_scores_what_the_row_says(output, duet_here, built, tmp_path):
    suite, backbone = built
    path = tmp_path / "models" / "merged.safetensors"
    assert duet_here(output, f"save={path}")[0] == 0
    model = merging.load(path)

    (row,) = [row for row in found(output) if row.method == "task_arithmetic"]
    assert {t.name: outcome(model, backbone, t, "test").score.value for t in suite.tasks} == row.accuracy
    assert json.loads(SafetensorsFile(path).metadata["provenance"])["run_id"] == row.run_id


def test_ctrl_c_leaves_status_130_and_one_line(tmp_path):
    command = console.command(tmp_path / "outputs", "experts.recipe.steps=1000000")
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with interruptible(command, cwd=tmp_path, **pipes) as process:
        for line in process.stderr:
            if "fine-tuning" in line:
                break
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)

    assert process.returncode == 130 and "run the same command to go on" in errors and "Traceback" not in errors
    assert not (tmp_path / "outputs" / "results").exists()


def test_the_configuration_is_readable(duet_here, tmp_path):
    code, page, _ = duet_here(tmp_path, "--cfg=job", "method=ties")
    config = yaml.safe_load(page)
    assert code == 0 and config["method"] == {
        "_target_": "merging.methods.Ties", "density": 0.2, "merge": "sum", "scale": 0.3,
        "kinds": dict.fromkeys(("all", "attention", "ffn", "norm", "other")),
    }  # fmt: skip
    assert config["suite"]["tasks"] == console.TASKS

    code, page, _ = duet_here(tmp_path, "--help")
    assert code == 0 and "duet -m method=ties" in page and "tsv_m" in page


def test_a_setting_may_be_scored_on_validation(output, duet_here):
    status, page, _ = duet_here(output, "method=average", "split=val")
    row = by_method(output)["average"]
    assert status == 0 and "mini8 (val split)" in page
    assert {(split["name"], split["size"]) for split in row.splits.values()} == {("val", 12), ("val", 160)}
    status, _, errors = duet_here(output, "method=average", "split=train")
    assert status == 1 and "split=train cannot be used: it must be 'test' or 'val'" in errors


def test_another_dtype_is_another_cell_and_what_is_saved_was_scored(output, duet_here, tmp_path):
    saved = tmp_path / "merged.safetensors"
    for more in ([], ["save_dtype=fp16", f"save={saved}"]):
        code, _, errors = duet_here(output, "method=average", *more)
        assert code == 0, errors
    whole, half = sorted((row for row in found(output) if row.method == "average"), key=lambda row: -row.stored_bytes)
    assert "save_dtype" not in whole.config and half.config["save_dtype"] == "fp16" and not whole.remarks
    assert half.remarks == ["average: what all inputs share is scored and saved as fp16"]
    assert len([row for row in found(output) if row.method in ("base", "expert")]) == 2  # as they were
    merged = open_merged(saved)
    assert half.stored_bytes == merged.stored_bytes == whole.stored_bytes / 2
    assert [merged.provenance["base"], *merged.provenance["experts"]] == list(half.checkpoints.values())
    code, _, errors = duet_here(output, "save_dtype=int8")
    assert code == 1 and "int8" in errors and "Traceback" not in errors


def test_an_input_is_not_saved_over(output, duet_here, tmp_path):
    link = tmp_path / "mine.safetensors"
    link.symlink_to(BASE)
    before = BASE.read_bytes()
    code, _, errors = duet_here(output, "method=average", f"save={link}", "redo=true")
    assert code == 1 and "is one of the inputs" in errors and "mean score" not in errors
    assert "Traceback" not in errors and link.read_bytes() == BASE.read_bytes() == before
