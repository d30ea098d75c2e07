"""Tucker decompositions against their definitions, plain singular values and tensorly; only reconstructions compare."""

from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import pytest
import torch
from stacks import gaussian, squared, structured, unfold

from merging.decompose import tucker as module
from merging.decompose.ranks import Ranks
from merging.decompose.tucker import ENGINES, full_ranks, stored, tucker, tucker_many
from merging.errors import UserError

pytestmark = pytest.mark.filterwarnings("ignore:Trying to compute SVD with n_eigenvecs")  # by tensorly
OWN, OURS = [name for name in ENGINES if name != "tensorly"], ["hooi", "tensorly"]


def error(stack, found):
    return float((stack.double() - found.dense().double()).square().sum())


STACKS = {
    "tall": (gaussian(4, 30, 12), (4, 6, 5)),
    "wide": (gaussian(4, 12, 30, seed=1), (4, 5, 6)),
    "few task ranks": (structured(5, 20, 14), (2, 5, 4)),
    "structured": (structured(6, 40, 24), (6, 6, 5)),
    "wide for its tasks": (structured(2, 50, 12), (2, 7, 4)),  # T n < m
    "thin": (gaussian(3, 17, 1), (3, 2, 1)),
    "ranks of one": (gaussian(3, 9, 8), (1, 1, 1)),
}
DETERMINED = ["hooi", "st_hosvd", "hosvd"]
each_stack = pytest.mark.parametrize("stack, ranks", STACKS.values(), ids=STACKS)
own_engine = pytest.mark.parametrize("engine", OWN)
each_engine = pytest.mark.parametrize("engine", [*OWN, "tensorly"])


@each_engine
@each_stack
def test_factors_are_orthonormal_and_the_residual_orthogonal(stack, ranks, engine):
    found = tucker(stack, ranks, engine=engine)
    assert found.core.shape == torch.Size(ranks) and found.shape == tuple(stack.shape)
    assert {part.dtype for part in found} == {torch.float32}
    assert sum(part.numel() for part in found) == stored(stack.shape, ranks)
    for factor, rank in zip(found[1:], ranks, strict=True):
        assert torch.allclose(factor.T @ factor, torch.eye(rank), atol=2e-6)
    if ranks[0] == len(stack):
        assert torch.equal(found.task, torch.eye(len(stack)))
    total, kept = float(stack.double().square().sum()), float(found.core.double().square().sum())
    assert kept + error(stack, found) == pytest.approx(total, rel=1e-5)
    assert abs(float(((stack - found.dense()) * found.dense()).sum())) < 1e-5 * total
    by_hand = torch.einsum("tj,jab,ma,nb->tmn", found.task, found.core, found.out, found.in_)
    assert torch.allclose(found.dense(), by_hand, atol=1e-4)


@each_stack
def test_errors_lie_between_their_bounds(stack, ranks):
    tails = [squared(torch.linalg.svdvals(unfold(stack, mode)), ranks[mode]) for mode in range(3)]
    hooi, st_hosvd, hosvd = (error(stack, tucker(stack, ranks, engine=engine)) for engine in ("hooi", *OWN[1::-1]))
    slack = 1e-5 * float(stack.square().sum())
    assert max(tails) - slack <= hooi <= st_hosvd + slack
    assert hooi <= hosvd + slack and max(hosvd, st_hosvd) <= sum(tails) + slack
    svds = sum(squared(torch.linalg.svdvals(matrix.double()), min(ranks[1:])) for matrix in stack)
    assert hooi >= svds - slack


@each_stack
def test_sweeps_never_increase_the_error_and_stop_by_themselves(stack, ranks):
    errors = [error(stack, tucker(stack, ranks, sweeps=sweeps, tol=0)) for sweeps in range(8)]
    assert errors[0] == pytest.approx(error(stack, tucker(stack, ranks, engine="st_hosvd")))
    assert all(after <= before * (1 + 1e-5) for before, after in pairwise(errors))
    assert error(stack, tucker(stack, ranks, tol=1)) == pytest.approx(errors[1])


def test_sweeps_that_refine_reach_what_new_decompositions_reach(monkeypatch):
    stack, ranks = structured(6, 96, 80, shared=20, own=4), (6, 9, 8)
    exact, start = error(stack, tucker(stack, ranks)), error(stack, tucker(stack, ranks, engine="st_hosvd"))
    monkeypatch.setattr(module, "EXACT", 0)
    refined = error(stack, tucker(stack, ranks))
    assert refined != exact and refined == pytest.approx(exact, rel=1e-3) and exact < 0.99 * start


@pytest.mark.parametrize("shape", [(3, 40, 10), (3, 10, 40), (2, 6, 6), (1, 5, 9), (4, 7, 1), (9, 2, 2)])
@each_engine
def test_full_ranks_lose_nothing_and_one_less_does(shape, engine):
    stack, ranks = gaussian(*shape), full_ranks(shape)
    assert torch.allclose(tucker(stack, ranks, engine=engine).dense(), stack, atol=1e-5)
    for mode in range(3):
        fewer = [rank - (index == mode) for index, rank in enumerate(ranks)]
        if fewer[mode]:
            least = squared(torch.linalg.svdvals(unfold(stack, mode)), fewer[mode])
            assert error(stack, tucker(stack, fewer, engine=engine)) > 0.99 * least > 1e-4


def test_full_hosvd_core_is_all_orthogonal_with_the_singular_values_as_slice_norms():
    stack = gaussian(4, 9, 7)
    core = tucker(stack, full_ranks(stack.shape), engine="hosvd").core
    for mode in (1, 2):
        gram = unfold(core, mode) @ unfold(core, mode).T
        assert torch.allclose(gram, torch.linalg.svdvals(unfold(stack, mode)).square().diag(), atol=1e-4)


@own_engine
def test_fewer_task_ranks_mix_tasks_by_their_projector(engine):
    stack = gaussian(5, 12, 9)
    found = tucker(stack, (3, 6, 5), engine=engine)
    spatial = torch.einsum("am,tmn,nb->tab", found.out @ found.out.T, stack, found.in_ @ found.in_.T)
    mixed = torch.einsum("ts,sab->tab", found.task @ found.task.T, spatial)
    assert torch.allclose(found.dense(), mixed, atol=1e-5) and not torch.allclose(mixed, spatial, atol=1e-1)


@pytest.mark.parametrize("shape", [(1, 30, 12), (1, 12, 30)])
@pytest.mark.parametrize("tasks, task_rank", [(1, 1), (4, 1), (4, 4)])
@pytest.mark.parametrize("rank", [1, 4, 12])
@pytest.mark.parametrize("engine", [*DETERMINED, "randomised", "tensorly"])
def test_one_task_or_many_identical_ones_give_the_truncated_svd(shape, tasks, task_rank, rank, engine):
    stack = structured(*shape, own=3).repeat(tasks, 1, 1)
    u, s, vh = torch.linalg.svd(stack.double(), full_matrices=False)
    expected = (u[..., :rank] * s[:, None, :rank] @ vh[:, :rank]).float()
    assert torch.allclose(tucker(stack, (task_rank, rank, rank), engine=engine).dense(), expected, atol=1e-4)


@each_stack
def test_error_is_no_larger_than_that_of_tensorly(stack, ranks):
    ours, theirs = (error(stack, tucker(stack, ranks, engine=engine, sweeps=200, tol=1e-9)) for engine in OURS)
    assert ours <= theirs * (1 + 1e-4) and theirs <= 1.1 * ours


@each_stack
def test_a_random_start_ends_no_further_than_the_usual_one_and_is_repeated(stack, ranks):
    usual, other = (
        error(stack, tucker(stack, ranks, engine=engine, sweeps=200, tol=1e-9)) for engine in ("hooi", "hooi_random")
    )
    assert other == pytest.approx(usual, rel=0.05)
    once, again = (tucker(stack, ranks, engine="hooi_random") for _ in range(2))
    assert all(torch.equal(*parts) for parts in zip(once, again, strict=True))


@each_stack
def test_sketches_are_nearly_as_good_as_gram_matrices(stack, ranks):
    exact, sketched = (error(stack, tucker(stack, ranks, engine=engine)) for engine in ("st_hosvd", "randomised"))
    assert sketched == pytest.approx(exact, rel=0.02)


@pytest.mark.parametrize("engine", DETERMINED)  # a random basis of permuted rows is another random basis
def test_permutations_of_rows_columns_and_tasks_pass_through(engine):
    stack = structured(5, 16, 13)
    rows, columns, tasks = (torch.randperm(size, generator=torch.Generator().manual_seed(7)) for size in (16, 13, 5))
    for ranks in ((5, 4, 4), (3, 4, 5)):
        plain = tucker(stack, ranks, engine=engine).dense()
        permuted = tucker(stack[tasks][:, rows][:, :, columns], ranks, engine=engine).dense()
        assert torch.allclose(permuted, plain[tasks][:, rows][:, :, columns], atol=1e-3)
        turned = tucker(stack.mT, (ranks[0], ranks[2], ranks[1]), engine=engine).dense()
        assert torch.allclose(turned, plain.mT, atol=1e-3) and not torch.allclose(plain, stack, atol=0.1)


def test_zeros_give_zeros():
    stack = torch.zeros(3, 8, 5)
    for engine in OWN:
        found = tucker(stack, (2, 4, 3), engine=engine)
        assert not found.dense().any()
        assert torch.allclose(found.out.T @ found.out, torch.eye(4), atol=1e-6)


def test_bfloat16_counts_as_the_numbers_it_holds():
    stack = structured(3, 14, 10).bfloat16()
    before = stack.clone()
    low, high = tucker(stack, (3, 4, 4)), tucker(stack.float(), (3, 4, 4))
    assert low.core.dtype == torch.float32 and torch.equal(low.dense(), high.dense()) and torch.equal(stack, before)


def test_threads_and_their_number_change_nothing(monkeypatch, two_threads):
    monkeypatch.setattr(module, "LARGE", 1)
    stacks = [structured(4, 60, 30, noise=0.1 * (1 + index % 3)) for index in range(6)]
    alone = [tucker(stack, (4, 8, 8)).dense() for stack in stacks]
    with ThreadPoolExecutor(2, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        together = list(pool.map(lambda stack: tucker(stack, (4, 8, 8)).dense(), stacks))
    monkeypatch.setattr(module, "LARGE", 1 << 30)
    for stack, one, other in zip(stacks, alone, together, strict=True):
        assert all(torch.allclose(one, x, atol=1e-5) for x in (other, tucker(stack, (4, 8, 8)).dense()))
    assert not torch.allclose(alone[0], alone[1], atol=1e-2)


def test_cuts_are_nearly_as_good_as_direct_decompositions():
    stack = structured(6, 40, 32, shared=10, own=3)
    triples = [(6, rank, rank) for rank in (2, 4, 8, 16)] + [(3, 6, 5), (6, 12, 4)]
    for ranks, found in zip(triples, tucker_many(stack, triples), strict=True):
        for factor in found[1:]:
            assert torch.allclose(factor.T @ factor, torch.eye(factor.shape[1]), atol=1e-5)
        direct, bound = (error(stack, tucker(stack, ranks, engine=engine)) for engine in ("hooi", "hosvd"))
        assert error(stack, found) <= min(1.01 * direct, bound)


IMPOSSIBLE = {
    (4, 1, 1): r"task rank 4 is above the full rank 3 = min\(T, m n\) = min\(3, 140\)",
    (3, 21, 1): r"out rank 21 is above the full rank 20 = min\(m, T n\) = min\(20, 21\)",
    (3, 20, 8): r"in rank 8 is above the full rank 7 = min\(n, T m\) = min\(7, 60\)",
    (3, 1.5, 1): "out rank 1.5 is not a whole number from 1 on",
}


@pytest.mark.parametrize("ranks", IMPOSSIBLE)
@own_engine
def test_impossible_ranks_are_named(ranks, engine):
    with pytest.raises(UserError, match=IMPOSSIBLE[ranks]):
        tucker(gaussian(3, 20, 7), ranks, engine=engine)


def test_what_cannot_be_decomposed_is_refused():
    stack = gaussian(3, 4, 5)
    stack[1, 0, 0] = float("nan")
    stack[2, 0, 0] = float("inf")
    for call in (lambda: tucker(stack, (1, 1, 1)), lambda: Ranks("energy", 0.1).resolve(stack)):
        with pytest.raises(UserError, match=r"tasks \[1, 2\] of the stack hold NaN or infinity"):
            call()
    with pytest.raises(UserError, match=r"not a shape \[4, 5\]"):
        tucker(gaussian(4, 5), (1, 1, 1))
    with pytest.raises(UserError, match="'qr' is unknown; engines are hooi"):
        tucker(gaussian(3, 4, 5), (1, 1, 1), engine="qr")
