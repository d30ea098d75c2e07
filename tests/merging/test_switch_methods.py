"""Binary and masked task vectors, chosen by the true task, by a router or by retrieval; Localize-and-Stitch."""

from dataclasses import replace

import published_switch as published
import pytest
import torch
from coloured import NAMES, PARTS, PASS, coloured, fitted
from samples import (
    BACKBONE,
    SHAPES,
    applied,
    drawn,
    equal,
    family,
    lasting,
    merged_of,
    models,
    opened,
    task_vectors,
    tower,
)

from merging import UserError, merge, open_merged
from merging.accounting import macs
from merging.deltas import Dense, Ternary
from merging.fit.gates import Discriminant, Learned, Retrieval
from merging.methods import Emr, FlexSwitch, LocalizeAndStitch, RankOneMoe, TallMask, TSwitch
from merging.routing.gates import GateShape
from merging.routing.install import install
from merging.routing.neighbours import Neighbours

ROUNDING = 4e-6  # as in test_mask_methods
NEAREST = replace(PASS, features="cls", activation="none", standardise=False, neighbours=5)
FEW = Retrieval(samples=9)
ROUTED = [TSwitch(routed=True), Emr(routed=True), TallMask(0.6, routed=True), lasting(FlexSwitch(routed=True), 2)]
IDS = {"ids": lambda method: type(method).__name__}
IMAGES = torch.cat([coloured(task, seed=1) for task in range(PARTS)])
TASKS = torch.arange(PARTS).repeat_interleave(len(IMAGES) // PARTS)


class TestTSwitch:
    @pytest.mark.parametrize("tasks", [1, 3, 8])
    @pytest.mark.parametrize("drop", [0.0, 0.6, 0.95])  # of 0.05 of few entries none is left to keep: then all are
    def test_equals_the_published_steps(self, tasks, drop):
        base, experts = family(tasks)
        changes = published.t_switch(task_vectors(base, experts), drop)
        for task, model in enumerate(models(merge(TSwitch(density=1 - drop), base, experts))):
            for key, weight in model.items():
                expected = base[key] + changes[key][task]
                assert torch.allclose(weight.double(), expected, rtol=0, atol=ROUNDING), key

    @pytest.mark.parametrize("density", [0.1, 0.4, 1.0])
    def test_keeps_the_norm_of_what_it_keeps_and_no_other_sign(self, density):
        base, experts = family(3)
        merged, taus = merge(TSwitch(density), base, experts), task_vectors(base, experts)
        for key, delta in merged.deltas.items():
            for task in range(3 if isinstance(delta, Ternary) else 0):
                change, tau = delta.part(task).double(), taus[key][task]
                assert float(change.norm()) == pytest.approx(float((tau * (change != 0)).norm()), rel=1e-6)
                assert set(change.sign().unique().tolist()) <= {-1.0, 0.0, 1.0} and len(change.abs().unique()) <= 2
                assert bool((change * tau >= 0).all())
                for sign in (1, -1):
                    count = int((sign * tau > 0).sum())
                    assert int((sign * change > 0).sum()) == (int(density * count) or count)

    def test_stores_two_bits_an_entry_and_one_number(self):
        base, experts = family(3)
        merged = merge(TSwitch(), base, experts)
        for key, delta in merged.deltas.items():
            size = base[key].numel()
            if isinstance(delta, Dense):
                assert not SHAPES[key] and delta.bytes == 4 * 3
            else:
                assert delta.bytes == 3 * (2 * -(-size // 8) + 4)
                assert delta.params == 3 + -(-3 * 2 * -(-size // 8) // 4)

    def test_signs_alone_are_exact(self):
        """Task vectors that are ternary come back, whatever the share."""
        base, _ = family(1)
        change = drawn(16, 16).sign() * (drawn(16, 16, seed=1) > 0.3) * 0.25
        expert = base | {"square.weight": base["square.weight"] + change}
        assert equal(*models(merge(TSwitch(0.3), base, [expert])), {key: expert[key] for key in SHAPES})


class TestLocalizeAndStitch:
    @pytest.mark.parametrize("tasks", [1, 2, 5])
    @pytest.mark.parametrize("density", [0.01, 0.1, 1.0])
    def test_equals_the_published_steps(self, tasks, density):
        base, experts = family(tasks)
        changes = published.localize_and_stitch(task_vectors(base, experts), density)
        (model,) = models(merge(LocalizeAndStitch(density), base, experts))
        for key, weight in model.items():
            assert torch.allclose(weight.double(), base[key] + changes[key], rtol=0, atol=ROUNDING), key

    def test_disjoint_masks_add_up_and_equal_experts_are_kept(self):
        base, large, small = {"w": torch.zeros(8, 8)}, 4 + drawn(8, 8).abs(), drawn(8, 8, seed=1) / 64
        halves = [torch.where(torch.arange(8)[:, None] < 4, *pair) for pair in ((large, small), (small, -large))]
        method = LocalizeAndStitch(0.4)
        kept = [models(merge(method, base, [{"w": half}]))[0]["w"] for half in halves]
        assert torch.equal(models(merge(method, base, [{"w": half} for half in halves]))[0]["w"], sum(kept))
        assert all(int(one.count_nonzero()) == int(0.4 * 64) - 1 for one in kept)
        twice = models(merge(method, base, [{"w": large}] * 3))[0]["w"]
        assert torch.allclose(twice, models(merge(method, base, [{"w": large}]))[0]["w"], rtol=1e-6, atol=0)

    def test_leaves_no_change_of_nothing(self):
        base = {"none": torch.zeros(0, 3)}
        assert models(merge(LocalizeAndStitch(), base, [dict(base)]))[0]["none"].shape == (0, 3)


@pytest.mark.parametrize("method", ROUTED, **IDS)
class TestRouted:
    def test_the_true_task_chooses_what_the_oracle_folds(self, method):
        base, experts = family(3, tower(), size=0.25, spread=0.0625)
        merged, oracle = (merged_of(replace(method, routed=routed), base, experts) for routed in (True, False))
        assert (merged.routing.router, oracle.routing.router) == ("learned", "oracle")
        assert all(map(equal, models(merged), models(oracle))) and merged.stored_bytes == oracle.stored_bytes
        routed, dense = install(BACKBONE.build(), merged), BACKBONE.build()
        with torch.inference_mode():
            for task, model in enumerate(models(merged)):
                dense.load_state_dict(model)
                found = routed(IMAGES[:4], w=merged.one_hot(task))
                assert torch.allclose(found, dense(IMAGES[:4]), rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize(
        ("shape", "train"), [(NEAREST, FEW), (replace(PASS, top_k=1), Discriminant())], ids=["retrieval", "learned"]
    )
    def test_every_sample_gets_the_masks_of_its_task(self, method, shape, train, tmp_path):
        merged = fitted(shape, train, method)
        model, dense, states = install(BACKBONE.build(), merged), BACKBONE.build(), models(merged)
        with torch.inference_mode():
            w = model.weights(IMAGES)
            assert (w.argmax(1) == TASKS).float().mean() > 0.95 and (w.amax(1) == 1).float().mean() > 0.8
            found, alone = model(IMAGES), torch.cat([model(image[None]) for image in IMAGES[::6]])
            assert torch.allclose(found[::6], alone, rtol=0, atol=1e-5)
            for task, state in enumerate(states):
                dense.load_state_dict(state)
                own = w[:, task] == 1
                assert torch.allclose(found[own], dense(IMAGES[own]), rtol=1e-4, atol=1e-5)
            again = open_merged(merged.save(tmp_path / "merged.safetensors"))
            assert torch.equal(install(BACKBONE.build(), again)(IMAGES), found)
        assert again.stored_bytes == merged.stored_bytes and again.params == merged.params


class TestRetrieval:
    def test_equals_the_published_classifier(self):
        """On the first token behind the last block of the base, kept of the first samples of each task."""
        merged, base = fitted(NEAREST, FEW, TSwitch(routed=True)), BACKBONE.build()
        base.load_state_dict({key: merged.base.tensor(key) for key in merged.base.specs() if key in base.state_dict()})
        seen = []
        base.visual.transformer.resblocks[-1].register_forward_hook(lambda *hooked: seen.append(hooked[-1][:, 0]))
        with torch.inference_mode():
            for images in (torch.cat([coloured(task)[:9] for task in range(PARTS)]), IMAGES):
                base(images)
            found = install(BACKBONE.build(), merged).weights(IMAGES)
        kept = torch.arange(PARTS).repeat_interleave(9)
        expected = [published.retrieved(query, seen[0], kept, PARTS, 5) for query in seen[1]]
        assert torch.allclose(found, torch.tensor(expected), atol=1e-6)

    def test_tokens_and_samples_are_looked_up_alike(self):
        plain, x = Neighbours(6, 3, 4), drawn(7, 6, seed=1)
        samples, weights = drawn(20, 6), torch.eye(3)[torch.arange(20) % 3]
        plain.keep(samples, weights)
        assert torch.equal(plain(x.expand(2, 7, 6)), plain(x).expand(2, 7, 3)) and plain.macs == 120
        plain.keep(samples[:3], weights[:3])  # fewer than neighbours
        assert torch.allclose(plain(x), torch.full((7, 3), 1 / 3))

    def test_counts_samples_in_bytes_and_work(self):
        merged = fitted(NEAREST, FEW, TSwitch(routed=True))
        assert merged.routing.params == PARTS * 9 * (16 + PARTS) + 2 * 16 == merged.routing.bytes // 4
        deltas = sum(delta.bytes for delta in merged.deltas.values())
        floats = sum(tensor.nbytes for tensor in map(merged.base.tensor, merged.base.specs()))
        assert merged.stored_bytes == floats + deltas + merged.routing.bytes
        added = sum(delta.mix_macs() for delta in merged.deltas.values())
        assert macs(merged, BACKBONE) > 2 * BACKBONE.macs + PARTS * 9 * 16 and added > 0

    def test_components_of_a_task_share_its_weight(self):
        merged = fitted(replace(NEAREST, sees="block"), FEW, RankOneMoe(2))
        (gate, *_) = merged.routing.gates
        assert gate.net[0].weights.shape == (PARTS * 9, 2 * PARTS)
        assert torch.equal(gate.net[0].weights, merged_rows(merged)[torch.arange(PARTS).repeat_interleave(9)])

    @pytest.mark.parametrize("granularity", ["sample", "batch"])
    def test_published_batches_share_their_mean(self, granularity):
        merged = fitted(replace(NEAREST, granularity=granularity), FEW, TSwitch(routed=True))
        with torch.inference_mode():
            w = install(BACKBONE.build(), merged).weights(IMAGES)
        assert w.shape == ((len(IMAGES), PARTS) if granularity == "sample" else (PARTS,))
        assert torch.allclose(w.sum(-1), torch.ones(()), atol=1e-6)

    def test_what_makes_no_sense(self):
        with pytest.raises(UserError, match=r"gate.neighbours=5 looks samples up .*depth=1, activation=none"):
            replace(NEAREST, activation="softmax")
        for shape, train in ((NEAREST, Discriminant()), (PASS, FEW)):
            with pytest.raises(UserError, match=r"router.gate.neighbours and .*Retrieval belong together|linear gate"):
                Learned(gate=shape, train=train)
        with pytest.raises(UserError, match=r"cannot weigh what comes before the blocks .*router.gate.sees=pass"):
            fitted(GateShape(), method=TSwitch(routed=True))


def merged_rows(merged):
    return torch.stack([merged.one_hot(task) for task in range(len(NAMES))])


def test_a_wrapper_in_front_is_what_is_switched():
    base, experts = family(2)
    found = opened(base, experts)
    half = applied(TSwitch(1.0), found.sparsified(lambda key, task, tau: tau.div_(2)))
    whole = applied(TSwitch(1.0), found)
    assert all(torch.equal(half.deltas[key].bits, whole.deltas[key].bits) for key in SHAPES if SHAPES[key])
