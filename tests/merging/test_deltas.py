"""Deltas against dense matrices: what they mix, what they add to a product, what they cost, how they are stored."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from merging.deltas import Coded, Dense, Grouped, LowRank, Masked, OnDemand, Positions, Rows, Ternary, Tucker, rebuild
from merging.deltas.scattered import Scattered
from merging.packed import Grid

M, N, T = 12, 7, 3
KINDS = (
    *("Dense", "LowRank", "Ragged", "Tucker", "Masked", "Ternary", "Positions", "Coded", "Turned", "Grouped"),
    *("Rows", "Columns", "OnDemand", "Scattered"),
)


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def delta(kind, parts=T, m=M, n=N, dtype=torch.float64, seed=0):
    """A random delta and, written out from its definition, the changes [parts, m, n] that it stands for."""
    draw = lambda *shape, index: normal(*shape, seed=10 * seed + index, dtype=dtype)  # noqa: E731
    if kind == "LowRank":
        up, down = draw(parts, m, 2, index=1), draw(parts, 2, n, index=2)
        return LowRank.of(up, down), torch.stack([up[t] @ down[t] for t in range(parts)])
    if kind == "Ragged":  # of ranks 3, 0, 1
        ups, downs = zip(*[(draw(m, r, index=r), draw(r, n, index=r + 10)) for r in (3, 0, 1)[:parts]], strict=True)
        return LowRank.of(ups, downs), torch.stack([up @ down for up, down in zip(ups, downs, strict=True)])
    if kind == "Columns":
        widths = enumerate((("Masked", n // 3), ("Ragged", n - n // 3)))
        pieces = [delta(each, parts, m, width, dtype, i + 1) for i, (each, width) in widths]
        return Rows([piece for piece, _ in pieces], axis=1), torch.cat([changes for _, changes in pieces], 2)
    if kind == "Tucker":  # fewer task directions than tasks, and other ranks on the two sides
        core, task = draw(max(1, parts - 1), 4, 3, index=3), draw(parts, max(1, parts - 1), index=4)
        out, into = draw(m, 4, index=5), draw(n, 3, index=6)
        return Tucker(core, task, out, into), torch.einsum("jab,tj,ma,nb->tmn", core, task, out, into)
    if kind == "Masked":
        vector, masks, scales = draw(m, n, index=7), draw(parts, m, n, index=8) > 0.3, draw(parts, index=9)
        return Masked.of(vector, masks, scales), torch.stack([scales[t] * vector * masks[t] for t in range(parts)])
    if kind == "Ternary":
        signs, scales = draw(parts, m, n, index=7).clamp(-1.5, 1.5).round().sign(), draw(parts, index=9)
        masks = torch.stack([signs > 0, signs < 0], 1).flatten(0, 1)
        return Ternary.of(masks, scales), scales.view(parts, 1, 1) * signs
    if kind == "Scattered":
        return scattered(draw, parts, m, n, dtype)
    if kind == "Positions":
        means, bases, weights = draw(m + n, 3, index=7), draw(m + n, 3, 2, index=8), draw(m + n, 2, parts, index=9)
        rows = means[..., None] + torch.einsum("irp,ipt->irt", bases, weights)
        changes = torch.einsum("irt,jrt->tij", rows[:m], rows[m:])
        return Positions(means, bases, weights, torch.Size((m, n))), changes
    if kind in ("Coded", "Turned"):  # of matrices as they are applied, and stored the other way round
        sides, turned = (n, m) if kind == "Turned" else (m, n), kind == "Turned"
        rounded = Grid(bits=8, group=3, symmetric=not turned)
        packed = [rounded.nearest(change.float(), (m, n), turned) for change in draw(parts, *sides, index=7)]
        return Coded.of(packed), torch.stack([change.opened() for change in packed]).to(dtype)
    if kind == "Grouped":  # the last part shares the change of the first
        of = [min(part, parts - 1) % max(1, parts - 1) for part in range(parts)]
        inner, changes = delta("Tucker", max(of) + 1, m, n, dtype, seed + 1)
        return Grouped(inner, of), changes[of]
    if kind == "Rows":
        pieces = [delta(each, parts, m // 3, n, dtype, i + 1) for i, each in enumerate(("LowRank", "Dense", "Tucker"))]
        return Rows([piece for piece, _ in pieces]), torch.cat([changes for _, changes in pieces], 1)
    changes = draw(parts, m, n, index=0)
    return (Dense(changes) if kind == "Dense" else OnDemand(changes.unbind().__getitem__, changes.shape[1:], parts)), (
        changes
    )


def scattered(draw, parts, m, n, dtype):
    """With codes of 1, 2 and 4 bits, and few, some and most of the entries kept."""
    places = [(draw(m * n, index=t) > 1 - t).nonzero()[:, 0] for t in range(parts)]
    codes = [(draw(len(kept), index=t) * 9).long() % 2**2**t for t, kept in enumerate(places)]
    levels, changes = draw(parts, 2, index=9), torch.zeros(parts, m * n, dtype=dtype)
    for t, (low, step) in enumerate(levels):
        for place, code in zip(places[t].tolist(), codes[t].tolist(), strict=True):
            changes[t, place] = (low + step * (code // 2)) * (-1) ** code
    delta = Scattered.of(places, codes, [2**t for t in range(parts)], levels, torch.Size((m, n)))
    return delta, changes.view(parts, m, n)


def weights_of(axes, batch=4, tokens=5, parts=T):
    """w [G], [B, G] or [B, N, G], of any sign and sum, and the same for every token [B, N, G]."""
    w = normal(*((batch, tokens)[: axes - 1]), parts, seed=77)
    return w, w.view(*w.shape[:-1], *[1] * (3 - axes), parts).expand(batch, tokens, parts)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("axes", [1, 2, 3])
class TestAlgebra:
    def test_mix_is_the_weighted_sum(self, kind, axes):
        found, changes = delta(kind)
        w, _ = weights_of(axes)
        expected = torch.einsum("...t,tmn->...mn", w, changes)
        torch.testing.assert_close(found.mix(w), expected, rtol=0, atol=1e-12)

    @pytest.mark.parametrize("parts", [1, T])
    def test_product_is_that_of_the_materialised_matrices(self, kind, axes, parts):
        found, changes = delta(kind, parts)
        w, by_token = weights_of(axes, parts=parts)
        x, onto = normal(4, 5, N, seed=1), normal(4, 5, M, seed=2)
        expected = onto + torch.einsum("bkt,tmn,bkn->bkm", by_token, changes, x)
        before = onto.clone(), x.clone(), w.clone()
        torch.testing.assert_close(found(x, w, onto), expected, rtol=0, atol=1e-10)
        with torch.inference_mode():
            torch.testing.assert_close(found(x, w, onto), expected, rtol=0, atol=1e-10)
        assert all(map(torch.equal, before, (onto, x, w)))

    def test_non_contiguous_input_and_output(self, kind, axes):
        found, changes = delta(kind)
        w, by_token = weights_of(axes)
        x, onto = normal(N, 5, 4, seed=1).permute(2, 1, 0), normal(4, M, 5, seed=2).mT
        expected = onto + torch.einsum("bkt,tmn,bkn->bkm", by_token, changes, x)
        torch.testing.assert_close(found(x, w, onto), expected, rtol=0, atol=1e-10)

    def test_gradient_to_the_weights(self, kind, axes):
        found, changes = delta(kind)
        w, _ = weights_of(axes)
        w[..., 0] = 0  # a part that is not in use has a gradient too
        x, onto, seen = normal(4, 5, N, seed=1), normal(4, 5, M, seed=2), normal(4, 5, M, seed=3)
        first, second = w.clone().requires_grad_(), w.clone().requires_grad_()
        (found(x, first, onto) * seen).sum().backward()
        by_token = second.view(*second.shape[:-1], *[1] * (3 - axes), T).expand(4, 5, T)
        (torch.einsum("bkt,tmn,bkn->bkm", by_token, changes, x) * seen).sum().backward()
        torch.testing.assert_close(first.grad, second.grad, rtol=1e-10, atol=1e-10)

    def test_no_samples_and_no_weight(self, kind, axes):
        found, _ = delta(kind)
        w, _ = weights_of(axes, batch=0 if axes > 1 else 4)
        empty = found(torch.zeros(0, 5, N).double(), w, torch.zeros(0, 5, M).double())
        assert empty.shape == (0, 5, M)
        w, _ = weights_of(axes)
        onto = normal(4, 5, M)
        assert torch.equal(found(normal(4, 5, N), 0 * w, onto), onto)


@pytest.mark.parametrize("kind", KINDS)
def test_batch_invariance(kind):
    found, _ = delta(kind)
    w, _ = weights_of(2)
    x, onto = normal(4, 5, N, seed=1), normal(4, 5, M, seed=2)
    together = found(x, w, onto)
    for b in range(4):
        torch.testing.assert_close(found(x[b : b + 1], w[b : b + 1], onto[b : b + 1]), together[b : b + 1])


@pytest.mark.parametrize("kind", KINDS)
def test_transposed(kind):
    found, changes = delta(kind)
    w, _ = weights_of(2)
    other = found.transposed()
    assert (type(other), other.shape, other.parts) == (type(found), (N, M), T)
    torch.testing.assert_close(other.mix(w), torch.einsum("bt,tmn->bnm", w, changes))
    if kind != "OnDemand":
        assert (other.params, other.bytes) == (found.params, found.bytes)
    assert other.transposed().facts() == found.facts()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("axes", [1, 2, 3])
def test_rows_of_a_table_by_their_ids(kind, axes):
    found, changes = delta(kind)
    w, by_token = weights_of(axes)
    ids = torch.arange(20).view(4, 5) * 5 % M
    expected = torch.einsum("bkt,tbkn->bkn", by_token, changes[:, ids])
    torch.testing.assert_close(found.looked_up(ids, w), expected, rtol=0, atol=1e-12)


def test_ranks_that_do_not_fit_their_factors_are_refused():
    with pytest.raises(ValueError, match=r"ranks \(2, 2\) of 2 changes are not those of 3 rows"):
        LowRank(normal(M, 3), normal(3, N), 2, ranks=(2, 2))


@pytest.mark.parametrize("kind", ["LowRank", "Tucker"])
@pytest.mark.parametrize("axes", [1, 2, 3])
def test_bf16_factors(kind, axes):
    found, _ = delta(kind, m=96, n=48, dtype=torch.float32)
    w, _ = weights_of(axes)
    w, x, onto = w.float(), normal(4, 5, 48, dtype=torch.float32), torch.zeros(4, 5, 96)
    exact = found(x, w, onto)
    rounded = found.to(torch.bfloat16)(x.bfloat16(), w, onto.bfloat16())
    assert rounded.dtype == torch.bfloat16
    assert float((rounded - exact).norm() / exact.norm()) < 1e-2


class Largest(TorchDispatchMode):
    """Notes the largest tensor that any operation returns."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for each in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(each, torch.Tensor):
                self.numel = max(self.numel, each.numel())
        return result


@pytest.mark.parametrize("kind", KINDS)
def test_no_matrix_per_sample_is_built(kind):
    """Factors m x n = 256 x 192 against 16 samples of 2 tokens: B r_o r_i and B N m are small, B m n is not."""
    m, n, batch = 255, 192, 16
    found, _ = delta(kind, m=m, n=n)
    w, _ = weights_of(2, batch)
    with Largest() as seen, torch.inference_mode():
        found(normal(batch, 2, n), w, torch.zeros(batch, 2, m).double())
    assert seen.numel <= max(m * n, batch * 2 * m) < batch * m * n


@pytest.mark.parametrize("w", [torch.ones(3), torch.ones(4, 3), torch.ones(4, 5, 3)])
def test_what_no_adapter_changed_has_no_rank_and_changes_nothing(w):
    found = LowRank(normal(M, 0), normal(0, N), 3, ranks=(0, 0, 0))
    x, onto = normal(4, 5, N, seed=1), normal(4, 5, M, seed=2)
    assert torch.equal(found(x, w.double(), onto), onto)


def test_unused_parts_of_low_rank_are_not_run():
    """Top-1: the samples of one expert cost r, not T r."""
    found, _ = delta("LowRank", 8, 30, 30)
    x, onto = normal(6, 5, 30), torch.zeros(6, 5, 30).double()
    for w in (torch.eye(8)[3].double(), 0.7 * torch.eye(8)[[3] * 6].double()):
        shapes = []

        class Products(TorchDispatchMode):
            def __torch_dispatch__(self, func, types, args=(), kwargs=None, shapes=shapes):
                result = func(*args, **(kwargs or {}))
                if func is torch.ops.aten.mm.default:
                    shapes.append(tuple(result.shape))
                return result

        with Products():
            found.add_(x, w, onto.clone())
        assert shapes == [(30, 2)]


class TestStorage:
    @pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "OnDemand"])
    @pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
    def test_rebuilt_bitwise(self, kind, dtype):
        found, _ = delta(kind)
        found = found.to(dtype)
        again = rebuild(found.facts(), dict(found.named_buffers()))
        assert (again.facts(), again.params, again.bytes) == (found.facts(), found.params, found.bytes)
        assert [*dict(again.named_buffers())] == [*dict(found.named_buffers())]
        w, _ = weights_of(2)
        assert torch.equal(again.mix(w), found.mix(w))

    def test_on_demand_is_stored_dense(self):
        found, changes = delta("OnDemand")
        assert torch.equal(found.stored().changes, changes)
        assert (found.params, found.bytes) == (changes.numel(), 4 * changes.numel())

    @pytest.mark.parametrize("shape", [(), (5,), (2, 3, 4, 4)])
    @pytest.mark.parametrize("kind", ["Dense", "Masked", "OnDemand"])
    def test_any_shape(self, kind, shape):
        changes = normal(T, *shape)
        found = {
            "Dense": lambda: Dense(changes),
            "Masked": lambda: Masked.of(normal(*shape, seed=5), changes > 0, normal(T, seed=6)),
            "OnDemand": lambda: OnDemand(changes.unbind().__getitem__, changes.shape[1:], T),
        }[kind]()
        if kind == "Masked":
            changes = normal(T, seed=6).view(T, *[1] * len(shape)) * (changes > 0) * normal(*shape, seed=5)
        for w in (weights_of(1)[0], weights_of(2)[0]):
            torch.testing.assert_close(found.mix(w), torch.einsum("...t,t...->...", w, changes) if not shape else (
                torch.tensordot(w, changes, 1)))  # fmt: skip

    def test_a_convolution_keeps_its_shape(self):
        u, vh = normal(T, 6, 2), normal(T, 2, 12)
        found = LowRank.of(u, vh, torch.Size((6, 3, 2, 2)))
        again = rebuild(found.facts(), dict(found.named_buffers()))
        w, _ = weights_of(2)
        assert again.sides() == (6, 12)
        torch.testing.assert_close(again.mix(w), torch.einsum("bt,tmr,trn->bmn", w, u, vh).view(4, 6, 3, 2, 2))

    def test_bits_and_zeros_are_counted_as_stored(self):
        masked, _ = delta("Masked", m=10, n=9)
        assert masked.bytes == 8 * 90 + T * 12 + 8 * T  # vector and scales in fp64, ceil(90 / 8) bytes of bits per task
        assert delta("Ternary", m=10, n=9)[0].bytes == 2 * T * 12 + 8 * T
        sparse = torch.zeros(4, 10, 10)
        sparse[:, 0] = 1
        assert Dense(sparse).bytes == 4 * 40 + 50  # 40 values and 400 bits
        assert Dense(torch.ones(4, 10, 10)).bytes == 1600
        coded, shared = delta("Coded", m=10, n=9)[0], Grouped(Dense(torch.ones(2, 10, 10)), [0, 1, 1, 0, 1])
        assert coded.bytes == T * (90 + 3 * 20) and coded.params == -(-coded.bytes // 4)  # three steps a row, in bf16
        assert (shared.parts, shared.bytes, shared.params) == (5, 800, 200)
        assert shared.macs(3) == shared.macs(3, used=4) == 200 and shared.macs(3, used=1) == 100


def test_a_change_of_no_group_is_refused():
    for of in ([0, 0, 0], [0, 2, 1]):
        with pytest.raises(ValueError, match="do not share 2 changes"):
            Grouped(Dense(normal(2, M, N)), of)
