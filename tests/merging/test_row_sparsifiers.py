"""Sparsifiers that look at the rows of a task vector: Model Breadcrumbs and DELLA."""

import published
import pytest
import torch
from published_entries import breadcrumbs, della_probabilities
from samples import SHAPES, drawn, equal, family, models, opened, task_vectors

from merging import UserError, entries, merge, sparsifiers
from merging.methods import Average, Breadcrumbs, Dare, Della, TaskArithmetic, Ties, TsvM

ROUNDING = 4e-6  # fp32 sums of a few numbers below 32


def left_by(method, base, experts, tasks=None):
    """{key: tau [T, *shape]} that the method hands to the one behind it."""
    found = opened(base, experts, tasks)
    sparse = found.sparsified(method.sparsifier(found))
    return {key: sparse.tau(key) for key in sparse.specs()}


@pytest.mark.parametrize("tasks", [1, 3])
@pytest.mark.parametrize(("density", "outliers"), [(0.15, 0.006), (0.5, 0.2), (1.0, 0.3), (0.3, 0.0)])
def test_breadcrumbs_equals_the_published_steps(tasks, density, outliers):
    base, experts = family(tasks)
    taus = {key: torch.stack([breadcrumbs(each, density, outliers) for each in tau])
            for key, tau in task_vectors(base, experts).items()}  # fmt: skip
    for then, reference in ((TaskArithmetic(0.2), lambda taus: published.task_arithmetic(taus, 0.2)),
                            (Ties(0.4), lambda taus: published.ties(taus, 0.4, "sum", 0.3))):  # fmt: skip
        change = reference(taus)
        for key, weight in merge(Breadcrumbs(density, outliers, then), base, experts).state():
            assert torch.allclose(weight.double(), base[key] + change[key], rtol=0, atol=ROUNDING), key


def test_breadcrumbs_keeps_a_share_of_every_row_below_what_it_removed():
    base, experts = family(2, {"w": (5, 40), "one": ()})
    tau, sparse = opened(base, experts).tau("w"), left_by(Breadcrumbs(0.3, 0.1), base, experts)
    assert torch.equal(sparse["one"], opened(base, experts).tau("one"))
    assert torch.all(sparse["w"].count_nonzero(-1) == 12)
    removed = tau.abs().topk(4).values[..., -1]
    assert torch.all(sparse["w"].abs().amax(-1) < removed)
    assert torch.equal(sparse["w"][sparse["w"] != 0], tau[sparse["w"] != 0])


@pytest.mark.parametrize("then", [Average(), TaskArithmetic(), Ties(), TsvM()])
def test_what_drops_nothing_is_the_method_behind_it(then):
    base, experts = family(3)
    plain = merge(then, base, experts)
    for method in (Breadcrumbs(1.0, 0.0, then), Della(1.0, then=then), Della(1.0, rescale="norm", then=then)):
        sparse = merge(method, base, experts)
        assert equal(*models(sparse), *models(plain)) and sparse.scale == plain.scale


def test_della_keeps_by_rank_and_is_unbiased():
    """The mean of 600 draws, within five of its standard deviations."""
    base, tau, draws = {"w": torch.zeros(3, 7)}, drawn(3, 7), 600
    expected = della_probabilities(tau, 0.5, 0.3)
    assert torch.allclose(expected.mean(1), torch.full((3,), 0.5).double())
    seen = torch.stack([left_by(Della(0.5, 0.3, seed=seed), base, [{"w": tau}])["w"][0] for seed in range(draws)])
    deviation = (expected * (1 - expected) / draws).sqrt()
    assert torch.all(((seen != 0).double().mean(0) - expected).abs() < 5 * deviation)
    kept = torch.where(seen != 0, tau.double() / seen, expected)
    assert torch.allclose(kept, expected.expand_as(kept), atol=1e-6)  # each is divided by its own probability
    assert torch.all((seen.double().mean(0) - tau).abs() < 5 * tau.abs() * deviation / expected)


def test_della_restores_the_norm_as_mergekit_does():
    base, experts = family(3)
    tau, sparse = task_vectors(base, experts), left_by(Della(rescale="norm"), base, experts)
    for key in SHAPES:
        before, after = (changes[key].flatten(1).abs().sum(1).double() if changes[key].ndim > 1 else
                         changes[key].abs().double() for changes in (tau, sparse))  # fmt: skip
        assert torch.allclose(torch.where(after > 0, before, 0.0), after, rtol=1e-6), key
    kept = left_by(Della(), base, experts)
    assert all(torch.equal(kept[key] != 0, sparse[key] != 0) for key in SHAPES)


def test_della_masks_depend_on_name_and_task_alone():
    base, experts = family(2)
    first, turned = (left_by(Della(), base, some, names)
                     for some, names in ((experts, ["a", "b"]), (experts[::-1], ["b", "a"])))  # fmt: skip
    assert all(torch.equal(first[key], turned[key].flip(0)) for key in SHAPES)
    other = left_by(Della(seed=1), base, experts, ["a", "b"])
    assert not torch.equal(first["wide.weight"] != 0, other["wide.weight"] != 0)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(
    "method", [Breadcrumbs(0.5, 0.1), Della(), Della(rescale="norm"), Dare(0.3, then=Della()), Della(then=Dare(0.3))]
)
def test_pieces_are_those_of_whole_parameters(method, threads, monkeypatch):
    """Blocks that begin and end within a row, rows longer than a piece, and parameters of a few entries."""
    base, experts = family(3, SHAPES | {"wide": (4, 50), "tall": (50, 4), "zero": (0, 3), "none": (3, 0)})
    before, threads_before = dict(merge(method, base, experts).state()), torch.get_num_threads()
    for module, name, size in ((entries, "BLOCK", 64), (entries, "SPAN", 16), (entries, "PIECE", 8)):
        monkeypatch.setattr(module, name, size)
    torch.set_num_threads(threads)
    pieces = dict(merge(method, base, experts).state())
    torch.set_num_threads(threads_before)
    assert equal(pieces, before)
    monkeypatch.setattr(sparsifiers, "PIECE", 8)
    if isinstance(method, Breadcrumbs):
        assert equal(dict(merge(method, base, experts).state()), before)


def test_a_number_that_is_not_finite_is_named():
    base, experts = family(2)
    experts[1]["wide.weight"][3, 5] = float("nan")
    with pytest.raises(UserError, match=r"wide\.weight.*task1"):
        merge(Breadcrumbs(), base, experts)


def test_epsilon_beyond_what_density_allows():
    with pytest.raises(UserError, match=r"della: epsilon=0.3 around density=0.8 .*below 0.2"):
        Della(0.8, 0.3)
    with pytest.raises(UserError, match=r"breadcrumbs: density=0 is out of range"):
        Breadcrumbs(0)
