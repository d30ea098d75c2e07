"""Methods whose coefficients are angles between experts: Model Stock, SLERP, multi-SLERP and the Karcher mean."""

import published_spheres as published
import pytest
import torch
from safetensors.torch import load_file
from samples import SHAPES, drawn, family, models

from merging import UserError, combined, entries, merge
from merging.methods import Karcher, ModelStock, Slerp

ROUNDING = 1e-5  # coefficients of fp32 times a few numbers below 8
MULTI_SLERP = Karcher(0, "base")


def close_family(tasks):
    """Experts that share most of their change, whose cosines are neither 0 nor 1."""
    base, experts = family(tasks, spread=0.5)
    common = family(1)[1][0]
    floating = [key for key in base if base[key].is_floating_point()]
    return base, [expert | {key: expert[key] + common[key] - base[key] for key in floating} for expert in experts]


def expected(base, experts, whole):
    """`whole(base, experts)` of flat fp64 vectors, for every parameter."""
    for key in SHAPES:
        vectors = [state[key].double().flatten() for state in (base, *experts)]
        yield key, whole(vectors[0], vectors[1:]).reshape(SHAPES[key])


CASES = [
    pytest.param(ModelStock(), published.model_stock, id="model stock"),
    pytest.param(Karcher(), lambda base, experts: published.karcher(experts, 10), id="karcher"),
    pytest.param(Karcher(3, "base"), lambda base, experts: base + published.karcher(
        [expert - base for expert in experts], 3), id="karcher around the base"),
    pytest.param(MULTI_SLERP, lambda base, experts: base + published.multi_slerp(
        [expert - base for expert in experts]), id="multi-slerp"),
    pytest.param(Karcher(0), lambda base, experts: published.multi_slerp(experts), id="multi-slerp around zero"),
]  # fmt: skip


@pytest.mark.parametrize(("method", "whole"), CASES)
@pytest.mark.parametrize("tasks", [2, 3, 5])
def test_equals_the_published_steps(method, whole, tasks):
    base, experts = close_family(tasks)
    merged = merge(method, base, experts)
    for key, weight in expected(base, experts, whole):
        if isinstance(method, ModelStock) and weight.numel() == 1:
            continue  # of numbers cosines are 1 and -1: kept between 0 and 1 here
        if weight.isnan().any():  # two numbers of opposite sign
            weight = sum(expert[key].double() for expert in experts) / tasks
        assert torch.allclose(merged.weight(key).double(), weight, rtol=0, atol=ROUNDING), key


@pytest.mark.parametrize("share", [0.0, 0.3, 0.5, 1.0])
def test_slerp_equals_the_published_steps(share):
    base, experts = close_family(2)
    around_zero, around_base = (merge(Slerp(share, origin), base, experts) for origin in ("zero", "base"))
    for key, weight in expected(base, experts, lambda base, pair: published.slerp(share, *pair)):
        assert torch.allclose(around_zero.weight(key).double(), weight, rtol=0, atol=ROUNDING), key
    for key, weight in expected(base, experts, lambda b, pair: b + published.slerp(share, *(w - b for w in pair))):
        assert torch.allclose(around_base.weight(key).double(), weight, rtol=0, atol=ROUNDING), key


@pytest.mark.parametrize("method", [Karcher(), Karcher(10, "base"), MULTI_SLERP])
def test_one_task_and_equal_experts_are_the_expert(method):
    base, (expert,) = family(1)
    for experts in ([expert], [expert] * 3):
        (model,) = models(merge(method, base, experts))
        assert all(torch.allclose(model[key], expert[key], rtol=0, atol=ROUNDING) for key in SHAPES)


def test_the_mean_of_two_of_equal_length_is_half_way():
    """On the arc all three methods meet; the length stays, and so does the angle to both."""
    base, (first, second) = {"w": torch.zeros(40)}, ({"w": drawn(40, seed=seed)} for seed in (1, 2))
    second["w"] *= first["w"].norm() / second["w"].norm()
    found = [merge(method, base, [first, second]).weight("w") for method in (Karcher(), MULTI_SLERP, Slerp())]
    for weight in found:
        assert torch.allclose(weight, found[0], rtol=0, atol=ROUNDING)
        assert float(weight.norm()) == pytest.approx(float(first["w"].norm()), rel=1e-5)
        assert float(weight @ first["w"]) == pytest.approx(float(weight @ second["w"]), rel=1e-4)


def test_directions_that_cancel():
    base, tau = {"w": torch.zeros(6), "v": torch.zeros(2)}, drawn(6)
    pair = [{"w": tau, "v": torch.ones(2)}, {"w": -3 * tau, "v": torch.ones(2)}]
    merged = merge(MULTI_SLERP, base, pair)
    assert torch.allclose(merged.weight("w"), -tau, atol=ROUNDING) and torch.allclose(merged.weight("v"), torch.ones(2))
    again = merge(MULTI_SLERP, base, [*pair, *pair])
    assert torch.allclose(again.weight("w"), -tau, atol=ROUNDING)


def test_model_stock_is_the_foot_of_the_perpendicular():
    """Experts mu + b e_t with orthogonal e_t: what is merged lies nearest to mu on the way to their mean."""
    basis = torch.linalg.qr(drawn(20, 5)).Q.T
    base, mu = {"w": drawn(20, seed=3)}, 2 * basis[0]
    experts = [{"w": base["w"] + mu + 0.7 * basis[1 + task]} for task in range(4)]
    change = merge(ModelStock(), base, experts).weight("w") - base["w"]
    mean = sum(expert["w"] for expert in experts) / 4 - base["w"]
    assert abs(float((change - mu) @ mean)) < ROUNDING
    same = merge(ModelStock(), base, [experts[0]] * 3).weight("w")
    assert torch.allclose(same, experts[0]["w"], rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("method", [ModelStock("row"), Karcher(), MULTI_SLERP])
def test_pieces_are_those_of_whole_parameters(method, monkeypatch):
    base, experts = close_family(3)
    before = dict(merge(method, base, experts).state())
    for module, name, size in (
        (entries, "BLOCK", 64),
        (entries, "SPAN", 16),
        (entries, "PIECE", 8),
        (combined, "SPAN", 16),
    ):
        monkeypatch.setattr(module, name, size)
    pieces = dict(merge(method, base, experts).state())
    assert all(torch.allclose(pieces[key], before[key], rtol=0, atol=ROUNDING) for key in SHAPES)


def test_model_stock_by_row_is_that_of_rows_apart():
    base, experts = close_family(3)
    merged = merge(ModelStock("row"), base, experts)
    for row in range(8):
        parts = [{"w": state["wide.weight"][row]} for state in (base, *experts)]
        apart = merge(ModelStock(), parts[0], parts[1:]).weight("w")
        assert torch.allclose(merged.weight("wide.weight")[row], apart, rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("method", [Slerp(), Slerp(0.3, "base"), ModelStock(), ModelStock("row")])
def test_what_the_contract_asks_of_methods_for_any_number(method, tmp_path):
    """Finite where nothing moves or experts are opposite, the base of equals to it, and saved as it is."""
    base, experts = family(2)
    opposite = {key: 2 * base[key] - experts[0][key] if key in SHAPES else base[key] for key in base}
    for pair in ([base, base], [experts[0], base], [experts[0], opposite]):
        (model,) = models(merge(method, base, pair))
        assert all(weight.isfinite().all() for weight in model.values())
        if pair[0] is base:
            assert all(torch.equal(model[key], base[key]) for key in SHAPES)
    merged = merge(method, base, experts)
    saved = load_file(merged.save(tmp_path / "merged.safetensors"))
    assert all(torch.equal(saved[key], weight) for key, weight in merged.state())
    turned = merge(method, base, experts[::-1])
    if getattr(method, "share", 0.5) == 0.5:
        assert all(torch.allclose(turned.weight(key), merged.weight(key), rtol=0, atol=ROUNDING) for key in SHAPES)


def test_too_few_or_too_many_experts():
    base, experts = family(3)
    with pytest.raises(UserError, match=r"slerp merges 2 experts, and here are 3\..*karcher"):
        merge(Slerp(), base, experts)
    with pytest.raises(UserError, match=r"slerp merges 2 experts, and here are 1\."):
        merge(Slerp(), base, experts[:1])
    with pytest.raises(UserError, match="model_stock merges 2 or more experts, and here are 1"):
        merge(ModelStock(), base, experts[:1])
