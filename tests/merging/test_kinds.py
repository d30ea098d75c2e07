"""Coefficients by kind and depth: the same for all methods that add one change, interpolated over the blocks."""

import pytest
import torch

from merging import UserError, merge
from merging.methods import Average, Dare, TaskArithmetic, Ties

DEPTH = 5
BLOCK = "model.layers.{}."
NAMES = [
    "model.embed_tokens.weight",
    *(BLOCK.format(i) + name for i in range(DEPTH) for name in ("mlp.down_proj.weight", "self_attn.o_proj.weight")),
    "model.norm.weight",
    "lm_head.weight",
]
BASE = {name: torch.zeros(4) if "norm" in name else torch.zeros(4, 4) for name in NAMES}
EXPERTS = [{name: torch.full_like(tensor, value) for name, tensor in BASE.items()} for value in (1.0, 2.0)]
METHODS = {
    "task_arithmetic": (lambda **options: TaskArithmetic(1.0, **options), 3.0),
    "average": (lambda **options: Average(**options), 1.5),
    "ties": (lambda **options: Ties(1.0, scale=1.0, **options), 3.0),
    "dare": (lambda **options: Dare(0.0, then=Ties(1.0, "mean", 1.0, **options)), 1.5),
}


def changes(method, **options):
    """Name -> the one number of the merged parameter, in units of what the method adds without kinds."""
    make, unit = METHODS[method]
    return {key: float(weight.mean()) / unit for key, weight in merge(make(**options), BASE, EXPERTS).state()}


@pytest.mark.parametrize("method", METHODS)
def test_lists_run_over_depth(method):
    found = changes(method, kinds={"all": [0.0, 1.0, 0.5], "attention_out": 0.25, "norm": None})
    expected = {BLOCK.format(i) + "mlp.down_proj.weight": value for i, value in enumerate((0, 0.5, 1, 0.75, 0.5))}
    expected |= {BLOCK.format(i) + "self_attn.o_proj.weight": 0.25 for i in range(DEPTH)}
    expected |= {"model.embed_tokens.weight": 0.0, "model.norm.weight": 0.5, "lm_head.weight": 0.5}
    assert found == pytest.approx(expected)


@pytest.mark.parametrize("method", METHODS)
def test_names_that_say_nothing_change_nothing(method):
    assert changes(method) == pytest.approx(dict.fromkeys(NAMES, 1.0))
    assert changes(method, kinds={"ffn": [2.0]})[BLOCK.format(3) + "mlp.down_proj.weight"] == pytest.approx(2.0)


def test_a_search_moves_what_has_no_coefficient_of_its_own():
    merged = merge(TaskArithmetic(0.3, kinds={"ffn": [0.1, 0.5]}), BASE, EXPERTS).scaled(0.7)
    assert float(merged.weight("lm_head.weight")[0, 0]) == pytest.approx(2.1)
    assert float(merged.weight(BLOCK.format(2) + "mlp.down_proj.weight")[0, 0]) == pytest.approx(0.9)


def test_what_cannot_be_meant_is_refused():
    with pytest.raises(UserError, match=r"ties: kinds\.ffn is an empty list\. Give one number or several"):
        Ties(kinds={"ffn": []})
    with pytest.raises(UserError, match=r"average: kinds\.all=101\.0 is out of range"):
        Average(kinds={"all": [0.0, 101.0]})
    with pytest.raises(UserError, match=r"is not in the table"):
        merge(Average(kinds={"all": 1.0}), {"mine": torch.zeros(2)}, [{"mine": torch.ones(2)}])
