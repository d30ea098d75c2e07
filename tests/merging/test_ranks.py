"""Rank choices against plain singular values, golden sizes, and what is refused."""

import pytest
import torch
from stacks import gaussian, squared, structured, unfold

from merging.decompose.ranks import Ranks
from merging.decompose.tucker import full_ranks, matched_rank, stored, tucker
from merging.errors import UserError

GOLDEN = {  # by shape: numbers stored and matched ranks at ranks 64, 96, 128, 160, 192, 256
    (8, 3072, 768): ((278_592, 442_432, 622_656, 819_264, 1_032_256, 1_507_392), (9, 14, 20, 26, 33, 49)),
    (8, 4096, 1024): ((360_512, 565_312, 786_496, 1_024_064, 1_278_016, 1_835_072), (8, 13, 19, 24, 31, 44)),
}


@pytest.mark.parametrize("shape", GOLDEN)
def test_budgets(shape):
    for rank, count, matched in zip((64, 96, 128, 160, 192, 256), *GOLDEN[shape], strict=True):
        assert stored(shape, (8, rank, rank)) == count and matched_rank(count, shape) == matched
    assert full_ranks(shape) == shape  # not the short side twice


def test_absolute_and_fraction():
    stack = gaussian(3, 20, 10)
    assert Ranks(value=4).resolve(stack) == (3, 4, 4)
    assert Ranks(value=12, in_value=5, task=2).resolve(stack) == (2, 12, 5)
    assert Ranks("fraction", 0.5).resolve(stack) == (3, 5, 5)
    assert Ranks("fraction", 1.0, 0.01).resolve(stack) == (3, 10, 1)
    with pytest.raises(UserError, match="task rank 4 is above"):
        Ranks(value=1, task=4).resolve(stack)


@pytest.mark.parametrize("lost", [0.02, 0.2, 0.6])
def test_energy_ranks_are_the_smallest_that_keep_enough(lost):
    stack = structured(6, 30, 22)
    ranks = Ranks("energy", lost, task=lost).resolve(stack)
    for mode, rank in enumerate(ranks):
        spectrum = torch.linalg.svdvals(unfold(stack, mode))
        assert squared(spectrum, rank) <= lost * squared(spectrum, 0) < squared(spectrum, rank - 1)


def test_budget_is_spent_where_it_keeps_most():
    stack = structured(4, 40, 20)
    spectra = [torch.linalg.svdvals(unfold(stack, mode)).square() for mode in (1, 2)]
    for budget in (80, 200, 500, 1000, 2000):
        _, out, in_ = Ranks("budget", budget).resolve(stack)
        assert stored(stack.shape, (4, out, in_)) <= budget
        assert min(stored(stack.shape, (4, out + 1, in_)), stored(stack.shape, (4, out, in_ + 1))) > budget
    cheap = spectra[1][1] / (20 + 4) > spectra[0][1] / (40 + 4)
    assert Ranks("budget", 80 + 44).resolve(stack) == ((4, 1, 2) if cheap else (4, 2, 1))
    assert Ranks("budget", 10**9).resolve(stack) == full_ranks(stack.shape)
    with pytest.raises(UserError, match="79 numbers is below the 80"):
        Ranks("budget", 79).resolve(stack)


@pytest.mark.parametrize("rank", [1, 2, 5, 10])
def test_match_svd_is_the_largest_square_rank_that_stores_no_more(rank):
    stack, budget = gaussian(4, 40, 30), 4 * rank * 71
    _, out, in_ = Ranks("match_svd", rank).resolve(stack)
    assert out == in_ and stored(stack.shape, (4, out, out)) <= budget < stored(stack.shape, (4, out + 1, out + 1))
    assert Ranks("match_svd", 50).resolve(stack) == (4, 40, 30)


def test_ranks_of_a_stack_known_by_its_factors():
    stack = structured(5, 30, 24)
    known = tucker(stack, full_ranks(stack.shape))
    for ranks in (Ranks("fraction", 0.25), Ranks("energy", 0.1), Ranks("budget", 10**9), Ranks(value=7)):
        assert ranks.resolve(known) == ranks.resolve(stack)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("energy", 1.5), r"ranks: value=1\.5 is out of range: it must lie in \[0\.0, 1\.0\]"),
        (("fraction", -0.1), r"ranks: value=-0\.1 is out of range"),
        (("fraction", 0.5, 2), r"ranks: in_value=2 is out of range"),
        (("best",), r"ranks: mode='best' is unknown\. Choose one of absolute, fraction, energy, budget, match_svd"),
        (("budget", 99, 3), r"ranks: mode=budget takes one value for both sides"),
        (("match_svd", 0), r"ranks: value=0 is out of range: it must be a whole number from 1"),
        (("absolute", 2.5), r"ranks: value=2\.5 is out of range: it must be a whole number from 1"),
        (("absolute", 1, None, 2.0), r"ranks: task=2\.0 is out of range: it must lie in \[0\.0, 1\.0\]"),
        (("absolute", 1, None, 0), r"ranks: task=0 is out of range: it must be a whole number from 1"),
    ],
)
def test_choices_without_sense_are_refused_before_anything_is_decomposed(options, message):
    with pytest.raises(UserError, match=message):
        Ranks(*options)
