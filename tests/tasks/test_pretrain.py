"""The shipped base is the one its script makes."""

import hashlib
import json

import pytest
import torch

from merging.checkpoints import SafetensorsFile
from tasks.mini.model import BASE, build, load_base
from tasks.mini.pretrain import Recipe, train

FACTS = json.loads(BASE.with_suffix(".json").read_text())


def test_the_script_repeats_its_first_losses():
    """To 1e-3: sums are taken in another order by another processor or thread count; another seed differs by 1e-2."""
    losses = train(Recipe(**FACTS["recipe"]), stop_after=2)[1]
    assert losses == pytest.approx(FACTS["first_losses"][:2], rel=1e-3)


def test_the_shipped_file_is_the_recorded_one():
    assert hashlib.sha256(BASE.read_bytes()).hexdigest() == FACTS["sha256"]
    assert BASE.stat().st_size <= 8_000_000
    file = SafetensorsFile(BASE)
    assert json.loads(file.metadata["recipe"]) == FACTS["recipe"]
    assert {spec.dtype for spec in file.specs().values()} == {torch.float16}
    assert {key: spec.shape for key, spec in file.specs().items()} == {
        k: v.shape for k, v in build().state_dict().items()
    }
    assert not load_base().training


def test_a_short_run_keeps_the_schedule_of_the_long_one():
    recipe = Recipe(steps=1000, warmup=10)
    assert recipe.rate(0) == pytest.approx(recipe.lr / 10)
    assert recipe.rate(500) == pytest.approx(recipe.lr / 2) and recipe.rate(1000) == 0
