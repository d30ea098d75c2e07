"""Decompositions against their definitions and against torch's direct fp64 SVD."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from merging.decompose.svd import EPS, polar, svd

SHAPES = [(24, 24), (40, 12), (12, 40), (7, 1), (1, 7), (1, 1)]


def gaussian(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def with_spectrum(m, n, values):
    u, v = (torch.linalg.qr(gaussian(size, len(values), seed=seed).double())[0] for seed, size in enumerate((m, n)))
    return (u * values @ v.T).float()


def plain(matrix):
    """u, s, vh by a direct SVD in double precision, limited to what rounding to fp32 cannot have created."""
    u, s, vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    present = s > 2 * EPS * matrix.double().norm()
    return u * present, s * present, vh * present[:, None]


def tsv(taus, svd, polar):
    k = min(taus[0].shape) // len(taus)
    u, s, vh = zip(*map(svd, taus), strict=True)
    u, s, vh = torch.cat([x[:, :k] for x in u], 1), torch.cat([x[:k] for x in s]), torch.cat([x[:k] for x in vh])
    return polar(u) * s @ polar(vh)


@pytest.mark.parametrize("shape", SHAPES)
def test_all_triplets_give_the_matrix_back(shape):
    matrix = gaussian(*shape)
    u, s, vh = svd(matrix)
    identity = torch.eye(min(shape))
    assert torch.allclose(u * s @ vh, matrix, atol=1e-5)
    assert torch.allclose(u.T @ u, identity, atol=1e-6) and torch.allclose(vh @ vh.T, identity, atol=1e-6)
    assert torch.allclose(s, torch.linalg.svdvals(matrix), rtol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [0, 1, 2, 5, 99])
def test_few_triplets_are_the_first_of_all(shape, rank):
    few, every = svd(gaussian(*shape), rank), svd(gaussian(*shape))
    assert few.s.dtype == torch.float32 and len(few.s) == min(rank, *shape)
    for part, whole in zip(few, (every.u[:, :rank], every.s[:rank], every.vh[:rank]), strict=True):
        assert torch.allclose(part, whole, atol=1e-5)


@pytest.mark.parametrize("matrix", [torch.zeros(6, 4), gaussian(9, 2) @ gaussian(2, 20), torch.ones(5, 5)])
def test_triplets_beyond_the_numerical_rank_are_zero(matrix):
    u, s, vh = svd(matrix)
    rank = int(torch.linalg.matrix_rank(matrix))
    assert not u[:, rank:].any() and not s[rank:].any() and not vh[rank:].any() and s[:rank].all()
    assert torch.allclose(u * s @ vh, matrix, atol=1e-5)


def test_equal_singular_values():
    u, s, vh = svd(3 * torch.eye(40), 5)
    assert torch.allclose(s, torch.full((5,), 3.0)) and torch.allclose(u.T, vh, atol=1e-6)
    assert torch.allclose(polar(3 * torch.eye(40)), torch.eye(40), atol=1e-6)


@pytest.mark.parametrize("smallest", [1e-1, 1e-3, 1e-4])
@pytest.mark.parametrize("shape", [(32, 32), (48, 32), (32, 48)])
def test_polar_of_nearly_singular_matrices(shape, smallest):
    matrix = with_spectrum(*shape, torch.logspace(0, torch.tensor(smallest).log10(), 32).double())
    u, _, vh = plain(matrix)
    assert torch.linalg.matrix_norm(polar(matrix).double() - u @ vh, 2) < 1e-4


def test_polar_ignores_rotations_inside_blocks_and_keeps_zero_columns_harmless():
    matrix, turn = gaussian(20, 6), polar(gaussian(6, 6, seed=1))
    assert torch.allclose(polar(matrix @ turn), polar(matrix) @ turn, atol=1e-5)
    padded = torch.cat([matrix[:, :2], torch.zeros(20, 3), matrix[:, 2:]], 1)
    assert torch.allclose(polar(padded)[:, [0, 1, 5, 6, 7, 8]], polar(matrix), atol=1e-6)
    assert polar(padded)[:, 2:5].abs().max() < 1e-6 and not polar(torch.zeros(4, 9)).any()
    assert torch.allclose((polar(matrix) * matrix).sum(), torch.linalg.svdvals(matrix).sum())


@pytest.mark.parametrize("kind", ["gaussian", "power", "steep", "low rank", "twins", "with zero"])
@pytest.mark.parametrize("shape", [(32, 32), (64, 32), (32, 64)])
def test_tsv_merge_equals_a_plain_transcription(shape, kind):
    taus = [gaussian(*shape, seed=seed) for seed in range(4)]
    index = torch.arange(1, 33)
    for t, tau in enumerate(taus):
        u, s, vh = torch.linalg.svd(tau, full_matrices=False)
        spectra = {"power": index**-2.0, "steep": 0.5**index, "low rank": (index < 4).float()}
        taus[t] = u * spectra.get(kind, s) @ vh
    if kind == "twins":
        taus[1] = taus[0]
    if kind == "with zero":
        taus[2] = torch.zeros(shape)
    expected = tsv(taus, plain, lambda matrix: plain(matrix)[0] @ plain(matrix)[2])
    assert (tsv(taus, svd, polar) - expected).norm() < 1e-5 * expected.norm()


def test_repeats_exactly_and_leaves_the_input_alone_in_threads():
    matrices = [gaussian(50, 30, seed=seed % 2) for seed in range(8)]
    before = [matrix.clone() for matrix in matrices]
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(svd, matrices))
    assert all(torch.equal(a, b) for i in range(8) for a, b in zip(found[i], found[i % 2], strict=True))
    assert all(map(torch.equal, matrices, before))
    assert torch.equal(svd(matrices[0].T).u, found[0].vh.T)


def test_not_finite_is_refused():
    for worst in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="NaN"):
            svd(torch.full((3, 3), worst))
