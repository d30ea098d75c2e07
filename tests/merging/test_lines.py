"""LiNeS: the published scaling of a merged task vector by depth, behind any static method."""

import published
import pytest
import torch
from samples import equal, family, models, task_vectors, tower

from merging import UserError, merge
from merging.methods import Average, Emr, Lines, TaskArithmetic, Ties

ROUNDING = 4e-6
LAST = "visual.transformer.resblocks.1."


def lines(taus, merged, beta, blocks=2):
    """LiNeS_scaling and the choice of alpha in `evaluate`, with the substring test of the published code."""
    tasks = len(next(iter(taus.values())))
    summed = sum(float(sum(tau).abs().sum()) for tau in taus.values())
    alpha = summed / sum(float(change.abs().sum()) for change in merged.values()) / tasks
    factors = dict.fromkeys(merged, alpha)
    for key in merged:
        for block in range(blocks):
            if f".{block}." in key:
                factors[key] = alpha + beta * block / (blocks - 1)
                break
    return {key: factors[key] * change for key, change in merged.items()}


@pytest.mark.parametrize("tasks", [1, 3])
@pytest.mark.parametrize(("then", "reference"), [
    (TaskArithmetic(0.7), lambda taus: published.task_arithmetic(taus, 1)),
    (Average(), published.average),
    (Ties(0.3, "mean", 0.9), lambda taus: published.ties(taus, 0.3, "mean", 1)),
])  # fmt: skip
def test_equals_the_published_steps(then, reference, tasks):
    base, experts = family(tasks, tower())
    taus = task_vectors(base, experts)
    change = lines(taus, reference(taus), 0.6)
    for key, weight in merge(Lines(0.6, then), base, experts).state():
        assert torch.allclose(weight.double(), base[key] + change[key], rtol=0, atol=ROUNDING), key


def test_without_growth_task_arithmetic_is_the_mean_and_a_search_moves_the_last_block():
    base, experts = family(3, tower())
    flat = merge(Lines(0.0, TaskArithmetic(0.9)), base, experts)
    (mean,) = models(merge(Average(), base, experts))
    assert all(torch.allclose(flat.weight(key), mean[key], rtol=0, atol=ROUNDING) for key in mean)
    moved, direct = flat.scaled(0.8), merge(Lines(0.8), base, experts)
    assert equal(*models(moved), *models(direct))
    for key in mean:
        grown, before = moved.weight(key) - base[key], mean[key] - base[key]
        factor = (1 / 3 + 0.8) * 3 if key.startswith(LAST) else 1.0
        assert torch.allclose(grown, factor * before, rtol=0, atol=2 * ROUNDING), key


def test_kinds_stay_and_what_is_not_static_is_refused():
    base, experts = family(2, tower())
    merged = merge(Lines(0.5, TaskArithmetic(1.0, kinds={"norm": 0.0})), base, experts)
    assert torch.equal(merged.weight("visual.ln_post.weight"), base["visual.ln_post.weight"])
    with pytest.raises(UserError, match="What LiNeS scales must be a static method"):
        merge(Lines(then=Emr()), base, experts)
