"""Bad input ends with one paragraph that says what, where and what would be right; nothing is left behind."""

import re

import console
import pytest

from launchers import job
from launchers.claims import Taken

MISTAKES = {
    "group": (["method=tise"], r"(?s)tise.*average.*ties.*tsv_m"),
    "key": (["method=ties", "method.densty=0.1"], r"There is no method\.densty\. Did you mean density\? method has: "),
    "top key": (["sede=1"], r"There is no sede\. Did you mean seed\?"),
    "knob": (["method=ties", "method.density=0"], r"ties: density=0 is out of range: it must lie in \(0\.0, 1\.0\]"),
    "nested knob": (["method=dare", "method@method.then=ties", "method.then.density=2"], r"density=2 is out of range"),
    "choice": (["method=ties", "method.merge=max"], r"merge=max cannot be used: it must be 'sum' or 'mean'\."),
    "recipe": (["experts.recipe.lr=0"], r"recipe: lr=0\S* is out of range"),
    "no task": (["suite.tasks=[]"], r"the list of tasks is empty"),
    "unknown task": (["suite.tasks=[carz]"], r"no task 'carz' in the suite mini8\. It has: scenes, cars, "),
    "same task twice": (["suite.tasks=[cars,cars]"], r"cars is listed more than once"),
    "empty split": (["suite.sizes.test=0"], r"suite\.sizes\.test=0 leaves the split test"),
    "no scales": (["scale=search", "scale.scales=[]"], r"scale\.scales is empty"),
    "test for search": (["scale=search", "scale.split=test"], r"would choose on the split that is reported"),
    "router": (["method=duet", "router=task_di"], r"(?s)task_di.*oracle.*task_id"),
    "router key": (["router.gate.sess=early"], r"There is no router\.gate\.sess\. Did you mean sees\?"),
    "gate": (["method=duet", "router.gate.sees=blok"], r"router\.gate\.sees=blok cannot be used: it must be 'block', "),
    "gates at odds": (["method=twin", "router.gate.sees=early", "router.gate.shared=true"], r"shared=false"),
    "training": (["method=duet", "router.train.lr=0"], r"router\.train\.lr=0\S* is out of range"),
    "backbone": (["method=average", "backbone=clip_vit_b32"], r"does not fit backbone=clip_vit_b32: it lacks visual\."),
    "neurons": (["method=duet", "method.neurons.ratio=0"], r"neurons: ratio=0 is out of range"),
    "tracker": (["tracker=wandb", "tracker.mode=onlin"], r"tracker\.mode=onlin cannot be used: it must be 'auto', "),
    "text for a number": (["method.scale=abc"], r"method\.scale=abc cannot be used: it must be a valid number\."),
    "one for many": (
        ["scale=search", "scale.scales=0.3"],
        r"it must be a valid array\. Write 'scale\.scales=\[0\.3\]'\.",
    ),
    "device": (["engine.device=mps"], r"engine\.device='mps' cannot be used\. Choose auto, cpu, cuda or cuda:1\."),
    "added key": (["+sede=1"], r"There is no sede\. Did you mean seed\? .* Nothing reads it\."),
    "added option": (["+method.scal=1"], r"There is no method\.scal\. Did you mean scale\?"),
    "plot": (
        ["plot={kind: pie}"],
        r"plot of this command cannot be drawn: kind: .* Write e\.g\. \{kind: curve, x: ",
    ),
    "plot of nothing": (["plot=curve"], r"plot of this command cannot be drawn: curve is no mapping\."),
    "no limit": (["cache_gb=-1"], r"cache_gb=-1 cannot be used: it must be greater than 0\."),
    "seed": (["seed=99999999999999999999"], r"seed=9+ cannot be used: it must be less than 9223372036854775808\."),
    "probe": (["probe=banana"], r"probe=banana cannot be used: it must be a valid boolean\."),
    "ranks": (["method=duet", "method.ranks.value=-1"], r"ranks: value=-1 is out of range: it must lie in \[0"),
    "number of experts": (["method=slerp", "suite.tasks=[cars]"], r"slerp merges 2 experts, and here are 1\."),
    "nothing to choose": (["suite=null"], r"There is no suite, which every run needs\. Choose one: suite=<name>\."),
    "nothing chosen": (["~method"], r"There is no method, which every run needs\. Choose one: method=<name>\."),
    "value in a mapping": (["method.kinds.norm=abc"], r"method\.kinds\.norm=abc cannot be used: it must be a valid "),
    "nowhere": (["save="], r"There is no path to save to\. Name a file, <name>\.safetensors, or a folder, <name>/\."),
    "option of nothing": (["tracker.x=1"], r"There is no tracker\.x\. tracker has none\."),
    "environment": (["save=${oc.env:NOT_THERE}"], r"save has no value: .*variable 'NOT_THERE' not found"),
}


@pytest.mark.parametrize(("arguments", "message"), MISTAKES.values(), ids=MISTAKES.keys())
def test_a_mistake_is_explained(duet_here, tmp_path, arguments, message):
    code, page, errors = duet_here(tmp_path / "outputs", *arguments)

    assert code == 1 and page == ""
    assert "Traceback" not in errors
    assert re.search(message, errors), errors
    assert not list((tmp_path / "outputs").rglob("*.json"))


def test_the_console_script_ends_the_same_way(tmp_path):
    process = console.duet(tmp_path / "outputs", "method=ties", "method.density=7")
    assert process.returncode == 1 and process.stdout == ""
    assert re.fullmatch(r"[\d:]{8} ties: density=7 is out of range: it must lie in \(0\.0, 1\.0\]\.\n", process.stderr)


def test_an_output_folder_that_cannot_be_written(duet_here, unwritable):
    for mode in ([], ["-m"]):
        code, _, errors = duet_here(unwritable, *mode)
        assert code == 1 and "Traceback" not in errors
        assert re.search(rf"Cannot write to output={unwritable}: Not a directory", errors), errors


@pytest.mark.parametrize("named", ["", "null"])
def test_an_output_that_names_no_folder(duet_here, tmp_path, monkeypatch, named):
    for mode in ([], ["-m"]):
        code, _, errors = duet_here(named, *mode)
        assert code == 1 and errors == "output= names no folder. Write output=<folder>, such as output=outputs."
    assert not list(tmp_path.iterdir())


def test_a_cell_that_another_process_has_taken_since_is_no_failure(duet_here, output, monkeypatch):
    def finish(cell, *_, **__):
        raise Taken("node7, process 4711")

    monkeypatch.setattr(job, "finish", finish)
    code, _, errors = duet_here(output, "method=average")
    assert code == 0 and "average: being computed by node7, process 4711; run the same command again" in errors


def test_a_sweep_that_would_overwrite_its_own_models(duet_here, tmp_path):
    for group in ("method=average,ties", "experiment=mini8_static"):
        code, _, errors = duet_here(tmp_path / "outputs", "-m", group, f"save={tmp_path}/model.safetensors")
        assert code == 1 and "Traceback" not in errors
        assert "would be overwritten by every job of this sweep" in errors and "${hydra:job.num}" in errors
        assert not list(tmp_path.glob("outputs/r*"))


def test_a_model_that_cannot_be_saved(duet_here, output, unwritable):
    code, _, errors = duet_here(output, "method=average", f"save={unwritable}/model.safetensors")
    assert code == 1 and "Traceback" not in errors
    assert f"Cannot write to save={unwritable}" in errors and "mean score" not in errors


def test_a_folder_of_what_transformers_does_not_load(duet_here, output, tmp_path):
    code, _, errors = duet_here(output, "method=average", f"save={tmp_path}/merged/")
    assert code == 1 and "Traceback" not in errors and "mean score" not in errors
    assert "is to be a folder of transformers, and the base" in errors and "merged.safetensors" in errors
