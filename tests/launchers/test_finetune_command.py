"""`duet-finetune` on two tasks and a handful of images, in this process."""

import sys

import console
import pytest

from launchers import finetune
from launchers.claims import claim
from merging.checkpoints import SafetensorsFile
from merging.errors import UserError
from tasks.engine import Engine
from tasks.expert_files import Bench
from tasks.mini.experts import FineTuned
from tasks.mini.model import BASE
from tasks.vision.families import HubFamily
from tasks.vision.folder import pretrained

TINY = ["backbone=mini_clip", "suite=mini8", *console.TINY[:5], "recipe.steps=3", "recipe.batch=8", "recipe.warmup=1",
        f"experts.base={BASE}"]  # fmt: skip


@pytest.fixture
def finetune_here(monkeypatch, capsys, tmp_path):
    """Runs `duet-finetune` in this process: (exit status, stdout, stderr)."""

    def call(*arguments):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["duet-finetune", *TINY, *arguments])
        with console.logging_kept(), pytest.raises(SystemExit) as stop:
            finetune.main()
        page, errors = capsys.readouterr()
        return (1, page, errors + stop.value.code) if isinstance(stop.value.code, str) else (stop.value.code or 0, page,
                                                                                            errors)  # fmt: skip

    return call


@pytest.fixture
def made(monkeypatch):
    """The tasks that an expert was made or found for, and whether it was made."""
    names, honest = [], Bench.make

    def noting(self, task):
        found = honest(self, task)
        names.append((task.name, found.fresh))
        return found

    monkeypatch.setattr(Bench, "make", noting)
    return names


def test_one_expert_per_task_then_none_again(finetune_here, tmp_path, made):
    status, page, errors = finetune_here("folder=own")
    assert status == 0, errors
    assert made == [("cars", True), ("digits", True)]
    assert "val before" in page and "own/cars.safetensors" in page and "own/digits.safetensors" in page
    assert "cars:" in errors and "% on val, own/cars.safetensors" in errors
    assert SafetensorsFile(tmp_path / "own" / "cars.safetensors").metadata["family"] == "folder"

    status, page, errors = finetune_here("folder=own")
    assert status == 0 and made[2:] == [("cars", False), ("digits", False)] and page.count("was there") == 2

    status, page, errors = finetune_here("folder=own", "recipe.lr=1e-4")
    assert status == 1 and "recipe.lr=1e-05, now 0.0001" in errors and "Traceback" not in errors and len(made) == 4


def test_processes_share_the_tasks(finetune_here, tmp_path, made):
    with claim(tmp_path / "own" / ".training", "cars"):
        status, page, errors = finetune_here("folder=own")
        assert status == 0 and made == [("digits", True)] and "cars.safetensors" not in page
        assert "cars: being trained by" in errors
    assert finetune_here("folder=own")[0] == 0 and made[1:] == [("cars", True), ("digits", False)]


def test_one_task_that_fails_stops_no_other(finetune_here, tmp_path, monkeypatch, made):
    honest = Bench.check
    monkeypatch.setattr(Bench, "facts", refusing(Bench.facts, "cars"))
    monkeypatch.setattr(Bench, "check", lambda self, name: None if name == "cars" else honest(self, name))
    status, _, errors = finetune_here("folder=own")
    assert status == 1 and made == [("digits", True)] and "cars is broken" in errors and "Traceback" not in errors


def refusing(honest, task):
    def facts(self, name, recipe):
        if name == task:
            raise UserError(f"{name} is broken")
        return honest(self, name, recipe)

    return facts


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["folder={unwritable}"], "Cannot write to folder="),
        (["recipe.accumulate=9"], "recipe: accumulate=9 is out of range"),
        (["recipe.optimizer=sgd"], "recipe.optimizer=sgd cannot be used: it must be 'adamw' or 'adam'."),
        (["engine.precision=fp8"], "engine.precision=fp8 cannot be used: it must be "),
        (["experts.base=nowhere.safetensors"], "There is no nowhere.safetensors"),
        (["suite.tasks=[trucks]"], "There is no task 'trucks'"),
    ],
)
def test_bad_input_is_one_paragraph(finetune_here, unwritable, made, wrong, message):
    status, page, errors = finetune_here(*(each.format(unwritable=unwritable) for each in wrong))
    assert status == 1 and message in errors and "Traceback" not in errors and not page and not made


def test_experts_that_make_themselves_name_no_base(cache):
    with pytest.raises(UserError, match=r"experts=mini8 makes its own experts.*experts\.base="):
        pretrained(FineTuned(), None, None, cache)  # type: ignore[arg-type]


def test_auto_is_bf16_on_a_gpu_only(monkeypatch):
    from hydra import compose, initialize_config_module
    from hydra.utils import instantiate

    with initialize_config_module("conf", version_base="1.3"):
        automatic, chosen = (compose("finetune", given) for given in ([], ["engine.precision=fp32"]))
    gpu = type("Gpu", (), {"type": "cuda", "index": None})()
    for place, want in ((Engine("cpu").torch_device, "fp32"), (gpu, "bf16")):
        monkeypatch.setattr(Engine, "torch_device", property(lambda self, place=place: place))
        monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
        assert instantiate(automatic.engine).precision == want and instantiate(chosen.engine).precision == "fp32"


def test_the_published_families_start_from_the_published_base(monkeypatch, cache):
    asked, base = [], object()
    monkeypatch.setattr("tasks.vision.folder.open_base", lambda *given: asked.append(given) or base)
    monkeypatch.setattr("tasks.vision.folder.check_tower", lambda *given: None)
    monkeypatch.setattr("tasks.vision.folder.tower_shapes", lambda *given: {})
    monkeypatch.setattr("tasks.vision.folder.below", lambda whole, prefix: (whole, prefix))
    found = pretrained(HubFamily("hub_a", base_revision="abc"), None, "backbone", cache)  # type: ignore[arg-type]
    assert found == (base, "visual.") and asked == [("backbone", cache, "abc")]


def test_the_base_is_not_written_over(finetune_here, tmp_path, made):
    folder = tmp_path / "own"
    folder.mkdir()
    base = folder / "cars.safetensors"
    base.write_bytes(BASE.read_bytes())
    status, _, errors = finetune_here("folder=own", f"experts.base={base}", "redo=true")
    assert status == 1 and not made and base.read_bytes() == BASE.read_bytes()
    assert "own/cars.safetensors is one of the inputs" in errors and "Traceback" not in errors
