"""FFN matrices decomposed together: the same algebra, shared factors, each stored once."""

import pytest
import torch
from ffns import EXACT, FFN, GIVEN, MATRICES, NARROW, SHAPES, TASKS, WIDE, W, approximations, close
from samples import family, merged_of, opened, task_vectors

from merging import UserError, open_merged
from merging.decompose.ranks import Ranks
from merging.decompose.tucker import stored, tucker
from merging.deltas import repeated
from merging.methods import Duet, Wemoe

GROUPS = {"block": [MATRICES[:2], MATRICES[2:]], "model": [MATRICES]}
each_unit = pytest.mark.parametrize("unit", GROUPS)


@pytest.fixture(scope="module")
def models():
    return family(TASKS, SHAPES)


def upright(key, matrices):
    return matrices.mT if "c_proj" in key else matrices


@each_unit
@pytest.mark.parametrize("task", [None, 2])
def test_every_matrix_is_its_slice_of_one_decomposition(models, unit, task):
    base, experts = models
    ranks = Ranks("absolute", 4, in_value=3, task=task or "full")
    merged, taus = merged_of(Duet(ranks=ranks, unit=unit, neurons=GIVEN), base, experts), task_vectors(base, experts)
    for group in GROUPS[unit]:
        stack = torch.cat([upright(key, taus[key]) for key in sorted(group)])
        whole = tucker(stack, (task or len(stack), 4, 3)).dense()
        assert not close(whole, stack, 0.1)
        for key, expected in zip(sorted(group), whole.split(TASKS), strict=True):
            assert close(upright(key, approximations(merged, key)), expected, 1e-5), key


@each_unit
def test_full_ranks_lose_nothing(models, unit):
    base, experts = models
    merged = merged_of(Duet(ranks=EXACT, unit=unit, neurons=GIVEN), base, experts)
    wemoe = merged_of(Wemoe(), base, experts)
    for key in FFN:
        for task, expert in enumerate(experts):
            assert close(merged.weight(key, merged.one_hot(task)), expert[key], 1e-5), key
        assert close(merged.weight(key, W), wemoe.weight(key, W), 1e-4), key


@each_unit
def test_shared_factors_are_stored_once(models, unit, tmp_path):
    ranks = Ranks("absolute", 4, in_value=3)
    merged = merged_of(Duet(ranks=ranks, unit=unit, neurons=GIVEN), *models)
    matrices = len(GROUPS[unit][0])
    shape = (matrices * TASKS, WIDE, NARROW)
    one = stored(shape, (matrices * TASKS, 4, 3)) - (matrices * TASKS) ** 2 + matrices * TASKS**2
    biases = 2 * TASKS * (WIDE + NARROW)
    assert merged.params == len(GROUPS[unit]) * one + biases

    path = merged.save(tmp_path / "merged.safetensors")
    found = open_merged(path)
    assert (found.params, found.stored_bytes) == (merged.params, merged.stored_bytes)
    twice = 2 * (matrices - 1) * len(GROUPS[unit])
    assert len(repeated(found.deltas.values())) == len(repeated(merged.deltas.values())) == twice


@each_unit
def test_the_order_of_tasks_means_nothing(models, unit):
    base, experts = models
    method = Duet(ranks=Ranks("absolute", 4, in_value=3), unit=unit, static=False)
    plain, turned = method(opened(base, experts)), method(opened(base, experts[::-1]))
    for key in MATRICES:
        assert close(approximations(turned, key).flip(0), approximations(plain, key), 1e-4), key


def test_what_has_no_shared_factors_is_refused(models):
    with pytest.raises(UserError, match=r"unit=block shares Tucker factors; factors=svd has none. Set unit=matrix"):
        Duet(unit="block", factors="svd")
    with pytest.raises(UserError, match=r"unit='layer' is unknown. Choose one of matrix, block, model"):
        Duet(unit="layer")
    with pytest.raises(
        UserError, match=r"c_fc.weight transformer.resblocks.0.mlp.c_proj.weight: out rank 13 is above the full rank"
    ):
        merged_of(Duet(unit="block", ranks=Ranks("absolute", 13), neurons=GIVEN), *models)
