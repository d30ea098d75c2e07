"""SWUDI, ASWUDI and the quadratic they share with WUDI, against the authors' steps and by algebra."""

import math

import published_matrix as published
import pytest
import torch
from samples import drawn, family, models, task_vectors, tower

from merging import UserError, merge
from merging.interference import Quadratic, of_task_vectors
from merging.methods import Aswudi, Swudi

FACTORS = 1e-5  # as in test_methods
FILTERS = {
    "exponential": (Swudi(time=40.0), lambda value, largest: 1 - math.exp(-40 * value)),
    "tikhonov": (Swudi("tikhonov", ridge=0.1), lambda value, largest: value / (value + 0.1)),
    "landweber": (Swudi("landweber", steps=5), lambda value, largest: 1 - (1 - 0.9 * value / largest) ** 5),
    "none": (Swudi("none"), lambda value, largest: 1.0),
}
RANKS = {
    "sqrt_participation": lambda values: sum(math.sqrt(v) for v in values) ** 2 / sum(values),
    "participation": lambda values: sum(values) ** 2 / sum(v * v for v in values),
    "entropy": lambda values: math.exp(-sum(v / sum(values) * math.log(v / sum(values)) for v in values)),
    "stable": lambda values: sum(v * v for v in values) / max(values) ** 2,
}


def assert_change(method, tasks, reference, scale=1.0):
    base, experts = family(tasks, {"wide": (8, 20), "tall": (24, 9), "square": (10, 10), "cube": (3, 4, 5), "b": (7,)})
    (model,), change = models(merge(method, base, experts)), reference(task_vectors(base, experts))
    for key, weight in model.items():
        assert torch.allclose(weight.double(), base[key] + scale * change[key], rtol=0, atol=FACTORS), key


@pytest.mark.parametrize("name", FILTERS)
@pytest.mark.parametrize("tasks", [2, 5])
def test_swudi_equals_the_published_steps(name, tasks):
    method, f = FILTERS[name]
    assert_change(method, tasks, lambda taus: published.swudi(taus, f, 0.65))


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("tasks", [2, 5])
def test_aswudi_equals_the_published_steps(rank, tasks):
    assert_change(Aswudi(rank, scale=0.7), tasks, lambda taus: published.aswudi(taus, RANKS[rank]), 0.7)


def test_the_gram_matrix_has_the_trace_of_the_tasks_and_ends_of_the_filter_are_known():
    tau = drawn(3, 12, 9).double()
    quadratic = of_task_vectors(tau)
    assert float(quadratic.gram.trace()) == pytest.approx(3)
    assert torch.allclose(quadratic.filtered(torch.zeros_like), tau.sum(0))
    minimum, pinv = quadratic.filtered(torch.ones_like), torch.linalg.pinv(quadratic.gram)
    d = sum(t @ t.T @ t / t.square().sum() for t in tau)
    assert torch.allclose(minimum, d @ pinv)
    assert torch.allclose((minimum - quadratic.start) @ quadratic.gram + quadratic.excess, torch.zeros(12, 9).double())


@pytest.mark.parametrize("method", [Swudi(), Swudi("tikhonov"), Swudi("none"), Aswudi(), Aswudi("stable")], ids=str)
def test_one_task_is_itself_and_orthogonal_row_spaces_are_added_up(method):
    base, (expert,) = family(1)
    (model,) = models(merge(method, base, [expert]))
    assert all(torch.allclose(model[key], expert[key], atol=FACTORS) for key in model)
    apart = torch.zeros(2, 4, 6)
    apart[0, :, :3], apart[1, :, 3:] = drawn(4, 3), drawn(4, 3, seed=1)
    merged = merge(method, {"w": torch.zeros(4, 6)}, [{"w": tau} for tau in apart])
    assert torch.allclose(merged.weight("w"), apart.sum(0), atol=FACTORS)


def test_a_descent_of_small_steps_ends_at_the_minimum_and_passes_the_filter_of_landweber():
    """Plain descent at rate r has the filter 1 - (1 - 2 r lambda)^steps."""
    quadratic = of_task_vectors(drawn(3, 6, 8).double())
    largest = float(torch.linalg.eigvalsh(quadratic.gram)[-1])
    for steps in (1, 7):
        descended = quadratic.with_momentum(steps, 0.45 / largest, 0.0)
        filtered = quadratic.filtered(lambda values, steps=steps: 1 - (1 - 0.9 * values / largest) ** steps)
        assert torch.allclose(descended, filtered)
    assert torch.allclose(
        quadratic.with_momentum(3000, 0.45 / largest, 0.0), quadratic.filtered(torch.ones_like), atol=1e-4
    )


def test_a_task_of_zeros_has_no_say():
    tau = torch.cat([drawn(2, 5, 7), torch.zeros(1, 5, 7)]).double()
    for one, other in zip(of_task_vectors(tau)[:3], of_task_vectors(tau[:2])[:3], strict=True):
        assert torch.equal(one, other)
    assert isinstance(of_task_vectors(tau), Quadratic)


def test_linear_matrices_alone():
    base, experts = family(2, tower())
    (model,) = models(merge(Swudi(matrices="linear", rest="base"), base, experts))
    moved = {key for key in model if not torch.equal(model[key], base[key])}
    assert moved == {key for key in model if base[key].ndim == 2 and (".mlp." in key or ".attn." in key)}


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Swudi("wiener"), "filter='wiener' is unknown. Choose one of exponential, tikhonov"),
        (lambda: Swudi(kept=0), "kept=0 is out of range"),
        (lambda: Swudi(time=0), "time=0 is out of range"),
        (lambda: Aswudi("gavish"), "rank='gavish' is unknown"),
    ],
)
def test_bad_input(build, message):
    with pytest.raises(UserError, match=message):
        build()
