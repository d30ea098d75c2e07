"""A merge whose task-wise corrections stand between the encoder and the heads: scored, counted and saved."""

from dataclasses import replace

import pytest
import torch
from small import TOWER, Coloured, Colours, suite, tower_state

from merging import merge, open_merged
from merging.accounting import macs
from merging.correction import Correction
from merging.errors import UserError
from merging.merged import Routing
from merging.methods import Average
from merging.methods.method import static
from tasks.evaluate import Grid
from tasks.suite import Suite
from tasks.task import array_task
from tasks.unseen import score_unseen

NAMES = ("hues", "tints")


def correction(seed, rank=2):
    torch.manual_seed(seed)
    return Correction(torch.randn(rank, 8), torch.randn(8, rank))


MERGED = merge(Average(), tower_state(), [tower_state(1), tower_state(2)], NAMES)
CORRECTED = replace(MERGED, corrections={name: correction(3 + i) for i, name in enumerate(NAMES)},
                    routing=Routing("oracle"))  # fmt: skip


def by_hand(name):
    """The accuracy of a task, its features corrected entry by entry."""
    module, split, task = TOWER.build(), Coloured(name).split("test"), Colours(name)
    module.load_state_dict(dict(MERGED.state()), strict=False)
    with torch.no_grad():
        features = TOWER.features(module, TOWER.prepare(split.inputs))
        made = CORRECTED.corrections[name]
        hidden = torch.stack([(features * row).sum(1).clamp_min(0) for row in made.down], 1)
        rows = [z - sum(h * column for h, column in zip(some, made.up.T, strict=True))
                for z, some in zip(features, hidden, strict=True)]  # fmt: skip
        return float((task.head()(torch.stack(rows)).argmax(1) == split.labels).float().mean())


def test_scores_are_those_of_corrected_features():
    grid = Grid(suite(*NAMES), TOWER)
    values = grid.score(CORRECTED, "test").values
    assert values == {name: pytest.approx(by_hand(name)) for name in NAMES}
    assert values != grid.score(MERGED, "test").values
    half = replace(CORRECTED, corrections={"tints": CORRECTED.corrections["tints"]})
    mixed = grid.score(half, "test").values
    assert mixed["tints"] == values["tints"] and mixed["hues"] == grid.score(MERGED, "test").values["hues"]


def test_an_untrained_one_leaves_features_as_they_are():
    made = Correction.untrained(8, 3, 0, "hues")
    features = torch.randn(5, 8)
    assert torch.equal(made(features), features) and made.down.abs().max() <= 8**-0.5
    assert torch.equal(made.down, Correction.untrained(8, 3, 0, "hues").down)
    assert not torch.equal(made.down, Correction.untrained(8, 3, 0, "tints").down)


def test_what_is_stored_and_computed_is_counted():
    assert CORRECTED.params - MERGED.params == 2 * 2 * 2 * 8
    assert CORRECTED.stored_bytes - MERGED.stored_bytes == 4 * 2 * 2 * 2 * 8
    assert macs(CORRECTED, TOWER) - macs(MERGED, TOWER) == 2 * 2 * 8


def test_it_is_saved(tmp_path):
    path = CORRECTED.save(tmp_path / "merged.safetensors")
    again = open_merged(path)
    assert again.routing == Routing("oracle") and again.corrections.keys() == CORRECTED.corrections.keys()
    for name, made in CORRECTED.corrections.items():
        assert all(torch.equal(tensor, again.corrections[name].state_dict()[key])
                   for key, tensor in made.state_dict().items())  # fmt: skip
    assert {*again.specs} == {*MERGED.specs}
    plain = open_merged(MERGED.save(tmp_path / "plain.safetensors"))
    assert plain.routing is None and not plain.corrections


def test_held_out_tasks_have_none():
    everything = Suite("small", suite(*NAMES).tasks, suite("shades").tasks)
    grid = Grid(everything, TOWER)
    assert score_unseen(grid, CORRECTED, "test").scores == score_unseen(grid, MERGED, "test").scores


class TestBadInput:
    def test_no_head(self):
        inputs = torch.zeros(3, 3, 16, 16, dtype=torch.uint8)
        tasks = [array_task(name, {"test": (inputs, torch.zeros(3))}, metrics=("mse",)) for name in NAMES]
        with pytest.raises(UserError, match="hues has no head that reads features"):
            Grid(Suite("bare", tuple(tasks)), TOWER).score(CORRECTED, "test")

    def test_it_is_not_static(self):
        with pytest.raises(UserError, match="This must be a static method"):
            static(lambda experts: CORRECTED, MERGED, None, "This")  # type: ignore[arg-type]
