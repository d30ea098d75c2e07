"""A routed tower against open_clip's own forward of the folded weights, with given weights and with gates."""

from dataclasses import replace

import pytest
import torch
from routes import (
    BATCH,
    KINDS,
    SHAPE,
    T,
    backbone,
    close,
    delta,
    ffn,
    folded,
    gated,
    gates,
    images,
    merge,
    weights,
)

from merging.backbones.open_clip import OpenClip
from merging.checkpoints import StateDict
from merging.deltas import Dense
from merging.errors import UserError
from merging.merged import Merged
from merging.routing.gates import listening
from merging.routing.install import install
from merging.routing.routed import KERNELS


@pytest.mark.parametrize("quick_gelu", [False, True])
class TestAgainstOpenClip:
    def test_static(self, quick_gelu):
        merged = replace(merge(), deltas={})
        tower = backbone(quick_gelu).build()
        merged = replace(merged, base=StateDict(weights(quick_gelu)))
        tower.load_state_dict(dict(merged.state()))
        with torch.inference_mode():
            expected = tower(images())
            torch.testing.assert_close(install(backbone(quick_gelu).build(), merged)(images()), expected)

    @pytest.mark.parametrize("kind", [*KINDS, "Rows"])
    def test_every_parameter_routed(self, quick_gelu, kind):
        """Patches, class token, positions, norms, attention, FFNs and the projection, all by one kind of delta."""
        merged = merge((kind,), quick_gelu)
        assert len(merged.deltas) == len(weights())
        tower = install(backbone(quick_gelu).build(), merged)
        for w in (gates(), torch.eye(T).repeat(2, 1)):
            close(tower(images(), w=w), folded(merged, images(), w, quick_gelu), 1e-5)
        shared = gates()[0]
        close(tower(images(), w=shared), folded(merged, images(), [shared] * BATCH, quick_gelu), 1e-5)


class TestGates:
    @pytest.mark.parametrize("kernel", KERNELS)
    @pytest.mark.parametrize("top_k", [None, 1])
    @pytest.mark.parametrize("sees", ["block", "early", "pass"])
    def test_kernels_agree_and_samples_are_apart(self, sees, top_k, kernel):
        merged = gated(sees, top_k=top_k)
        tower = install(backbone().build(), merged).use("factored")
        with torch.inference_mode(), listening() as heard:
            expected = tower(images(16))
            assert float(torch.stack(heard).std(1).max()) > 0.05
            close(tower.use(kernel)(images(16)), expected.double(), 1e-5)
            close(tower(images(16)[5:6]), expected[5:6].double(), 1e-5)

    @pytest.mark.parametrize("sees", ["early", "pass"])
    def test_one_gate_is_the_folded_model_of_its_weights(self, sees):
        merged = gated(sees, routes=lambda key: "resblocks.1" in key or "post" in key)
        with torch.inference_mode(), listening() as heard:
            found = install(backbone().build(), merged)(images())
        assert len(heard) == 1
        close(found, folded(merged, images(), heard[0]), 1e-5)

    @pytest.mark.parametrize("routes", [ffn, lambda key: "resblocks" in key])
    @pytest.mark.parametrize("shared", [False, True])
    def test_block_gates_weigh_their_own_block(self, routes, shared):
        """Fold every sample's block by what that block's gate answered."""
        merged = gated("block", routes=routes, shared=shared)
        with torch.inference_mode(), listening() as heard:
            found = install(backbone().build(), merged)(images())
        tower = backbone().build().double()
        for sample in range(BATCH):
            state = {key: merged.static(key) for key in merged.specs}
            for key, each in merged.deltas.items():
                state[key] = state[key] + each.mix(heard[int(key.split(".")[3])][sample])
            tower.load_state_dict({key: each.double() for key, each in state.items()})
            close(found[sample], tower(images()[sample : sample + 1].double())[0], 1e-5)

    @pytest.mark.parametrize("granularity", ["token", "batch"])
    def test_other_granularities(self, granularity):
        merged = gated("block", granularity=granularity, features="mean")
        tower = install(backbone().build(), merged)
        with torch.inference_mode(), listening() as heard:
            found = tower(images())
        assert [w.shape for w in heard] == [(BATCH, 5, T) if granularity == "token" else (T,)] * 2
        with torch.inference_mode():
            alone = torch.cat([tower(each) for each in images().split(1)])
        assert torch.allclose(alone, found, atol=1e-5) == (granularity == "token")

    def test_gradients_reach_the_gates_alone(self):
        merged = gated("block")
        install(backbone().build(), merged)(images()).square().sum().backward()
        for gate in merged.routing.gates:
            assert all(float(each.grad.abs().max()) > 0 for each in gate.net.parameters())


class TestBadInput:
    @pytest.mark.parametrize("shape", [(), (T + 1,), (BATCH, T + 1), (BATCH - 1, T), (BATCH, 5, T + 1)])
    def test_weights_of_a_wrong_shape(self, shape):
        tower = install(backbone().build(), merge())
        with pytest.raises(UserError, match=r"mixes 3 parts for 6 samples: give \[3\].*\[6, 3\]"):
            tower(images(), w=torch.zeros(shape))

    def test_no_weights(self):
        with pytest.raises(UserError, match="has no gate: give the gating weights"):
            install(backbone().build(), merge())(images())

    def test_delta_of_a_wrong_shape(self):
        key = "visual.transformer.resblocks.0.mlp.c_fc.weight"
        merged = replace(merge(), deltas={key: Dense(torch.zeros(T, 24, 96))})
        with pytest.raises(UserError, match=r"c_fc.weight is for shape \(24, 96\), the parameter is \(96, 24\)"):
            install(backbone().build(), merged)

    def test_delta_of_an_unknown_parameter(self):
        merged = replace(merge(), deltas={"visual.other": Dense(torch.zeros(T, 4))})
        with pytest.raises(UserError, match=r"visual.other is for shape .* the parameter is not there"):
            install(backbone().build(), merged)

    def test_another_number_of_parts(self):
        merged = merge()
        merged.deltas["visual.ln_post.bias"] = Dense(torch.zeros(T + 1, 24))
        with pytest.raises(UserError, match=r"ln_post.bias mixes 4 parts, the gate gives 3 weights"):
            install(backbone().build(), merged)

    def test_gate_that_gives_nan(self):
        merged = gated("block")
        merged.routing.gates[1].net[0].weight.data[0, 0] = torch.nan
        with pytest.raises(UserError, match="A gate gives NaN or Inf"):
            install(backbone().build(), merged)(images())

    def test_unknown_kernel(self):
        with pytest.raises(UserError, match=r"kernel='fast' is unknown. Choose one of auto, factored"):
            install(backbone().build(), merge()).use("fast")

    @pytest.mark.parametrize("change", [{"attentional_pool": True}, {"no_ln_pre": True}, {"pool_type": "avg"}])
    def test_other_towers_are_routed_or_refused(self, change):
        """What is pooled by attention over other inputs is refused, the rest is right by its own forward."""
        other = OpenClip("other", 16, SHAPE | change).build()
        base = StateDict({key: 0.3 + value for key, value in other.state_dict().items()})
        deltas = {key: delta("Dense", spec.shape, i) for i, (key, spec) in enumerate(base.specs().items())}
        merged = Merged(base, ("a", "b", "c"), base.specs(), deltas=deltas)
        if "attentional_pool" in change:
            with pytest.raises(UserError, match="keys or values of a width"):
                install(other, merged)
            return
        found = install(other, merged)(images(), w=gates())
        other.load_state_dict(dict(merged.state(gates()[2])))
        close(found[2:3], other(images()[2:3]).double(), 1e-5)


def test_incomplete_patches_are_left_out_as_by_a_convolution():
    merged = replace(merge(), deltas={})
    tower = backbone().build()
    tower.load_state_dict(dict(merged.state()))
    x = torch.randn(2, 3, 19, 17, generator=torch.Generator().manual_seed(4))
    torch.testing.assert_close(install(backbone().build(), merged)(x), tower(x))
