"""OptMerge and DOGE, which descend matrix by matrix, against their published steps and by algebra."""

from functools import partial

import published_matrix as published
import pytest
import torch
from samples import drawn, family, models, opened, task_vectors, tower

from merging import UserError, merge
from merging.interference import Quadratic, descend, gram_of, of_task_vectors, sizes_of
from merging.methods import Doge, OptMerge, Wudi

SHAPES = {"wide": (8, 20), "tall": (24, 9), "square": (10, 10), "b": (7,)}
FACTORS = 1e-5  # as in test_methods


@pytest.mark.parametrize("probe", ["task_vector", "target"])
@pytest.mark.parametrize(("tuned", "lr"), [("full", 1e-2), ("lora", 1e-3)])
def test_opt_merge_equals_the_published_steps(tuned, lr, probe):
    base, experts = family(3, SHAPES)
    method = OptMerge(tuned, steps=20, lr=lr, probe=probe, scale=0.5)
    (model,) = models(merge(method, base, experts))
    change = published.opt_merge(task_vectors(base, experts), tuned, 20, lr, probe)
    for key, weight in model.items():
        assert torch.allclose(weight.double(), base[key] + 0.5 * change[key], rtol=0, atol=FACTORS), key


def test_opt_merge_of_all_triplets_lowers_the_loss_of_wudi():
    base, experts = family(3, SHAPES)
    (one,) = models(merge(OptMerge(steps=5, lr=1e-3, share=1.0), base, experts))
    (other,) = models(merge(Wudi(steps=5, lr=1e-3, matrices="all", rest="mean"), base, experts))
    assert all(torch.allclose(one[key], other[key], atol=FACTORS) for key in one)


def test_opt_merge_starts_at_the_sum_or_the_mean_and_branches_have_rates_of_their_own():
    base, experts = family(2, {"w": (6, 5)})
    tau = task_vectors(base, experts)["w"].float()
    starts = {"full": tau.sum(0), "lora": tau.mean(0)}
    for tuned, start in starts.items():
        assert torch.allclose(merge(OptMerge(tuned, 0), base, experts).weight("w"), base["w"] + start, atol=1e-6)
    quadratic = OptMerge("full").quadratic(opened(base, experts), tau)
    assert torch.allclose(
        merge(OptMerge(steps=3), base, experts).weight("w") - base["w"],
        quadratic.descended(3, 1e-5), atol=1e-6,
    )  # fmt: skip


@pytest.mark.parametrize("shape", [(3, 9, 5), (2, 4, 30)])
def test_momentum_along_eigenvectors_is_what_steps_of_an_optimizer_give(shape):
    quadratic = of_task_vectors(drawn(*shape).double())
    gradient = lambda y: 2 * (y @ quadratic.gram + quadratic.excess)  # noqa: E731
    slow = partial(torch.optim.SGD, momentum=0.9)
    for steps in (0, 1, 40):
        expected = quadratic.start + descend(torch.zeros_like(quadratic.start), gradient, steps, 1e-2, slow)
        assert torch.allclose(quadratic.with_momentum(steps, 1e-2, 0.9), expected, rtol=0, atol=1e-9), steps


def test_gradients_by_a_factor_of_the_gram_matrix_are_those_by_itself():
    tau, probes = drawn(2, 6, 40).double(), drawn(2, 3, 40, seed=1).double()
    quadratic = Quadratic.of(tau.sum(0), tau, probes, sizes_of(tau))
    assert quadratic.factor is not None and len(quadratic.factor) == 6
    whole = quadratic._replace(factor=None)
    assert torch.allclose(quadratic.descended(20, 1e-2), whole.descended(20, 1e-2), rtol=0, atol=1e-9)


def test_gram_matrices_by_panels():
    rows = drawn(7, 600).double()
    assert torch.allclose(gram_of(rows), rows.T @ rows) and torch.equal(gram_of(rows), gram_of(rows).T)


# of one task the leading directions that the projection protects are any of its own
@pytest.mark.parametrize("tasks", [2, 3])
def test_doge_equals_the_published_steps(tasks):
    base, experts = family(tasks, tower())
    taus = task_vectors(base, experts)
    linear = {key: tau for key, tau in taus.items() if tau.ndim == 3 and (".mlp." in key or ".attn." in key)}
    change = published.doge(linear, 0.5, 3, 0.3, 8, 1e-2)
    (model,) = models(merge(Doge(0.5, 3, 0.3, 8, 1e-2), base, experts))
    for key, weight in model.items():
        expected = base[key] + change[key] if key in linear else base[key].double()
        assert torch.allclose(weight.double(), expected, rtol=0, atol=FACTORS), key


def test_doge_without_steps_is_task_arithmetic_of_equally_long_trimmed_task_vectors():
    base, experts = family(2, tower())
    merged, taus = merge(Doge(0.1, density=1.0, steps=0), base, experts), task_vectors(base, experts)
    key = "visual.transformer.resblocks.1.mlp.c_fc.weight"
    expected = torch.stack([0.1 * tau / tau.norm() for tau in taus[key]]).sum(0)
    assert torch.allclose(merged.weight(key), base[key] + expected.float(), atol=1e-6)


def test_the_gradient_of_doge_sees_the_row_spaces_alone_and_leaves_the_protected_directions_at_zero():
    tau = drawn(3, 12, 18)
    experts, method = opened(*family(3, {"w": (12, 18)})), Doge(2.0, subspace=4)
    gradient, delta = method.gradient(experts, tau), drawn(12, 18, seed=5)
    beside = drawn(12, 18, seed=6)
    for row in range(12):
        span = torch.linalg.qr(tau[:, row].T)[0]
        beside[row] -= span @ (span.T @ beside[row])
    assert torch.allclose(gradient(delta), gradient(delta + beside), rtol=1e-3, atol=1e-3)
    basis = method._basis(experts, tau)
    assert basis.shape == (12, 3)
    moved = descend(torch.zeros(12, 18), gradient, 10, 1e-4, torch.optim.SGD)
    assert moved.abs().max() > 1e-3 and torch.allclose(basis.T @ moved, torch.zeros(3, 18), atol=1e-5)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: OptMerge("qlora"), "tuned='qlora' is unknown. Choose one of full, lora"),
        (lambda: OptMerge(lr=0.0), "lr=0.0 is out of range"),
        (lambda: Doge(density=0.0), "doge: density=0.0 is out of range"),
        (lambda: Doge(subspace=0), "subspace=0 is out of range"),
    ],
)
def test_bad_input(build, message):
    with pytest.raises(UserError, match=message):
        build()
