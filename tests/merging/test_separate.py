"""Query, key and value as three parameters: what changes, what may not, and that nobody else notices."""

from dataclasses import replace

import pytest
import torch
from samples import BACKBONE, applied, context, drawn, equal, every_method, family, models, opened, quick, tower

from merging import Experts, open_merged
from merging.checkpoints import StateDict
from merging.decompose.ranks import Ranks
from merging.deltas import Dense, LowRank, Masked, OnDemand, Rows
from merging.fit.gates import Learned, TaskId
from merging.methods import (
    Average,
    Dare,
    Duet,
    Emr,
    Expert,
    Fisher,
    IsoC,
    NeuronMask,
    Single,
    Smile,
    TallMask,
    TaskArithmetic,
    Ties,
    TsvM,
    TSwitch,
    Twin,
    Wemoe,
)
from merging.neurons import Neurons
from merging.qkv import Joined, join
from merging.routing.install import install

T = 3
BLOCK = "visual.transformer.resblocks.1.attn."
MATRIX, VECTOR = f"{BLOCK}in_proj_weight", f"{BLOCK}in_proj_bias"
FULL = Ranks("energy", 0.0)
ROUTED = [
    Twin(rank=3, keep=0.5),
    Twin(start=None, sparsify="magnitude", keep=0.3),
    Twin(shared=TsvM(), measure="energy", keep=0.6),
    Duet("all"),
    Duet("all", static=False, factors="svd", ranks=Ranks("absolute", 3, task=2)),
    Duet(rest=TsvM()),
    Smile(rank=4, gate_rank=2),
    Wemoe(rest=TsvM()),
    Emr(),
    TallMask(),
    TSwitch(),
    Expert(),
]
IDS = {"ids": lambda method: type(method).__name__}


def experts(separate=True, tasks=T):
    base, tuned = family(tasks, tower(), size=0.25, spread=0.0625)
    for state in (base, *tuned):
        del state["position_ids"]
    return replace(opened(base, tuned, ["cars", "signs", "digits"][:tasks]), separate_qkv=separate)


def by_hand(state):
    """The same numbers under three names, cut here by indexing."""
    apart = {}
    for key, tensor in state.items():
        if "in_proj_" not in key:
            apart[key] = tensor
            continue
        rows = len(tensor) // 3
        for index, letter in enumerate("qkv"):
            apart[key.replace("in_proj", f"{letter}_proj")] = tensor[index * rows : (index + 1) * rows].clone()
    return apart


def split_by_hand():
    """Experts whose checkpoints hold three matrices; no flag is involved."""
    base, tuned = family(T, tower(), size=0.25, spread=0.0625)
    for state in (base, *tuned):
        del state["position_ids"]
    return Experts.open(by_hand(base), [by_hand(state) for state in tuned], ["cars", "signs", "digits"])


def dense(method, separate=True):
    return models(applied(method, experts(separate)))


def images():
    return drawn(5, 3, 16, 16, seed=5)


class TestView:
    def test_three_parameters_of_attention_instead_of_one(self):
        seen, fused = experts(), experts(False)
        assert seen.specs().keys() == by_hand(dict.fromkeys(fused.specs(), torch.zeros(3))).keys()
        assert not any("in_proj" in key for key in seen.keys())  # noqa: SIM118
        for letter in "qkv":
            for kind in ("weight", "bias"):
                key = f"{BLOCK}{letter}_proj_{kind}"
                info = BACKBONE.param(key)
                assert info.family == "attention" and info.depth == 1 and not info.after
                assert key in seen.keys("attention")

    def test_the_numbers_of_the_fused_one(self):
        seen, fused = experts(), experts(False)
        for key in (MATRIX, VECTOR):
            names = [key.replace("in_proj", f"{letter}_proj") for letter in "qkv"]
            assert torch.equal(torch.cat([seen.base(name) for name in names]), fused.base(key))
            assert torch.equal(torch.cat([seen.tau(name) for name in names], 1), fused.tau(key))
            assert [seen.specs()[name].shape for name in names] == [seen.base(name).shape for name in names]
        streamed = {key: tau.clone() for key, tau in seen.stream()}
        assert equal(streamed, {key: seen.tau(key) for key in seen.specs()})

    def test_the_checkpoints_stay_fused(self):
        seen = experts()
        BACKBONE.build().load_state_dict({key: seen.checkpoints[0].tensor(key) for key in seen.checkpoints[0].specs()})
        assert seen.origin.id == experts(False).origin.id

    def test_factors_have_entries_of_their_own_in_the_cache(self, cache):
        for order in ((True, False), (False, True)):
            for separate in order:
                cached = replace(experts(separate), cache=cache)
                assert all(map(equal, models(TsvM()(cached)), dense(TsvM(), separate)))


class TestStatic:
    @pytest.mark.parametrize(
        "method",
        [Average(), TaskArithmetic(), TaskArithmetic(kinds={"attention": 0.7}), Ties(), Single(), Fisher(samples=4)],
        **IDS,
    )
    def test_methods_that_work_entry_by_entry_give_the_same_bits(self, method):
        assert all(map(equal, dense(method), dense(method, False)))

    @pytest.mark.parametrize("method", [TsvM(), IsoC(), Dare(then=TsvM()), NeuronMask(then=TsvM())], **IDS)
    def test_methods_that_work_matrix_by_matrix_see_three(self, method):
        (found,), (fused,) = dense(method), dense(method, False)
        assert not torch.allclose(found[MATRIX], fused[MATRIX], atol=1e-4)
        if method not in (TsvM(), IsoC()):
            return
        (expected,) = models(applied(method, split_by_hand()))
        assert equal(by_hand(found), expected)

    def test_another_scale(self):
        merged = TsvM()(experts()).scaled(0.5)
        base = merged.base.tensor(MATRIX)
        once = TsvM()(experts()).static(MATRIX)
        torch.testing.assert_close(merged.static(MATRIX), base + 0.5 * (once - base))
        assert isinstance(merged, Joined) and merged.specs == Average()(experts(False)).specs

    def test_only_some_parameters_in_view(self):
        some = experts().part({f"{BLOCK}q_proj_weight", "visual.proj"})
        merged = TaskArithmetic(1.0)(some)
        (total,) = dense(TaskArithmetic(1.0), False)
        rows = len(total[MATRIX]) // 3
        assert merged.specs.keys() == {MATRIX, "visual.proj"}
        assert torch.equal(merged.static(MATRIX)[:rows], total[MATRIX][:rows])
        assert torch.equal(merged.static(MATRIX)[rows:], merged.base.tensor(MATRIX)[rows:])


@pytest.mark.parametrize("method", ROUTED, **IDS)
class TestRouted:
    def test_folded_weights_are_those_of_three_matrices(self, method):
        """The dense models of every task, against the same method on checkpoints that were cut by hand."""
        if isinstance(method, Duet):  # whose masks are measured in a tower, which is fused
            method = replace(method, static=False)
        found, expected = applied(method, experts()), applied(method, split_by_hand())
        assert (
            found.deltas.keys() <= set(tower())
            and by_hand(dict.fromkeys(found.deltas, torch.zeros(3))).keys() == expected.deltas.keys()
        )
        for gate in (*torch.eye(T), drawn(T, seed=8)):
            gate = gate.repeat_interleave(found.parts // T)
            for key, weight in by_hand({key: found.weight(key, gate) for key in found.specs}).items():
                torch.testing.assert_close(weight, expected.weight(key, gate), atol=2e-6, rtol=0, msg=key)

    def test_the_routed_tower_is_the_folded_model(self, method):
        merged = applied(method, experts())
        if merged.routing.router == "subspace":  # tokens choose: see TestSmile
            return
        routed, plain = install(BACKBONE.build(), merged), BACKBONE.build()
        with torch.inference_mode():
            for task in range(T):
                gate = merged.one_hot(task)
                plain.load_state_dict(dict(merged.state(gate)))
                torch.testing.assert_close(routed(images(), w=gate), plain(images()), atol=1e-5, rtol=1e-5)

    def test_saved_and_read_again(self, method, tmp_path):
        merged = applied(method, experts())
        path = merged.save(tmp_path / "merged.safetensors")
        again = open_merged(path)
        assert again.specs.keys() == merged.specs.keys() and again.deltas.keys() == merged.deltas.keys()
        assert all(map(equal, models(again), models(merged)))
        assert again.stored_bytes == merged.stored_bytes and again.params == merged.params


@pytest.mark.parametrize("method", [quick(each) for each in every_method()], **IDS)
class TestEveryMethod:
    def test_only_fused_names_come_out(self, method):
        merged = applied(method, experts())
        assert merged.specs.keys() == set(tower()) >= merged.deltas.keys()
        for model in models(merged):
            assert {key: tuple(weight.shape) for key, weight in model.items()} == tower()
            assert all(weight.isfinite().all() for weight in model.values())

    def test_experts_equal_to_the_base_give_the_base(self, method):
        base, _ = family(0, tower())
        del base["position_ids"]
        same = replace(opened(base, [dict(base)] * T), separate_qkv=True)
        assert all(equal(model, base) for model in models(applied(method, same)))


@pytest.mark.parametrize("method", [Twin(keep=1.0), Twin(shared=TsvM(), keep=1.0), Duet("all", FULL), Expert()], **IDS)
def test_full_ranks_give_the_experts_back(method):
    """In the blocks: what lies before them is merged statically by those that route."""
    seen = experts()
    for model, checkpoint in zip(models(applied(method, seen)), seen.checkpoints, strict=True):
        inside = [key for key in model if ".resblocks." in key]
        assert len(inside) == 24
        for key in inside:
            torch.testing.assert_close(model[key], checkpoint.tensor(key), atol=2e-5, rtol=0, msg=key)


class TestAgainstSplitInsideTheMethod:
    """Twin and SMILE can cut the fused matrix themselves: two ways to the same numbers."""

    def test_twin(self):
        seen = models(Twin(keep=0.4)(experts()))
        assert all(map(equal, seen, models(Twin(keep=0.4, split_qkv=True)(experts(False)))))
        assert not all(map(equal, seen, models(Twin(keep=0.4, split_qkv=False)(experts(False)))))

    def test_smile(self):
        method = Smile(rank=4, gate_rank=2)
        first, second = applied(method, experts()), method(experts(False))
        with torch.inference_mode():
            answers = [install(BACKBONE.build(), merged)(images()) for merged in (first, second)]
        assert torch.equal(*answers)
        assert isinstance(first.deltas[MATRIX], Rows) and first.params == second.params

    def test_trained_gates(self):
        """The router sees one routed matrix, and a saved model gives the same answers."""
        seen = experts()
        trained, _ = Learned(train=TaskId(steps=5)).fit(applied(Duet("all"), seen), seen, context(seen))
        assert isinstance(trained, Joined) and trained.routing.gates is not None
        with torch.inference_mode():
            assert install(BACKBONE.build(), trained)(images()).isfinite().all()


class TestJoin:
    def test_kinds(self):
        changes = [drawn(T, 4, 6, seed=i) for i in range(3)]
        scales = drawn(T, seed=4)
        masks = [drawn(T, 4, 6, seed=10 + i) > 0 for i in range(3)]
        w = drawn(2, T, seed=9)
        cases = {
            Dense: [Dense(each) for each in changes],
            OnDemand: [OnDemand(each.unbind().__getitem__, each.shape[1:], T) for each in changes],
            Masked: [Masked.of(each[0], mask, scales) for each, mask in zip(changes, masks, strict=True)],
            Rows: [LowRank.of(each[:, :, :2], each[:, :2]) for each in changes],
        }
        for kind, deltas in cases.items():
            joined = join(deltas)
            assert type(joined) is kind and joined.shape == (12, 6) and joined.parts == T
            torch.testing.assert_close(
                joined.mix(w), torch.cat([delta.mix(w) for delta in deltas], 1), atol=1e-6, rtol=0
            )
        assert join(cases[Masked]).scales is scales
        other = [*cases[Masked][:2], Masked.of(changes[2][0], masks[2], 2 * scales)]
        assert type(join(other)) is Rows

    def test_mixed_kinds_are_kept_apart(self):
        deltas = [Dense(drawn(T, 4, 6)), LowRank.of(drawn(T, 4, 2), drawn(T, 2, 6)), Dense(drawn(T, 4, 6, seed=2))]
        assert type(join(deltas)) is Rows

    def test_some_but_not_all_of_the_three(self):
        seen = experts()
        with pytest.raises(ValueError, match=r"q_proj_weight has a delta and .*k_proj_weight has none"):
            seen.merged({}, deltas={f"{BLOCK}q_proj_weight": Dense(seen.tau(f"{BLOCK}q_proj_weight"))})

    def test_vectors(self):
        merged, fused = Twin()(experts()), experts(False)
        shared = 0.3 * TaskArithmetic()(fused).shared[VECTOR]
        assert type(merged.deltas[VECTOR]) is Dense and torch.equal(
            merged.deltas[VECTOR].changes, fused.tau(VECTOR) - shared
        )


def test_checkpoints_without_attention_are_left_alone():
    base, tuned = family(2)
    seen = replace(Experts.open(StateDict(base), [StateDict(each) for each in tuned]), separate_qkv=True)
    assert seen.specs() == replace(seen, separate_qkv=False).specs()
    assert all(map(equal, models(TsvM()(seen)), models(TsvM()(replace(seen, separate_qkv=False)))))


def test_neurons_are_measured_in_the_fused_tower():
    seen, fused = experts(), experts(False)
    first, second = Neurons(0.5).masks(seen, context(seen)), Neurons(0.5).masks(fused, context(fused))
    assert first.keys() == second.keys() and all(torch.equal(first[block], second[block]) for block in first)
