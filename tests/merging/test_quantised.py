"""Weights in 4 and 8 bits: rounding and GPTQ against their steps, what is stored, and what cannot be quantised."""

from dataclasses import replace

import published_quantised as published
import pytest
import torch
from samples import applied, drawn, equal, family, merged_of, models, opened, tower
from test_regression import BACKBONE, IMAGES, assert_near, measured, merged, pictures, states
from tiny_models import backbone

from merging import load, open_merged
from merging.checkpoints import SafetensorsFile
from merging.errors import UserError
from merging.methods import Average, Dare, EPmq, FeatCal, Lines, Quantised, Smile, TaskArithmetic
from merging.methods.method import call
from merging.packed import Grid, packed, unpacked

GRIDS = [(bits, symmetric) for bits in (4, 8) for symmetric in (True, False)]
grids = pytest.mark.parametrize(("bits", "symmetric"), GRIDS)


@grids
def test_the_nearest_codes_equal_a_plain_loop(bits, symmetric):
    """Also of a last group that is shorter, of rows of one sign and of zeros."""
    weight = drawn(5, 20).double()
    weight[1].abs_()
    weight[2] = 0
    grid = Grid(bits=bits, group=8, symmetric=symmetric)
    assert torch.equal(grid.nearest(weight).opened().double(), published.nearest(weight, bits, 8, symmetric))


@grids
@pytest.mark.parametrize("group", [8, 20])
def test_gptq_equals_the_published_steps(bits, symmetric, group):
    """By the inverse Hessian of the columns that are left, anew for each column."""
    weight, x = drawn(6, 20, seed=1).double(), drawn(40, 20, seed=2).double() @ drawn(20, 20, seed=3).double()
    grid, gram = Grid(bits=bits, group=group, symmetric=symmetric), x.T @ x
    found = grid.compensated(weight, gram, 0.01).opened().double()
    assert torch.allclose(found, published.gptq(weight, gram, 0.01, bits, group, symmetric), atol=1e-6)
    errors = [torch.trace((weight - q) @ gram @ (weight - q).T) for q in (found, grid.nearest(weight).opened())]
    assert errors[0] < 0.7 * errors[1]
    alike = grid.compensated(weight, torch.eye(20).double(), 0.01).opened()
    assert torch.equal(alike, grid.nearest(weight).opened())  # no input tells of another one


@grids
def test_what_is_on_a_grid_is_kept(bits, symmetric):
    first = Grid(bits=bits, group=8).nearest(drawn(5, 20)).opened()
    assert torch.equal(Grid(bits=bits, group=8).nearest(first).opened(), first)
    whole = torch.arange(2**bits).float().repeat(2, 1) / 8 - 1  # a code of 0 inside, all codes in use
    grid = Grid(bits=bits, group=2**bits, symmetric=False)
    assert torch.equal(grid.nearest(whole).opened(), whole)


@grids
@pytest.mark.parametrize("width", [1, 2, 7, 8])
def test_codes_are_packed_without_loss_and_counted_by_hand(bits, symmetric, width):
    codes = (torch.arange(3 * width).view(3, width) * 37 % 2**bits).to(torch.uint8)
    stored = packed(codes, bits)
    assert stored.shape == (3, -(-width * bits // 8)) and torch.equal(unpacked(stored, bits, width), codes)
    own = Grid(bits=bits, group=3, symmetric=symmetric).nearest(drawn(5, 20))
    zeros = 0 if symmetric else -(-7 * bits // 8)
    assert own.bytes == 5 * (20 * bits // 8 + 2 * 7 + zeros)


@pytest.mark.parametrize("turned", [False, True])
def test_pieces_are_those_of_the_whole(turned):
    """Whatever rows they begin and end in."""
    weight = drawn(6, 20)
    own = Grid(group=8).nearest(weight, shape=(20, 6) if turned else (6, 20), transposed=turned)
    whole = own.opened()
    assert whole.shape == own.shape and (whole.T if turned else whole).sub(weight).abs().max() < 0.3
    for first, last in ((0, 120), (5, 17), (19, 61), (40, 60)):
        assert torch.equal(own.entries(first, last), whole.reshape(-1)[first:last])


class TestQuantised:
    def test_the_matrices_of_blocks_are_rounded_and_nothing_else(self):
        base, experts = family(3, tower())
        dense, found = (models(merged_of(m, base, experts))[0] for m in (Average(), Quantised(group=8, then=Average())))
        inside = {k for k in tower() if "resblocks" in k and k.endswith("weight") and "ln_" not in k}
        for key, weight in found.items():
            expected = published.nearest(dense[key], 4, 8, True).float() if key in inside else dense[key]
            assert torch.equal(weight, expected), key

    def test_at_another_scale_all_is_rounded_anew(self):
        base, experts = family(3, tower())
        one, other = (merged_of(Quantised(group=8, then=TaskArithmetic(s)), base, experts) for s in (0.3, 0.7))
        assert one.scale == 0.3 and equal(models(one.scaled(0.7))[0], models(other)[0])
        assert not equal(models(one)[0], models(other)[0]) and one.scaled(0.7).scaled(0.3).scale == 0.3

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_a_saved_model_is_loaded_as_it_was(self, dtype, tmp_path):
        from samples import BACKBONE

        base, experts = family(3, tower(), dtype)
        del base["position_ids"]
        experts = [{key: expert[key] for key in base} for expert in experts]
        found = merged_of(Quantised(group=8, symmetric=False), base, experts)
        path = found.save(tmp_path / "merged.safetensors")
        again, images = open_merged(path), drawn(2, 3, 16, 16)
        assert all(map(equal, models(again), models(found))) and list(again.specs) == list(found.specs)
        sizes = sum(spec.bytes for spec in SafetensorsFile(path).specs().values())
        assert sizes == found.stored_bytes == again.stored_bytes
        assert sizes < 0.75 * merged_of(TaskArithmetic(), base, experts).stored_bytes
        module = BACKBONE.build()
        module.load_state_dict(models(found)[0], strict=False)
        with torch.no_grad():
            assert torch.equal(load(path, BACKBONE.build())(images), module.eval()(images))
        assert all(map(equal, models(open_merged(again.save(tmp_path / "again.safetensors"))), models(found)))

    def test_groups_lie_along_inputs_of_matrices_that_are_stored_turned(self):
        states = [backbone("GPT2LMHeadModel").build().state_dict() for _ in range(3)]
        found, dense = (merged_of(m, states[0], states[1:]) for m in (Quantised(group=8, then=Average()), Average()))
        key = next(key for key in found.packed if key.endswith("mlp.c_proj.weight"))
        assert found.packed[key].transposed
        assert torch.equal(found.weight(key), published.nearest(dense.weight(key).T, 4, 8, True).T.float())

    def test_separate_queries_come_out_fused(self):
        base, experts = family(3, tower())
        apart = replace(opened(base, experts), separate_qkv=True)
        method = Quantised(group=8)
        assert all(map(equal, models(applied(method, apart)), models(merged_of(method, base, experts))))

    def test_a_sparsifier_stands_in_front(self):
        base, experts = family(3, tower())
        one, other = Dare(0.5, then=Quantised(group=8)), Quantised(group=8, then=Dare(0.5))
        assert equal(*(models(merged_of(method, base, experts))[0] for method in (one, other)))


class TestEPmq:
    @pytest.mark.parametrize(("bits", "symmetric"), [(4, True), (8, False)])
    def test_equals_the_described_steps(self, bits, symmetric):
        base, experts = states()
        start = {key: base[key] + 0.3 * sum(expert[key] - base[key] for expert in experts) for key in base}
        images = [pictures(task) for task in range(3)]
        expected = published.e_pmq(BACKBONE.build, start, experts, images, 0.05, 0.01, bits, 8, symmetric)
        method = EPmq(0.05, bits=bits, group=8, symmetric=symmetric, samples=IMAGES, then=TaskArithmetic(0.3))
        assert_near(merged(method), expected)

    def test_without_bound_the_anchor_is_rounded(self):
        rounded, nearest = merged(EPmq(ridge=1e12, group=8)), merged(Quantised(group=8))
        for key, weight in rounded.items():
            assert torch.allclose(weight, nearest[key], atol=1e-6), key

    def test_of_experts_that_are_the_merged_model_only_rounding_is_left(self):
        """In many bits no error to speak of; without compensation the nearest codes themselves."""
        base, experts = states()
        same = base, experts[:1] * 3
        assert_near(merged(EPmq(bits=8, group=8, then=Average()), same), experts[0], 0.02)
        one, other = EPmq(compensate=False, group=8, then=Average()), Quantised(group=8, then=Average())
        for key, weight in merged(one, same).items():
            assert torch.allclose(weight, merged(other, same)[key], atol=1e-6), key

    def test_a_search_for_its_scale_is_not_offered(self):
        assert call(EPmq(group=8), *measured()).scale is None


def test_bad_input(tmp_path):
    base, experts = family(2, tower())
    with pytest.raises(UserError, match=r"in_proj_weight has 16 inputs, and group=64 .* narrower than its group"):
        merged_of(Quantised(), base, experts)
    with pytest.raises(UserError, match=r"e_pmq: encoder.layers.0.mlp.fc1.weight has 8 inputs, and group=9"):
        merged(EPmq(group=9))
    with pytest.raises(UserError, match="What is quantised must be a static method"):
        merged_of(Quantised(group=8, then=Smile()), base, experts)
    for behind in (
        Lines(then=Quantised(group=8)),
        FeatCal(then=Quantised(group=8)),
        Quantised(group=8, then=Quantised(group=8)),
    ):
        with pytest.raises(UserError, match="was quantised by Quantised, which comes last"):
            merged_of(behind, base, experts)
    for wrong in ({"bits": 3}, {"group": 0}):
        with pytest.raises(UserError, match=r"unknown|out of range"):
            Quantised(**wrong)
    with pytest.raises(UserError, match=r"ridge=0.0 is out of range"):
        EPmq(ridge=0.0)
