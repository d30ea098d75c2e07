"""The kernels of a routed tower equal each other and the folded weights, in every mode of torch."""

from dataclasses import replace

import pytest
import torch
from routes import BATCH, KINDS, T, backbone, close, ffn, folded, gates, images, merge
from torch.utils._python_dispatch import TorchDispatchMode

from merging.deltas import Tucker
from merging.routing.install import install
from merging.routing.leaves import Linear
from merging.routing.routed import KERNELS


@pytest.mark.parametrize("kernel", KERNELS)
class TestKernels:
    def test_equal_the_folded_weights_in_fp64(self, kernel):
        merged = merge(tuple(kind for kind in KINDS if kind != "OnDemand"))
        tower = install(backbone().build(), merged).double().use(kernel)
        w = gates()[[0, 1, 0, 2, 0, 1]].double()
        exact = double(merged)
        close(tower(images(dtype=torch.float64), w=w), folded(exact, images(), w), 1e-10)
        close(tower(images(dtype=torch.float64), w=w[0]), folded(exact, images(), [w[0]] * BATCH), 1e-10)

    @pytest.mark.parametrize("parts", [1, T])
    def test_equal_in_fp32_with_one_part_or_more(self, kernel, parts):
        merged = merge(parts=parts)
        tower = install(backbone().build(), merged).use(kernel)
        for w in (gates(parts=parts), torch.eye(parts)[[0] * BATCH], torch.zeros(BATCH, parts)):
            with torch.inference_mode():
                close(tower(images(), w=w), folded(merged, images(), w))

    def test_gradients_to_the_weights(self, kernel):
        merged = merge(("Dense", "LowRank", "Tucker", "Masked"))
        tower = install(backbone().build(), merged).double()
        x, start = images(dtype=torch.float64), torch.eye(T).repeat(2, 1).double()
        found = []
        for name in (kernel, "materialised"):
            w = start.clone().requires_grad_()
            tower.use(name)(x, w=w).square().sum().backward()
            found.append(w.grad)
        torch.testing.assert_close(*found, rtol=1e-9, atol=1e-9)
        for index in ((0, 0), (4, 2)):  # and against differences
            step = torch.zeros_like(start)
            step[index] = 1e-6
            change = tower(x, w=start + step).square().sum() - tower(x, w=start - step).square().sum()
            assert float(change) / 2e-6 == pytest.approx(float(found[0][index]), rel=1e-5)

    def test_samples_do_not_see_each_other(self, kernel):
        """Alone, in a mixed batch, in another order: the same features. Catches weights averaged over a batch."""
        tower = install(backbone().build(), merge()).use(kernel)
        w, order = gates()[[0, 1, 0, 2, 2, 0]], torch.tensor([3, 0, 5, 1, 4, 2])
        with torch.inference_mode():
            mixed = tower(images(), w=w)
            close(tower(images()[order], w=w[order]), mixed[order].double(), 1e-6)
            for sample in range(BATCH):
                some = slice(sample, sample + 1)
                close(tower(images()[some], w=w[some]), mixed[some].double(), 1e-6)

    def test_nobody_elses_tensors_are_written(self, kernel):
        merged = merge()
        tower = install(backbone().build(), merged).use(kernel)
        x, w = images(), gates()[[0, 0, 0, 0, 1, 1]]
        kept = {name: each.clone() for name, each in tower.named_buffers()}
        with torch.inference_mode():
            first = tower(x, w=w)
            assert torch.equal(tower(x, w=w), first)
        assert torch.equal(x, images()) and torch.equal(w, gates()[[0, 0, 0, 0, 1, 1]])
        assert all(torch.equal(kept[name], each) for name, each in tower.named_buffers())

    def test_strided_images(self, kernel):
        tower = install(backbone().build(), merge()).use(kernel)
        strided = images().permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2)
        assert not strided.is_contiguous()
        torch.testing.assert_close(tower(strided, w=gates()), tower(images(), w=gates()))


def double(merged):
    """The same merge with its numbers in fp64, so that nothing is rounded to fp32 on the way."""
    own = {
        key: each.double() for key, each in merge(tuple(kind for kind in KINDS if kind != "OnDemand")).deltas.items()
    }
    return replace(merged, deltas=own)


@pytest.mark.parametrize("top", [1, 2])
def test_samples_with_the_same_parts_run_together(top):
    """Top-k weights differ between samples: only the parts in use are multiplied, the order is kept."""
    merged = merge(("LowRank",), routes=ffn, parts=8)
    tower = install(backbone().build(), merged).use("grouped")
    w = torch.zeros(16, 8)
    for sample in range(16):
        used = [(sample % 3 + i) % 8 for i in range(top)]
        w[sample, used] = 0.5 + 0.01 * sample
    assert len(w.unique(dim=0)) == 16
    sizes = []

    class Products(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten.mm.default:  # x down^T
                sizes.append(args[1].shape[1])
            return func(*args, **(kwargs or {}))

    with torch.no_grad(), Products():
        found = tower(images(16), w=w)
    assert 2 * top in sizes and 2 * 8 not in sizes  # rank 2 for each part in use, in every product
    close(found, folded(merged, images(16), w))


class TestModes:
    @pytest.mark.parametrize("kernel", ["auto", "materialised", "folded"])
    def test_autocast(self, kernel):
        tower = install(backbone().build(), merge()).use(kernel)
        w = gates()[[0, 0, 0, 1, 1, 1]]
        expected = tower(images(), w=w).detach()
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
            found = tower(images(), w=w)
        assert 1e-6 < float((found - expected).norm() / expected.norm()) < 3e-2

    def test_autocast_with_gates_in_training(self):
        tower = install(backbone().build(), merge(routes=ffn))
        w = gates().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            tower(images(), w=w).float().square().sum().backward()
        rounded, w.grad = w.grad, None
        tower(images(), w=w).square().sum().backward()
        close(rounded, w.grad.double(), 5e-2)

    @pytest.mark.parametrize("kernel", ["auto", "materialised"])
    def test_bf16_weights(self, kernel):
        """fp32 weights of parts for a model in bf16, as a gate kept in fp32 gives them; the merge itself stays fp32."""
        merged = merge(("Dense", "LowRank", "Tucker", "Masked"), routes=ffn)
        expected = install(backbone().build(), merged)(images(), w=gates())
        tower = install(backbone().build(), merged).to(torch.bfloat16).use(kernel)
        found = tower(images(dtype=torch.bfloat16), w=gates())
        assert found.dtype == torch.bfloat16
        close(found, expected.double(), 3e-2)
        assert {each.dtype for delta in merged.deltas.values() for each in delta.buffers()} == {
            torch.float32,
            torch.uint8,
        }


@pytest.mark.parametrize("batch", [4, 8])
def test_what_gate_training_keeps(batch):
    """Beyond the weights: at most Z, Z_2 and the mixed core of every sample, never its matrix (C.5 of the notes)."""
    m, n, tokens, r_o, r_i = 60, 40, 5, 7, 6
    rng = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(shape, generator=rng)  # noqa: E731
    layer = Linear(draw(m, n), None, Tucker(draw(T, r_o, r_i), draw(T, T), draw(m, r_o), draw(n, r_i)))
    x = draw(batch, tokens, n).requires_grad_()  # as behind another routed layer

    def kept(kernel):
        sizes, held = {}, []

        def pack(tensor):
            sizes[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
            held.append(tensor)
            return tensor

        layer.kernel = kernel
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            layer.holder.w = gates(batch).requires_grad_()
            layer(x)
        static = {each.untyped_storage()._cdata for each in (x, *layer.parameters(), *layer.buffers())}
        return sum(size for key, size in sizes.items() if key not in static) / 4

    needed = batch * (tokens * (r_o + r_i) + r_o * r_i)
    assert 0 < kept("factored") <= needed + 2 * batch * T  # and w, and u
    assert kept("materialised") >= batch * m * n > 10 * needed
