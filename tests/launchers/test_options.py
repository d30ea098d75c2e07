"""Options of the wrong type are refused before anything is built, in the words of the command line."""

import re
from pathlib import Path

import pytest
from hydra import compose, initialize_config_module

import conf
from launchers.options import FINETUNE, RUN, check, options
from merging.errors import UserError

FILES = sorted(Path(conf.__path__[0]).rglob("*.yaml"))
TARGETS = sorted({name for file in FILES for name in re.findall(r"_target_: *([\w.]+)", file.read_text())})
RECIPES = [file.stem for file in FILES if file.parent.name == "recipe"]


def checked(*overrides, name="config", schema=RUN):
    with initialize_config_module("conf", version_base="1.3"):
        check(compose(name, list(overrides)), overrides, schema)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["method.scale=abc"], "method.scale=abc cannot be used: it must be a valid number."),
        (["method.scale=true"], "method.scale=true cannot be used: it must be a valid number."),
        (["method.scale=nan"], "method.scale=NaN cannot be used: it must be a finite number."),
        (["seed=1.5"], "seed=1.5 cannot be used: it must be a valid integer."),
        (["seed=true"], "seed=true cannot be used: it must be a valid integer."),
        (["redo=1"], "redo=1 cannot be used: it must be a valid boolean."),
        (["save=2024"], "save=2024 cannot be used: it must be a valid string or null. Write 'save=\"2024\"'."),
        (["suite.tasks=cars"],
         "suite.tasks=cars cannot be used: it must be a valid array. Write 'suite.tasks=[cars]'."),
        (["scale.scales=0.3"],
         "scale.scales=0.3 cannot be used: it must be a valid array. Write 'scale.scales=[0.3]'."),
        (["experts.recipe.lr=[0.1]"], "experts.recipe.lr=[0.1] cannot be used: it must be a valid number."),
        (["suite.sizes.test=3.5"], "suite.sizes.test=3.5 cannot be used: it must be a valid integer."),
        (["method=twin", "method.rank=a"], "method.rank=a cannot be used: it must be a valid integer or null."),
        (["method=dare", "method@method.then=ties", "method.then.merge=max"],
         "method.then.merge=max cannot be used: it must be 'sum' or 'mean'."),
        (["method=duet", "method.rest=5"], "method.rest=5 cannot be used: it must be an object."),
        (["router.gate.depth=4"], "router.gate.depth=4 cannot be used: it must be 1, 2 or 3."),
        (["split=train"], "split=train cannot be used: it must be 'test' or 'val'."),
        (["save_dtype=int8"], "save_dtype=int8 cannot be used: it must be 'fp32', 'bf16' or 'fp16' or null."),
        (["+method.scal=1"], "There is no method.scal. Did you mean scale? method has: scale, kinds."),
        (["experts=folder", "+experts.paths.Cars=a.pt"],
         "There is no experts.paths.Cars. Did you mean cars? experts.paths has: scenes, cars, "),
        (["suite=folder", "suite.tasks=[pets]", "+suite.sources.dogs.folder=a"], "There is no suite.sources.dogs. "),
        (["+sede=1"], "There is no sede. Did you mean seed? "),
        (["seed=${sed}"], "experts.seed has no value: Interpolation key 'sed' not found. "),
        (["~method"], "There is no method, which every run needs. Choose one: method=<name>."),
    ],
)  # fmt: skip
def test_a_wrong_value_is_named_with_what_would_be_right(overrides, message):
    with pytest.raises(UserError) as error:
        checked(*overrides)
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "overrides",
    [
        ["method.scale=1", "cache_gb=1", "scale.scales=[1,0.5]"],  # whole numbers are numbers
        ["method=twin", "method.start=null", "method.rank=3"],
        ["method=duet", "method.ranks.task=full", "router.gate.top_k=0.5"],
        ["+folder=/data", "save=${folder}/model.safetensors"],  # referred to
        ["suite=folder", "+suite.sources.dogs={folder: /data/dogs, args: [a]}", "suite.text={repo: a, filename: b}"],
        ["suite=folder", "~suite.sources.pets", "+suite.sources.dogs.folder=a"],
        ["experts=folder", "+experts.paths.cars=/data/cars.pt"],
        ["experts=folder", "suite=folder", "+suite.sources.dogs.folder=a", "+experts.paths.dogs=b.pt"],
    ],
)
def test_a_right_value_passes(overrides):
    checked(*overrides)


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_passes(recipe):
    checked(f"recipe={recipe}", name="finetune", schema=FINETUNE)


def test_every_shipped_target_tells_its_options():
    assert [target for target in TARGETS if options(target) is None] == []


def test_a_class_of_a_user_is_read_too(tmp_path, monkeypatch):
    (tmp_path / "my_methods.py").write_text(
        "from dataclasses import dataclass, field\nfrom typing import ClassVar, Literal\nimport torch\n\n"
        "Kind = Literal['a', 'b']\n\n@dataclass(frozen=True)\nclass Base:\n    share: float = 0.5\n\n"
        "@dataclass(frozen=True)\nclass Mine(Base):\n    kind: 'Kind | None' = None\n    where: torch.device = None\n"
        "    needs: ClassVar[str] = 'nothing'\n    _kept: int = field(default=0, init=False)\n\n"
        "def free(**anything): ...\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    types = options("my_methods.Mine")
    assert types is not None and list(types) == ["share", "kind", "where"]
    with pytest.raises(UserError, match=r"kind=c cannot be used: it must be 'a' or 'b' or null"):
        checked("~method", "+method={_target_: my_methods.Mine, kind: c}")
    assert options("my_methods.free") is None and options("nowhere.Mine") is None
