"""`duet suite=none`: folders in, one folder out, without tasks or data; what cannot be done is refused first."""

import re
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace

import console
import pytest
import torch
from hf_folders import logits, tokenizer, written

import merging
from launchers import run
from launchers.merge_only import Folders
from launchers.preflight import PROCESS, memory_of
from merging import Experts, merge, open_merged
from merging.checkpoints import SafetensorsFile
from merging.methods import Dare, Ties, TsvM

transformers = pytest.importorskip("transformers")
NONE = ["suite=none", "experts.base=models/base", "experts.paths=[models/math,models/code]", "save=merged/"]


@pytest.fixture
def models(tmp_path):
    for seed, name in enumerate(("base", "math", "code")):
        written(tmp_path / "models" / name, seed, shards="1KB" if name == "math" else "5GB")
    return tmp_path / "models"


@pytest.fixture
def duet(monkeypatch, capsys, tmp_path):
    """Runs `duet` in this process and in an empty folder: (exit status, what it said)."""

    def call(*arguments):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["duet", *arguments])
        with console.logging_kept(), pytest.raises(SystemExit) as stop:
            run.main()
        said = "".join(capsys.readouterr())
        return (1, said + stop.value.code) if isinstance(stop.value.code, str) else (stop.value.code or 0, said)

    return call


def test_two_folders_become_one(duet, models, tmp_path):
    options = ["method=ties", "method.density=0.5", "method.kinds.all=[0.2,0.6]", "save_dtype=bf16", "shard_gb=1e-6"]
    code, said = duet(*NONE, *options)
    assert code == 0 and "saved" in said, said
    assert "merging math, code onto models/base: " in said
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    weights = [models / name for name in ("math/model.safetensors.index.json", "code/model.safetensors")]
    expected = merge(Ties(0.5, kinds={"all": [0.2, 0.6]}), models / "base" / "model.safetensors", weights).cast("bf16")
    state = model.state_dict()
    assert all((state[key] == weight).all() for key, weight in expected.state())
    assert logits(model).isfinite().all() and len(list((tmp_path / "merged").glob("model-*"))) > 2
    card = (tmp_path / "merged" / "README.md").read_text()
    assert "duet suite=none experts.base=models/base 'experts.paths=[models/math,models/code]'" in card
    assert not list((tmp_path / "outputs").rglob("*.json"))  # no row


def test_the_guide_runs_as_written(duet, models):
    """Its commands, the options of its table, then its Python."""
    guide = (Path(__file__).parents[2] / "docs" / "language.md").read_text().partition("\n## ")[2].partition("\n## ")[0]
    (command,), blocks = (
        re.findall(r"```bash\n(.*?)\n```", guide, re.S),
        re.findall(r"```python\n(.*?)```", guide, re.S),
    )
    assert duet(*shlex.split(command)[1:])[0] == 0
    model = run_in(blocks[0])["model"]
    assert torch.equal(logits(model), logits(merging.load("merged")))
    options = [shlex.split(cell)[0] for cell in re.findall(r"^\| `([^`]+)`", guide, re.M)]
    assert len(options) > 5
    changed = dict(word.split("=", 1) for word in (*shlex.split(command)[1:], *options))
    code, said = duet(*(f"{key}={value}" for key, value in changed.items()))
    assert code == 0, said
    assert len(blocks) == 2 and run_in(blocks[1])["merged"].tasks == ("task0", "task1")


def run_in(code):
    names: dict = {}
    exec(compile(code, "docs/language.md", "exec"), names)
    return names


def test_names_and_one_file(duet, models, tmp_path):
    paths = "experts.paths={x: models/math, y: models/code}"
    code, said = duet("suite=none", "experts.base=models/base", paths, "method=emr", "save=merged.safetensors")
    assert code == 0, said
    assert open_merged(tmp_path / "merged.safetensors").tasks == ("x", "y")


REFUSED = {
    "search": ({"scale": "search"}, r"no data to search a coefficient on: leave scale=fixed and set method\.scale"),
    "inputs": ({"method": "ada_merging"}, r"AdaMerging learns from inputs of every task\. Choose a method that needs"),
    "labels": ({"method": "multitask"}, r"Multitask learns from labels"),
    "validation": ({"method": "evo_merging"}, r"EvoMerging learns from labels"),
    "no trials": ({"method": "evo_merging", "method.keeping.trials": "0"}, r"trials=0 asks for no trial\. Give 1"),
    "router": ({"method": "twin", "router": "task_id"}, r"no data to train a router on: leave router=oracle"),
    "nowhere": ({"save": "null"}, r"nothing says where\. Name a folder or a file: save=merged/"),
    "ambiguous": ({"save": "new"}, r"new may be meant as a file or as a folder"),
    "input": ({"save": "models/math/"}, r"models/math/? is one of the inputs"),
    "missing": ({"experts.base": "models/bsae"}, r"There is no checkpoint at models/bsae"),
    "same name": ({"experts.paths": "[models/math,models/math]"}, r"two models called math: .* Name them"),
    "whole models": (
        {"save_adapter": "true"},
        r"An adapter is to be saved, and the expert for math, code is a whole mod",
    ),
    "adapter of whole matrices": (
        {"save_adapter": "true", "method": "ties"},
        r"An adapter is to be saved, and Ties makes whole matrices. .*average,.* and task_arithmetic make an adapter",
    ),
    "adapter in a file": (
        {"save": "a.safetensors", "save_adapter": "true"},
        r"writes a folder, and save=a\.safetensors is",
    ),
    "a model of the Hub": ({"experts.base": "some/llama"}, r"There is no .*folder of.* hf download some/llama --local"),
    "no base": ({"experts.base": "???"}, r"experts\.base has no value\. Set it: experts\.base="),
    "no size": ({"shard_gb": "0"}, r"shard_gb=0 cannot be used: it must be greater than 0"),
    "no paths": ({"experts.paths": "[]"}, r"There is no task to merge"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(duet, models, tmp_path, case):
    changed, message = REFUSED[case]
    given = dict(word.split("=", 1) for word in NONE) | changed
    code, said = duet(*(f"{key}={value}" for key, value in given.items()))
    assert code == 1 and re.search(message, said) and "Traceback" not in said, said
    assert not (tmp_path / "merged").exists() and "merging math" not in said


def test_tokenizers_that_differ_are_refused_before_a_weight_is_read(duet, models, monkeypatch):
    tokenizer(["<pad>", "<s>", "</s>", *"gfedcba"]).save_pretrained(models / "code")
    monkeypatch.setattr(SafetensorsFile, "tensor", lambda *_: pytest.fail("a weight was read"))
    code, said = duet(*NONE)
    assert code == 1 and re.search(
        r"tokenizers differ: 'a' has the id 9 in code .* 3 in the base.*vocabulary=union", said
    ), said


def test_disk_and_memory_are_told_first(duet, models, tmp_path, monkeypatch):
    code, said = duet(*NONE, "method=average", "save_dtype=bf16")
    size = sum((tmp_path / "merged" / name).stat().st_size for name in ("model.safetensors",))
    pattern = (
        r"merging math, code onto models/base\S*: ([\d,]+) parameters; 0\.00 GB into merged/, [\d.]+ GB are free; mem"
    )
    assert code == 0 and (line := re.search(pattern + r"ory from 0\.6 GB, [\d.]+ GB are free", said)), said
    assert 2 * int(line[1].replace(",", "")) < size < 2 * int(line[1].replace(",", "")) + 4000  # and the header
    monkeypatch.setattr(SafetensorsFile, "tensor", lambda *_: pytest.fail("a weight was read"))
    monkeypatch.setattr("launchers.preflight.memory", lambda: 10**8)
    code, said = duet(*NONE, "method=tsv_m", "save=other/")
    assert code == 1 and re.search(r"TsvM takes 0\.6 GB of memory at least for \S+ parameters, and 0\.1 GB are", said)
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=1))
    code, said = duet(*NONE, "save=other/")
    assert code == 1 and re.search(r"other/ takes 0\.00 GB, and \S+ has 0\.00 GB free\. Free some space", said), said
    assert not (tmp_path / "other").exists()


def test_memory_of_methods(models):
    experts = Experts.open(models / "base", [models / "math", models / "code"])
    sizes = [spec.shape.numel() for spec in experts.specs().values()]
    assert memory_of(TsvM(), experts) - PROCESS == 4 * (sum(sizes) + 4 * max(sizes))
    assert memory_of(Dare(then=TsvM()), experts) == memory_of(TsvM(), experts)
    assert memory_of(Dare(then=Ties()), experts) - PROCESS == 4 * sum(sizes)  # that of a small model is kept


def test_push_without_a_token_computes_nothing(duet, models, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    code, said = duet(*NONE, "push=user/merged")
    assert code == 1 and "push=user/merged needs a token" in said and not (tmp_path / "merged").exists()
    code, said = duet("-m", *NONE, "method=ties,average")
    assert code == 1 and "save=merged/ would be overwritten by every job of this sweep" in said


def test_tasks_and_no_tasks_are_not_mixed(duet):
    code, said = duet("experts=folders", "experts.base=models/base", "experts.paths=[models/math]")
    assert code == 1 and "experts=folders is for suite=none" in said
    code, said = duet("suite=none", "experts=mini8", "save=merged/")
    assert code == 1 and "leave experts=folders" in said


def test_models_are_named_by_their_paths():
    paths = ["a/model.safetensors", "b.safetensors", "c/qwen-2.5"]
    assert [*Folders("base", paths).named] == ["a", "b", "qwen-2.5"]
